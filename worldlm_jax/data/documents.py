"""The texts of one node: documents in three splits."""

import dataclasses
from collections.abc import Sequence

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True, slots=True)
class Documents:
  """The documents of each split, and for each split where they come from, in words for error messages."""

  train: tuple[str, ...]
  valid: tuple[str, ...]
  test: tuple[str, ...]
  origins: dict[str, str]


def num_bytes(documents: Sequence[str]) -> int:
  """The size of the documents in UTF-8, without separators."""
  return sum(len(document.encode()) for document in documents)


def first_bytes(documents: Sequence[str], max_bytes: int) -> tuple[str, ...]:
  """The longest run of whole leading documents within `max_bytes` UTF-8 bytes; 0 means all of them.

  A first document that is longer by itself is cut at the last character boundary within `max_bytes`.
  """
  if not max_bytes:
    return tuple(documents)
  kept, room = [], max_bytes
  for document in documents:
    encoded = document.encode()
    if len(encoded) > room:
      break
    kept.append(document)
    room -= len(encoded)
  if documents and not kept:
    kept = [documents[0].encode()[:max_bytes].decode(errors="ignore")]
  return tuple(kept)
