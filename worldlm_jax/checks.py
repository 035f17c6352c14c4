"""Validators: each raises `InputError`, a `ValueError`, with name=value, what was expected, and the remedy."""

import difflib
import itertools
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml

MAX_NESTING = 200  # of values within values, in files
MAX_EXPANDED = 10**7  # characters and values of a YAML file once its aliases are written out


class InputError(ValueError):
  """Something that the person who started the run can put right."""


def fail(name: str, value: Any, expected: str, remedy: str = "") -> NoReturn:
  """Raises `InputError("name=value: expected ...; remedy")`."""
  raise InputError(f"{name}={value!r}: expected {expected}{'; ' + remedy if remedy else ''}")


def require(ok: bool, name: str, value: Any, expected: str, remedy: str = "") -> None:
  """Raises as `fail` does unless `ok`."""
  if not ok:
    fail(name, value, expected, remedy)


def one_of(name: str, value: str, choices: Collection[str]) -> None:
  """Raises unless `value` is one of `choices`, naming the closest of them."""
  if value not in choices:
    fail(name, value, f"one of {', '.join(map(repr, choices))}", did_you_mean(value, choices))


def did_you_mean(value: str, choices: Iterable[str]) -> str:
  """`did you mean 'x'?` for the choice closest to `value`, or an empty string.

  A single name may be close to the last one of a path: 'tools' to 'code/tools'.
  """
  choices = list(choices)
  last = {choice.rpartition("/")[2]: choice for choice in choices}
  close = difflib.get_close_matches(str(value), choices, n=1)
  if not close and "/" not in str(value):
    close = [last[name] for name in difflib.get_close_matches(str(value), last, n=1)]
  return f"did you mean {close[0]!r}?" if close else ""


def read_json(path: Path) -> Any:
  """The content of a JSON file. Raises `OSError`, or a `ValueError` where it is none or is nested too deeply."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except RecursionError as error:
    raise ValueError("it is nested too deeply") from error
  _check_nesting(content)
  return content


def read_object(path: Path, *names: str, remedy: str = "") -> dict[str, Any]:
  """The object of a JSON file that has the fields `names`. Raises `InputError` where it is none."""
  try:
    content = read_json(path)
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: expected readable JSON ({error})" + (f"; {remedy}" if remedy else "")) from error
  require(isinstance(content, dict), f"{path}: type", type(content).__name__, "a JSON object", remedy)
  missing = [name for name in names if name not in content]
  require(not missing, f"{path}: missing", missing, f"the fields {', '.join(names)}", remedy)
  return content


def read_yaml(path: Path) -> Any:
  """The content of a YAML file, which can hold plain values alone.

  Raises `OSError`, or a `ValueError` where it is no YAML, or nested too deeply, or its aliases make too much of it.
  """
  text = path.read_text(encoding="utf-8")
  try:
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    if node is None:
      return None
    if _expanded(node, {}) > MAX_EXPANDED:
      raise ValueError("its aliases stand for too much")
    content = loader.construct_document(node)
  except Exception as error:  # a value that is not what its tag says is a KeyError, an IndexError, ...
    raise ValueError(str(error) if isinstance(error, yaml.YAMLError | ValueError) else f"{error!r}") from error
  _check_nesting(content)
  return content


def _expanded(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
  """How large a value is with all that its aliases stand for; `known` has that of others, and 0 for those around it."""
  if node not in known:
    known[node] = 0
    size = 1
    if isinstance(node, yaml.ScalarNode):
      size += len(node.value)
    else:
      parts = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
      size += sum(_expanded(part, known) for part in parts)
    known[node] = size
  elif not known[node]:
    raise ValueError("an alias stands for a value that it is within")
  return known[node]


def _check_nesting(content: Any) -> None:
  level = [content]
  for _ in range(MAX_NESTING):
    level = [
      inner for outer in level if isinstance(outer, dict | list | tuple)
      for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]
    if not level:
      return
  raise ValueError("it is nested too deeply")


def differences(old: Any, new: Any, path: str = "") -> list[str]:
  """The dotted names of the fields in which two `config.to_dict` results differ, with both values."""
  if isinstance(old, dict) and isinstance(new, dict):
    found = []
    for name in sorted(old.keys() | new.keys()):
      found += differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    return found
  if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{path}[{i}]")]
  return [] if old == new else [f"{path}: {json.dumps(old)} there, {json.dumps(new)} here"]
