"""What all readers share: text out of bytes, fields out of records, and errors that say where something is wrong."""

import codecs
import numbers
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

from worldlm_jax import checks
from worldlm_jax.data.documents import SPLITS, Document

T = TypeVar("T")

INVALID = "\udfff"  # stands for bytes that are not UTF-8 until they are counted: decoding never gives it otherwise
_SURROGATES = re.compile("[\ud800-\udfff]")
_REMEDY = "convert it, for example with iconv, or set config.data.invalid_utf8=replace"

codecs.register_error("worldlm_jax.invalid", lambda error: (INVALID, error.end))  # type: ignore[attr-defined]


def decode_errors(invalid_utf8: str) -> str:
  """The error handler of `bytes.decode` for a policy of the config: "error" or "replace"."""
  return "strict" if invalid_utf8 == "error" else "worldlm_jax.invalid"


def replace_invalid(text: str) -> tuple[str, int]:
  """`text` with U+FFFD for what is not UTF-8 in it, lone surrogates too, and how many there were."""
  return _SURROGATES.subn("\ufffd", text)


def fail_from(error: Exception, name: str, value: Any, expected: str, remedy: str = "") -> NoReturn:
  """Raises as `checks.fail` does, with `error` as the cause."""
  try:
    checks.fail(name, value, expected, remedy)
  except checks.InputError as failure:
    raise failure from error


def fail_not_utf8(error: UnicodeError, origin: str, place: str) -> NoReturn:
  """Raises the `InputError` for text that is not UTF-8; `place` is such as "byte 5" or "line 3"."""
  fail_from(error, "file", origin, f"UTF-8, but {place} is not", _REMEDY)


def guarded(items: Iterator[T], origin: str, unit: str) -> Iterator[T]:
  """Yields `items`, which a library reads; where it fails, raises an `InputError` that says after how many `unit`s."""
  count = 0
  while True:
    try:
      item = next(items)
    except StopIteration:
      return
    except Exception as error:  # each library and file system has errors of its own
      fail_damaged(error, origin, f" after {count} {unit}s")
    count += 1
    yield item


def fail_damaged(error: Exception, origin: str, place: str = "") -> NoReturn:
  """Raises the `InputError` for a file that a library cannot read."""
  fail_from(error, "file", origin, f"a complete and readable file, but reading it fails{place} ({reason(error)})",
            "copy or download it again, and check its permissions")


def reason(error: Exception) -> str:
  """The kind and the beginning of the message of a library's error, on one line."""
  message = textwrap.shorten(str(getattr(error, "strerror", None) or error), 250, placeholder=" ...").rstrip(".")
  return f"{type(error).__name__}: {message}" if message else type(error).__name__


def lookup(record: Any, setting: str, field: str, where: str) -> Any:
  """What `record`, dicts within dicts, holds under the dotted name `field`; None also where a part of the way is null.

  Raises:
    InputError: `setting` names a field that the record does not have; the error lists those that it has.
  """
  value = record
  for key in field.split("."):
    if value is None:
      return None
    if not isinstance(value, dict) or key not in value:
      available = sorted(_names(record, ""))
      checks.fail(setting, field, f"a field of {where}, which has {', '.join(map(repr, available)) or 'none'}",
                  checks.did_you_mean(field, available) or "set it to one of these")
    value = value[key]
  return value


def _names(record: dict[str, Any], prefix: str) -> Iterator[str]:
  """The dotted names of what a record holds."""
  for key, value in record.items():
    if isinstance(value, dict) and value:
      yield from _names(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}"


class Fields(NamedTuple):
  """Where the records of a source hold what makes a document."""

  text: str
  node: str  # "" where documents carry no tag
  invalid_utf8: str  # "error" or "replace"

  def check(self, schema: dict[str, Any], where: str) -> None:
    """Raises unless `schema`, dicts within dicts, has the fields."""
    lookup(schema, "text_field", self.text, where)
    if self.node:
      lookup(schema, "node_field", self.node, where)

  def document(self, record: Any, where: str, labels: Sequence[str] | None = None) -> Document:
    """The document of a record of dicts within dicts; `where` names it in errors, `labels` are the tags by number."""
    tag = lookup(record, "node_field", self.node, where) if self.node else None
    if labels and isinstance(tag, numbers.Integral) and 0 <= int(tag) < len(labels):  # -1 stands for an unknown one
      tag = labels[int(tag)]
    return self.make(lookup(record, "text_field", self.text, where), tag, where)

  def make(self, text: Any, tag: Any, where: str) -> Document:
    """The document of the values found: null gives an empty text or tag.

    Raises:
      InputError: the text is no string, the tag neither a string nor a whole number, or one of them is
        not UTF-8 where the policy is "error".
    """
    if isinstance(tag, numbers.Integral) and not isinstance(tag, bool):
      tag = str(int(tag))
    checks.require(text is None or isinstance(text, str | bytes), "text_field", self.text,
                   f"text in every record, but {where} holds {type(text).__name__} in it", "name the field of the text")
    checks.require(tag is None or isinstance(tag, str | bytes), "node_field", self.node,
                   f"a string or a whole number in every record, but {where} holds {type(tag).__name__} in it")
    text, replaced = self._sound(text, where)
    return Document(text, "", self._sound(tag, where)[0], replaced)

  def _sound(self, value: str | bytes | None, where: str) -> tuple[str, int]:
    """`value` as a string that can be encoded again, and what was replaced for it."""
    if value is None:
      return "", 0
    try:
      if isinstance(value, bytes):
        return value.decode(), 0
      if not value.isascii():
        value.encode()  # JSON can spell a lone surrogate, which is no character
      return value, 0
    except UnicodeError as error:
      if self.invalid_utf8 == "error":
        fail_from(error, "record", where, "UTF-8, but its text is not", _REMEDY)
      text = value.decode(errors=decode_errors("replace")) if isinstance(value, bytes) else value
      return replace_invalid(text)


def split_names(kind: str, train: str, valid: str, test: str) -> dict[str, str]:
  """Our name of a split, "" where documents are yet to be split, -> that of a data set.

  Raises:
    InputError: `train` is empty, or only one of `valid` and `test` is given. `kind` names the source.
  """
  checks.require(bool(train), f"{kind}.train", train, "a split of the data set, such as 'train'")
  given = valid or test
  checks.require(bool(valid) == bool(test), f"{kind}.{'test' if valid else 'valid'}", "", f"a split too, next to "
                 f"{given!r}", "give both, or neither to have the documents of train split by their hash")
  return dict(zip(SPLITS, (train, valid, test), strict=True)) if given else {"": train}
