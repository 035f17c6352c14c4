"""Writes documents as ArrayRecord files that are never seen half written."""

import contextlib
import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python import array_record_module

# Every record is compressed by itself, so that reading one decompresses no other.
_OPTIONS = "group_size:1,zstd:3"
_LEAST_FREE_BYTES = 1 << 20
_DOCUMENTS_PER_LOOK = 64  # at the free space


class Shard(NamedTuple):
  """A file that was written."""

  node: str
  split: str
  documents: int
  text_bytes: int
  sha256: str  # of the file


class Writer:
  """Writes a set of shards below the folder `out`: aside, and to their places when all are complete.

  To be used in a `with`, at whose end what was not finished is thrown away.
  """

  def __init__(self, out: Path, aside: Path) -> None:
    self._out, self._aside = out, aside
    self._open: dict[str, Any] = {}
    self._counts: dict[str, Shard] = {}

  def __enter__(self) -> "Writer":
    return self

  def add(self, node: str, split: str, number: int, encoded: bytes) -> None:
    """Writes a document, given in UTF-8, to the shard of that number of its node and split."""
    name = os.path.normpath(f"{node}/{split}-{number:05d}.array_record")
    if name not in self._open:
      path = self._aside / name
      path.parent.mkdir(parents=True, exist_ok=True)
      self._open[name] = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)
      self._counts[name] = Shard(node, split, 0, 0, "")
    self._open[name].write(encoded)
    counts = self._counts[name]
    counts = counts._replace(documents=counts.documents + 1, text_bytes=counts.text_bytes + len(encoded))
    self._counts[name] = counts
    # The library tells of a full disk only when it closes a file; all until then would be read in vain.
    if counts.documents % _DOCUMENTS_PER_LOOK == 0 and shutil.disk_usage(self._out).free < _LEAST_FREE_BYTES:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._out))

  def finish(self) -> dict[str, Shard]:
    """Closes, checks and moves all shards; returns them by their path below `out`.

    Raises:
      OSError, RuntimeError: a file could not be written.
    """
    for name, writer in self._open.items():
      writer.close()
      path, expected = self._aside / name, self._counts[name].documents
      reader = array_record_module.ArrayRecordReader(str(path))
      written = reader.num_records()
      reader.close()
      if written != expected:
        raise OSError(errno.EIO, f"{written} of {expected} records were written", str(path))
      self._counts[name] = self._counts[name]._replace(sha256=sha256(path))
      _sync(path)
    for name in self._open:
      target = self._out / name
      target.parent.mkdir(parents=True, exist_ok=True)
      (self._aside / name).replace(target)
    for folder in {(self._out / name).parent for name in self._open}:
      _sync(folder)
    return self._counts

  def __exit__(self, *_: Any) -> None:
    for writer in self._open.values():
      if writer.is_open():
        with contextlib.suppress(RuntimeError):  # what is wrong with the disk is on its way to the person already
          writer.close()
    shutil.rmtree(self._aside, ignore_errors=True)


def sha256(path: Path) -> str:
  """The checksum of a file."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
  """Has a file, or the names in a folder, reach the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
