"""Writes one tokenised text: its splits, each out of one part for every choice that makes up its source."""

import hashlib
import heapq
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from worldlm_jax import checks
from worldlm_jax.data import documents
from worldlm_jax.data.tokenizer import Tokenizer

KINDS = ("tokens", "documents", "hashes")  # the files of a split


class Counts(NamedTuple):
  """What a split holds. Empty documents are left out before anything is counted."""

  documents: int = 0
  text_bytes: int = 0  # UTF-8, without separators
  tokens: int = 0  # with a separator for each document
  replaced: int = 0  # invalid byte sequences that became replacement characters
  empty: int = 0


class TrainLimit:
  """Which training documents to take where only so many bytes are wanted: those of the smallest digests.

  They are a sample of the whole text, the same whatever the order of the documents, and a larger limit
  adds to them. Of a first document that is larger by itself, the beginning is taken.
  """

  def __init__(self, max_bytes: int, bounds: documents.SplitBounds):
    self.max_bytes, self._bounds = max_bytes, bounds
    self._taken: list[tuple[int, int]] = []  # a heap of (-digest, size)
    self._total = 0
    self._end = 2**64  # of the digests that are taken

  def add(self, document: documents.Document, encoded: bytes, digest: int, part: int) -> None:
    """Sees a document, once for all."""
    if not document.text.strip() or (document.split or self._bounds.split_of(digest)) != "train":
      return
    if digest >= self._end:
      return
    heapq.heappush(self._taken, (-digest, len(encoded)))
    self._total += len(encoded)
    # Copies of a document have the same digest: all of them are taken, or none.
    while self._taken and (self._total > self.max_bytes or -self._taken[0][0] >= self._end):
      largest, size = heapq.heappop(self._taken)
      self._end, self._total = -largest, self._total - size

  def takes(self, digest: int) -> bool:
    """Whether a training document is taken."""
    return digest < self._end

  def begins_with(self, digest: int) -> bool:
    """Whether nothing is taken whole, and this document is the one of which the beginning is."""
    return not self._taken and digest == self._end


class Writer:
  """Writes one text; `whole` once it is finished and in place."""

  def __init__(
    self, partial: Path, tokenizer: Tokenizer, bounds: documents.SplitBounds, limit: TrainLimit | None, num_parts: int,
    buffer_chars: int,
  ):
    self.partial, self.whole = partial, False
    self._tokenizer, self._bounds, self._limit = tokenizer, bounds, limit
    shutil.rmtree(partial, ignore_errors=True)  # what a crash left
    partial.mkdir()
    self._splits = {
      name: [_Part(partial / f"{name}.{i}", tokenizer, buffer_chars) for i in range(num_parts)]
      for name in documents.SPLITS
    }
    self._empty = dict.fromkeys(documents.SPLITS, 0)
    self._cut = False
    self._lowest, self._highest, self._second = 2**64, -1, -1  # of the digests of documents without a split

  def add(self, document: documents.Document, encoded: bytes, digest: int, part: int) -> None:
    """Takes a document in, as one of the part of that number."""
    if not document.text.strip():
      self._empty[document.split or "train"] += 1
      return
    if not document.split:
      self._lowest = min(self._lowest, digest)
      if digest > self._highest:
        self._highest, self._second = digest, self._highest
      elif self._second < digest < self._highest:
        self._second = digest
    split = document.split or self._bounds.split_of(digest)
    if split == "train" and self._limit:
      if self._limit.begins_with(digest) and not self._cut:
        self._cut = True
        text = encoded[: self._limit.max_bytes].decode(errors="ignore")
        document, encoded = document._replace(text=text), text.encode()
      elif not self._limit.takes(digest):
        return
    self._splits[split][part].add(document, len(encoded), digest)

  def finish(self, origin: str, remedy: str, final: Path) -> documents.SplitBounds:
    """Puts the text in place, or says with which bounds it has to be made again, because a split is empty.

    Where that would not help, the error says what is wrong with the documents of `origin`, and the `remedy`.
    """
    blank = [name for name, parts in self._splits.items() if not any(part.documents for part in parts)]
    if blank:
      again = documents.SplitBounds(self._second, self._highest)
      if self._highest < 0 or again == self._bounds:  # the source's own splits, or nothing at all
        checks.fail("data", origin, f"at least one document that is not empty in the {blank[0]} split", remedy)
      checks.require(self._lowest < self._second, "data", origin, "at least 3 distinct documents to split", remedy)
      return again
    digest = hashlib.sha256(self._tokenizer.name.encode())
    counts = {}
    for name, parts in self._splits.items():
      for part in parts:
        part.flush()
        digest.update(f"\n{name} {part.tokens} {part.digest.hexdigest()}".encode())
      counts[name] = _merge(self.partial / name, parts, self._empty[name])
    lossless = all(part.lossless for parts in self._splits.values() for part in parts)
    splits = {name: count._asdict() for name, count in counts.items()}
    meta = {"digest": digest.hexdigest()[:16], "lossless": lossless, "splits": splits}
    write_synced(self.partial / "meta.json", json.dumps(meta, indent=2).encode())
    shutil.rmtree(final, ignore_errors=True)  # a text that is there was found damaged
    self.partial.rename(final)
    self.whole = True
    return self._bounds


class _Part:
  """A part of a split. Its files are open only while something is appended: there may be very many parts."""

  def __init__(self, base: Path, tokenizer: Tokenizer, buffer_chars: int):
    self.paths = {kind: base.with_name(f"{base.name}.{kind}") for kind in KINDS}
    self.documents = self.text_bytes = self.tokens = self.replaced = 0
    self.digest = hashlib.sha256()
    self.lossless = True
    self._tokenizer, self._buffer_chars = tokenizer, buffer_chars
    self._texts: list[str] = []
    self._hashes: list[int] = []
    self._buffered = 0
    for path in self.paths.values():
      path.touch()

  def add(self, document: documents.Document, size: int, digest: int) -> None:
    self._texts.append(document.text)
    self._hashes.append(digest)
    self.documents += 1
    self.text_bytes += size
    self.replaced += document.replaced
    self._buffered += len(document.text)
    if self._buffered >= self._buffer_chars:
      self.flush()

  def flush(self) -> None:
    if not self._texts:
      return
    tokens, starts = self._tokenizer.pack(self._texts)
    if not self.tokens:
      self.lossless = all(gives_back(self._tokenizer, text[:10_000]) for text in self._texts[:16])
    hashes = np.array(self._hashes, np.uint64)
    arrays = {"tokens": tokens, "documents": (self.tokens + starts).astype(np.uint64), "hashes": hashes}
    for kind, array in arrays.items():
      with self.paths[kind].open("ab") as file:
        file.write(array.data)
    self.digest.update(tokens.data)
    self.tokens += len(tokens)
    self._texts, self._hashes, self._buffered = [], [], 0


def gives_back(tokenizer: Tokenizer, text: str) -> bool:
  """Whether a text survives being encoded, but for white space."""
  return "".join(tokenizer.decode(tokenizer.encode(text)).split()) == "".join(text.split())


def _merge(base: Path, parts: Sequence[_Part], empty: int) -> Counts:
  """Puts the parts' files, one after the other, in the place of the split's."""
  for kind in KINDS:
    target, first = base.with_name(f"{base.name}.{kind}"), parts[0].paths[kind]
    first.rename(target)
    with target.open("ab") as file:
      before = parts[0].tokens
      for part in parts[1:]:
        if kind == "documents":
          shift = np.uint64(before)
          with part.paths[kind].open("rb") as places:
            while block := places.read(1 << 20):
              file.write((np.frombuffer(block, np.uint64) + shift).data)
          before += part.tokens
        else:
          with part.paths[kind].open("rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
        part.paths[kind].unlink()
      file.flush()
      os.fsync(file.fileno())
  hashes = np.memmap(base.with_name(f"{base.name}.hashes"), np.uint64, "r+")  # on disk: there may be very many
  hashes.sort()
  hashes.flush()
  total = {name: sum(getattr(part, name) for part in parts) for name in Counts._fields if name != "empty"}
  return Counts(**total, empty=empty)


def write_synced(path: Path, content: bytes) -> None:
  """Writes a file that is on disk when this returns."""
  with path.open("wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
