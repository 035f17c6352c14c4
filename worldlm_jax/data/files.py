"""Documents out of local files: text, JSON lines, Parquet and ArrayRecord, a block at a time however large they are.

A file's format is its suffix. In .txt, blank lines separate documents. .jsonl (also .jsonl.gz, .jsonl.zst and
.json.gz) has one JSON object per line, .parquet one row per document, and .array_record one UTF-8 text per record.
"""

import codecs
import concurrent.futures
import gzip
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
import pyarrow as pa

from worldlm_jax import checks, config
from worldlm_jax.data import containers, reading
from worldlm_jax.data.documents import SPLITS, Corpus, Document

_BLOCK_BYTES = 1 << 20
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_SPLIT_OF = {"train": "train", "valid": "valid", "validation": "valid", "test": "test"}


def open_files(source: config.Files, invalid_utf8: str) -> Corpus:
  """The documents of the file, or of the folder's own files, at `source.path`.

  A folder's files named for a split, such as train.txt or validation-0001.parquet, are taken as they are split,
  and its other files are ignored. Any other documents are left unsplit.

  Args:
    source: the path, relative to the current directory, and the fields of its records.
    invalid_utf8: "error", or "replace" to have U+FFFD in its place.

  Raises:
    InputError: here where nothing readable is at the path, a split is missing, a file is damaged or lacks
      a field as far as its schema tells, or the first record is at fault; when documents are read where another one is.
  """
  files = _files_by_split(source.path)
  fields = reading.Fields(source.text_field, source.node_field, invalid_utf8)
  for file, _ in files:
    _FORMATS[_suffix(file)].check(file, fields)
  roles = [(_suffix(file), split) for file, split in files]
  digest = digest_files([file for file, _ in files])
  fingerprint = hashlib.sha256(repr((digest, roles, source.text_field, source.node_field)).encode()).hexdigest()

  def documents() -> Iterator[Document]:
    for file, split in files:
      for document in _FORMATS[_suffix(file)].read(file, fields):
        yield document._replace(split=split)

  next(documents(), None)  # the first record shows what the checks do not
  return Corpus(source.path, fingerprint, documents)


def _files_by_split(path: str) -> list[tuple[Path, str]]:
  """The files to read with the split of each, in the order of reading."""
  place = Path(os.path.expanduser(path))
  checks.require(bool(path) and os.path.exists(place), "Files.path", path, "an existing file or folder",
                 "correct the path; a relative one starts from the current directory")
  try:
    visible = [file for file in sorted(place.iterdir()) if not file.name.startswith(".")] if place.is_dir() else [place]
  except OSError as error:
    reading.fail_damaged(error, path)
  files = [file for file in visible if file.is_file() and _suffix(file)]
  checks.require(bool(files), "Files.path", path, f"a file, or a folder that holds files, of {', '.join(SUFFIXES)}",
                 "put train.txt, valid.txt and test.txt there, or any such files to be split by hash")
  named = [(file, _SPLIT_OF.get(re.split(r"[-._]", file.name)[0], "")) for file in files]
  present = {split for _, split in named} - {""}
  if not place.is_dir() or not present:
    return [(file, "") for file in files]
  missing = [split for split in SPLITS if split not in present]
  checks.require(not missing, "Files.path", path, f"files for all of {', '.join(SPLITS)}, but it lacks "
                 f"{', '.join(missing)}", "add them, or rename the others to have all files split by hash")
  return [(file, split) for split in SPLITS for file, its in named if its == split]


def digest_files(paths: Sequence[Path]) -> str:
  """SHA-256, in hexadecimal, of the contents of files in their order, whatever their names and times.

  Raises:
    InputError: a file cannot be read.
  """

  def digest(path: Path) -> str:
    try:
      with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
      reading.fail_damaged(error, str(path))

  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
    return hashlib.sha256("".join(pool.map(digest, paths)).encode()).hexdigest()


class _Decompressed(io.BufferedReader):
  """A buffer over a decompressing stream that closes the compressed one too."""

  def __init__(self, stream: Any, compressed: BinaryIO):
    super().__init__(stream, 1 << 17)  # as much as can be lost before the place where an archive is damaged
    self._compressed = compressed

  def close(self) -> None:
    super().close()
    self._compressed.close()


def open_stream(path: str) -> BinaryIO:
  """The bytes of a local file or of a URL that fsspec knows, such as hf://datasets/..., unpacked if .gz or .zst.

  Raises:
    InputError: it cannot be opened, or a compressed one is empty. What is found later to be damaged shows as
      an error of the decompressor, which `read_jsonl` turns into an `InputError`.
  """
  remote = "://" in path
  try:
    raw: Any = fsspec.open(path, "rb").open() if remote else open(path, "rb", buffering=0)  # noqa: SIM115
    stream = io.BufferedReader(raw, _BLOCK_BYTES)
    empty = not stream.peek(1)
  except Exception as error:  # each file system of fsspec has errors of its own
    remedy = "check the address, the connection and your rights" if remote else "check the path and its permissions"
    reading.fail_from(error, "file", path, f"a readable file ({reading.reason(error)})", remedy)
  if not path.endswith((".gz", ".zst")):
    return stream
  if empty:
    stream.close()
    checks.fail("file", path, "a compressed file, but it is empty", "copy or download it again")
  return _Decompressed(gzip.GzipFile(fileobj=stream) if path.endswith(".gz")
                       else pa.CompressedInputStream(stream, "zstd"), stream)


def read_jsonl(
  stream: BinaryIO, origin: str, text_field: str, node_field: str, invalid_utf8: str
) -> Iterator[Document]:
  """One document for each line of `stream` that is not blank.

  Args:
    stream: JSON objects, one a line; the caller closes it.
    origin: names the stream in errors.
    text_field: holds the text; "meta.body" leads into a nested object. Null gives an empty document.
    node_field: holds the tag, a string or a whole number; "": no tag.
    invalid_utf8: "error" or "replace"; lone surrogates, which JSON can spell, fall under it too.

  Raises:
    InputError: the stream is damaged, or a line is not UTF-8, no JSON object, or lacks a field.
  """
  fields, errors = reading.Fields(text_field, node_field, invalid_utf8), reading.decode_errors(invalid_utf8)
  for number, line in enumerate(reading.guarded(iter(stream), origin, "line"), 1):
    try:
      text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors)
      if not text or text.isspace():
        continue
      record = json.loads(text)
    except UnicodeDecodeError as error:
      reading.fail_not_utf8(error, origin, f"line {number}")
    except (ValueError, RecursionError) as error:
      reading.fail_from(error, "file", origin, f"one JSON object on each line, but line {number} is none "
                        f"({reading.reason(error)})", "correct the line, or write the file again")
    checks.require(isinstance(record, dict), "file", origin, f"one JSON object on each line, but line {number} is a "
                   f"{type(record).__name__}", 'write each document as {"text": "..."}')
    yield fields.document(record, f"line {number} of {origin}")


def split_text(texts: Iterable[str]) -> Iterator[str]:
  """The documents, between blank lines, of a text with \\n line ends that comes in parts cut anywhere.

  They come without the line ends around them. None is only white space.
  """
  begun: list[str] = []  # parts of the document that is not yet at its end
  tail = "\n"  # white space that may grow into a separator; as if a line ended before the text
  for text in texts:
    text = tail + text
    head = text.rstrip()
    tail = text[len(head):]
    first, *others = _BLANK_LINES.split(head)
    begun.append(first)
    if others:
      *whole, last = others
      yield from _not_empty(["".join(begun), *whole])
      begun = [last]
  yield from _not_empty(["".join(begun) + _BLANK_LINES.split(tail + "\n")[0]])


def _not_empty(documents: Iterable[str]) -> Iterator[str]:
  return (document.strip("\n") for document in documents if document)


def _decoded(file: Path, invalid_utf8: str) -> Iterator[str]:
  """The text of a file with \\n line ends and without its byte order mark, in parts."""
  decoder = codecs.getincrementaldecoder("utf-8")(reading.decode_errors(invalid_utf8))
  to_newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
  end, at_start = 0, True
  with open_stream(str(file)) as stream:
    blocks = reading.guarded(iter(lambda: stream.read(_BLOCK_BYTES), b""), str(file), "block")
    for block in itertools.chain(blocks, [b""]):
      end += len(block)
      try:
        text = to_newlines.decode(block, final=not block)
      except UnicodeDecodeError as error:
        # The decoder saw `error.object`, which ends with this block but begins with what it kept of those before.
        reading.fail_not_utf8(error, str(file), f"byte {end - len(error.object) + error.start}")
      if at_start and text:
        text, at_start = text.removeprefix("\ufeff"), False
      yield text


def _read_text(file: Path, fields: reading.Fields) -> Iterator[Document]:
  for text in split_text(_decoded(file, fields.invalid_utf8)):
    if reading.INVALID in text:
      text, replaced = reading.replace_invalid(text)
      yield Document(text, replaced=replaced)
    else:
      yield Document(text)


def _check_no_fields(file: Path, fields: reading.Fields) -> None:
  checks.require(not fields.node, "node_field", fields.node, f"'' for {file}, whose documents have no fields",
                 "give each node its own folder, or write JSON lines or Parquet")


def _check_array_record(file: Path, fields: reading.Fields) -> None:
  _check_no_fields(file, fields)
  containers.array_record_length(file)


def _check_lines(file: Path, fields: reading.Fields) -> None:
  open_stream(str(file)).close()


def _read_lines(file: Path, fields: reading.Fields) -> Iterator[Document]:
  with open_stream(str(file)) as stream:
    yield from read_jsonl(stream, str(file), fields.text, fields.node, fields.invalid_utf8)


class _Format(NamedTuple):
  check: Callable[[Path, reading.Fields], None]  # raises for what is wrong with a file before its records are read
  read: Callable[[Path, reading.Fields], Iterator[Document]]


_LINES = _Format(_check_lines, _read_lines)
_FORMATS = {
  ".txt": _Format(_check_no_fields, _read_text),
  ".jsonl": _LINES,
  ".jsonl.gz": _LINES,
  ".jsonl.zst": _LINES,
  ".json.gz": _LINES,
  ".parquet": _Format(containers.check_parquet, containers.read_parquet),
  ".array_record": _Format(_check_array_record, containers.read_array_record),
}
SUFFIXES = tuple(_FORMATS)


def _suffix(file: Path) -> str:
  """The one of `SUFFIXES` that a file has, or ""."""
  return next((suffix for suffix in SUFFIXES if file.name.endswith(suffix)), "")
