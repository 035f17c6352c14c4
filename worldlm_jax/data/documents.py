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
