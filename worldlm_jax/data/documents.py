"""Documents: what every source gives, and the split that a document belongs to."""

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

SPLITS = ("train", "valid", "test")


class Document(NamedTuple):
  """One document. What its source does not say is left empty."""

  text: str
  split: str = ""  # of SPLITS; "": it goes where `split_of` puts it
  tag: str = ""  # what the source's node_field says
  replaced: int = 0  # how many invalid byte sequences became replacement characters


class Corpus(NamedTuple):
  """An opened source. Opening finds what is wrong with it as far as that goes without reading everything."""

  origin: str  # what errors call it, such as "texts/law/train.txt"
  fingerprint: str  # changes whenever a document does, and does not depend on where the files lie
  documents: Callable[[], Iterator[Document]]  # from the first on, in the same order every time; may raise InputError


def digest(encoded: bytes) -> int:
  """64 bits of the BLAKE2b hash of a text in UTF-8: equal ones are duplicates, and `split_of` cuts by it."""
  return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")


class SplitBounds(NamedTuple):
  """Documents whose digest is below `valid` are for training, those from `test` on for testing.

  The bounds are the same for every source, so that a document has the same split wherever it lies: what
  one node tests on is in no other node's training text, however the documents are spread over the tree.
  """

  valid: int = 2**64 * 90 // 100
  test: int = 2**64 * 95 // 100

  def split_of(self, digest: int) -> str:
    """The split of a document that its source puts in none: 90 % train, 5 % valid, 5 % test."""
    return "train" if digest < self.valid else "valid" if digest < self.test else "test"
