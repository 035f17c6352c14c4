"""Tokenised texts on disk: made once for each content, tokenizer and way of choosing documents.

  CACHE/<key>/{train,valid,test}.tokens      uint16 or uint32, a separator before each document
  CACHE/<key>/{train,valid,test}.documents   uint64, where each document's separator stands
  CACHE/<key>/{train,valid,test}.hashes      uint64, sorted: the digests of the documents
  CACHE/<key>/meta.json                      counts; written last

The files are memory-mapped, so that a text of any size takes no memory to speak of. A text is made in
`<key>.partial` under a lock and renamed when it is whole: a crash half-way leaves nothing that looks
finished, and a second process waits for the first.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np

from worldlm_jax import checks, config
from worldlm_jax.data import documents, sources
from worldlm_jax.data.tokenizer import Tokenizer, token_dtype

VERSION = 1  # of the files' layout, and of how documents are split and tokenised
BUFFER_CHARS = 1 << 20
_KINDS = ("tokens", "documents", "hashes")


class Counts(NamedTuple):
  """What a split holds. Empty documents are left out before anything is counted."""

  documents: int = 0
  text_bytes: int = 0  # UTF-8, without separators
  tokens: int = 0  # with a separator for each document
  replaced: int = 0  # invalid byte sequences that became replacement characters
  empty: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
  """One split of a tokenised text. The arrays are memory-mapped."""

  tokens: np.ndarray  # uint16 or uint32 [tokens]
  starts: np.ndarray  # uint64 [documents]: the place of each document's separator
  hashes: np.ndarray  # uint64 [documents], sorted
  counts: Counts


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
  """A tokenised text. `digest` changes with any token of any split and with the tokenizer."""

  splits: dict[str, Split]
  digest: str  # 16 hex digits


def folder(data: config.DataConfig) -> Path:
  """Where tokenised texts are kept."""
  if data.cache:
    return Path(data.cache).expanduser()
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "worldlm_jax"


def load(
  nodes: Sequence[tuple[str, config.Source]], data: config.DataConfig, tokenizer: Tokenizer,
  report: Callable[[str], None],
) -> dict[str, Text]:
  """The tokenised text of each (path, source), by path; made where the cache does not hold it.

  Nodes that choose among the documents of the same base are made in one pass over it, others side by
  side. `report` is told what is being made.

  Raises:
    ValueError: a source cannot be read, or has too few documents; names the node.
    OSError: the cache cannot be written.
  """
  wanted = [_Wanted(path, source, tuple(sources.choices(source))) for path, source in nodes]
  opened = _open_bases(wanted, data.invalid_utf8)
  fingerprints = {name: corpus.fingerprint for name, corpus in opened.items()}
  keys = {w.path: _key(w.source, fingerprints, data, tokenizer) for w in wanted}
  root = folder(data)
  first = {keys[w.path]: w for w in reversed(wanted)}  # the same text may lie at several nodes
  missing = [w for key, w in first.items() if _read(root / key, tokenizer) is None]
  if missing:
    root.mkdir(parents=True, exist_ok=True)
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      made = [pool.submit(_make, group, opened, keys, data, tokenizer, report) for group in _groups(missing)]
      for future in made:
        future.result()
  return {path: _present(root / key, tokenizer) for path, key in keys.items()}


class _Wanted(NamedTuple):
  path: str
  source: config.Source
  choices: tuple[sources.Choice, ...]


def _open_bases(wanted: Sequence[_Wanted], invalid_utf8: str) -> dict[str, documents.Corpus]:
  """Each distinct base once, several at a time; an error names the first node that needs the base."""
  bases = {sources.name(c.base): (w.path, c.base) for w in reversed(wanted) for c in reversed(w.choices)}
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    opening = {name: pool.submit(sources.open_base, base, invalid_utf8) for name, (_, base) in bases.items()}
  opened = {}
  for name in reversed(opening):
    with _naming(bases[name][0]):
      opened[name] = opening[name].result()
  return opened


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
  try:
    yield
  except checks.InputError as error:
    raise checks.InputError(f"{path}: {error}") from error


def _key(source: config.Source, fingerprints: Mapping[str, str], data: config.DataConfig, tokenizer: Tokenizer) -> str:
  what = [VERSION, tokenizer.name, data.max_train_bytes, data.invalid_utf8, sources.identity(source, fingerprints)]
  return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _groups(missing: Sequence[_Wanted]) -> list[list[_Wanted]]:
  """Nodes that share a base, directly or through others, together."""
  groups: list[tuple[set[str], list[_Wanted]]] = []
  for w in missing:
    bases = {sources.name(c.base) for c in w.choices}
    touched = [group for group in groups if group[0] & bases]
    groups = [group for group in groups if not group[0] & bases]
    groups.append((bases.union(*(group[0] for group in touched)), [*(m for group in touched for m in group[1]), w]))
  return [members for _, members in groups]


def _make(
  group: Sequence[_Wanted], opened: Mapping[str, documents.Corpus], keys: Mapping[str, str], data: config.DataConfig,
  tokenizer: Tokenizer, report: Callable[[str], None],
) -> None:
  """Makes the texts of a group, but for those that another process has made meanwhile."""
  root = folder(data)
  with contextlib.ExitStack() as stack:
    for key in sorted({keys[w.path] for w in group}):  # in the same order everywhere, so that nobody waits in a circle
      stack.enter_context(filelock.FileLock(root / f"{key}.lock"))
    left = [w for w in group if _read(root / keys[w.path], tokenizer) is None]
    # A small text may leave a split empty; it is read again, with its last two documents as valid and test.
    bounds = {w.path: documents.SplitBounds() for w in left}
    while left:
      report(f"tokenising {', '.join(w.path for w in left[:4])}{f' and {len(left) - 4} more' * (len(left) > 4)}")
      with contextlib.ExitStack() as open_files:
        writers = {}
        for w in left:
          writer = _Writer(root / f"{keys[w.path]}.partial", data.max_train_bytes, bounds[w.path], tokenizer)
          writers[w.path] = open_files.enter_context(contextlib.closing(writer))
        _read_bases(left, opened, writers)
        for w in left:
          with _naming(w.path):
            origin = opened[sources.name(w.choices[0].base)].origin
            bounds[w.path] = writers[w.path].finish(origin, root / keys[w.path])
      left = [w for w in left if not writers[w.path].whole]


def _read_bases(
  wanted: Sequence[_Wanted], opened: Mapping[str, documents.Corpus], writers: Mapping[str, "_Writer"]
) -> None:
  """One pass over each base, in the order of their fingerprints: the same for a node whoever else is there."""
  takers: dict[str, list[tuple[str, Callable[[documents.Document], bool]]]] = collections.defaultdict(list)
  for w in wanted:
    for choice in w.choices:
      takers[sources.name(choice.base)].append((w.path, choice.accepts))
  for name in sorted(takers, key=lambda name: opened[name].fingerprint):
    here = takers[name]
    with _naming(here[0][0]):
      for document in opened[name].documents():
        for path, accepts in here:
          if accepts(document):
            writers[path].add(document)


class _Writer:
  """Writes one text; `whole` once it is finished and in place."""

  def __init__(self, partial: Path, max_train_bytes: int, bounds: documents.SplitBounds, tokenizer: Tokenizer):
    self.partial, self.bounds, self.whole = partial, bounds, False
    self._tokenizer = tokenizer
    shutil.rmtree(partial, ignore_errors=True)  # what a crash left
    partial.mkdir()
    self._splits = {
      name: _SplitWriter(partial, name, tokenizer, max_train_bytes if name == "train" else 0)
      for name in documents.SPLITS
    }
    self._lowest, self._highest, self._second = 2**64, -1, -1  # of the digests of documents without a split

  def add(self, document: documents.Document) -> None:
    """Takes a document in."""
    if not document.text.strip():
      self._splits[document.split or "train"].empty += 1
      return
    encoded = document.text.encode()
    digest = documents.digest(encoded)
    if not document.split:
      self._lowest = min(self._lowest, digest)
      if digest > self._highest:
        self._highest, self._second = digest, self._highest
      elif self._second < digest < self._highest:
        self._second = digest
    self._splits[document.split or self.bounds.split_of(digest)].add(document, encoded, digest)

  def finish(self, origin: str, final: Path) -> documents.SplitBounds:
    """Puts the text in place, or says with which bounds it has to be made again, because a split is empty."""
    counts = {name: split.finish() for name, split in self._splits.items()}
    blank = [name for name, count in counts.items() if not count.documents]
    if blank:
      shutil.rmtree(self.partial)
      again = documents.SplitBounds(self._second, self._highest)
      if self._highest < 0 or again == self.bounds:  # the source's own splits, or nothing at all
        checks.fail("data", origin, f"at least one document that is not empty in the {blank[0]} split",
                    "put text into it, or leave the splitting to worldlm_jax")
      checks.require(self._lowest < self._second, "data", origin, "at least 3 distinct documents to split",
                     "separate the documents of a .txt file by blank lines, or split them yourself")
      return again
    digest = hashlib.sha256(self._tokenizer.name.encode())
    for name, split in self._splits.items():
      digest.update(f"\n{name} {counts[name].tokens} {split.digest.hexdigest()}".encode())
    meta = {"digest": digest.hexdigest()[:16], "splits": {name: count._asdict() for name, count in counts.items()}}
    _write_synced(self.partial / "meta.json", json.dumps(meta, indent=2).encode())
    shutil.rmtree(final, ignore_errors=True)  # a text that is there was found damaged
    self.partial.rename(final)
    self.whole = True
    return self.bounds

  def close(self) -> None:
    """Lets go of the files; an unfinished text is left to the next who makes it."""
    for split in self._splits.values():
      split.close()


class _SplitWriter:
  def __init__(self, partial: Path, name: str, tokenizer: Tokenizer, max_bytes: int):
    self._paths = {kind: partial / f"{name}.{kind}" for kind in _KINDS}
    self._files = {kind: path.open("wb") for kind, path in self._paths.items()}
    self._tokenizer, self._max_bytes, self._full = tokenizer, max_bytes, False
    self._texts: list[str] = []
    self._hashes: list[int] = []
    self._buffered = 0
    self._documents = self._text_bytes = self._tokens = self._replaced = 0
    self.empty = 0
    self.digest = hashlib.sha256()

  def add(self, document: documents.Document, encoded: bytes, digest: int) -> None:
    """Takes a document in; beyond `max_bytes` it takes no more, but for a first one, which it cuts."""
    if self._full:
      return
    text, size = document.text, len(encoded)
    if self._max_bytes and self._text_bytes + size > self._max_bytes:
      self._full = True
      if self._documents:
        return
      text = encoded[: self._max_bytes].decode(errors="ignore")
      size = len(text.encode())
    self._texts.append(text)
    self._hashes.append(digest)
    self._documents += 1
    self._text_bytes += size
    self._replaced += document.replaced
    self._buffered += len(text)
    if self._buffered >= BUFFER_CHARS:
      self._flush()

  def _flush(self) -> None:
    tokens, starts = self._tokenizer.pack(self._texts)
    written = tokens.tobytes()
    self._files["tokens"].write(written)
    self.digest.update(written)
    self._files["documents"].write((self._tokens + starts).astype(np.uint64).tobytes())
    self._files["hashes"].write(np.array(self._hashes, np.uint64).tobytes())
    self._tokens += len(tokens)
    self._texts, self._hashes, self._buffered = [], [], 0

  def finish(self) -> Counts:
    """Writes what is left."""
    self._flush()
    for file in self._files.values():
      file.flush()
      os.fsync(file.fileno())
    self.close()
    if self._documents:
      hashes = np.memmap(self._paths["hashes"], np.uint64, "r+")  # sorted on disk: there may be very many
      hashes.sort()
      hashes.flush()
    return Counts(self._documents, self._text_bytes, self._tokens, self._replaced, self.empty)

  def close(self) -> None:
    for file in self._files.values():
      file.close()


def _write_synced(path: Path, content: bytes) -> None:
  with path.open("wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _read(place: Path, tokenizer: Tokenizer) -> Text | None:
  """The text at `place`, or None where there is none or its files have not the length they should have."""
  try:
    meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
    splits = {}
    for name in documents.SPLITS:
      counts = Counts(**meta["splits"][name])
      types = {kind: token_dtype(tokenizer) if kind == "tokens" else np.dtype(np.uint64) for kind in _KINDS}
      arrays = {kind: np.memmap(place / f"{name}.{kind}", dtype, "r") for kind, dtype in types.items()}
      lengths = {"tokens": counts.tokens, "documents": counts.documents, "hashes": counts.documents}
      if any(len(array) != lengths[kind] for kind, array in arrays.items()):
        return None
      splits[name] = Split(arrays["tokens"], arrays["documents"], arrays["hashes"], counts)
    return Text(splits, meta["digest"])
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _present(place: Path, tokenizer: Tokenizer) -> Text:
  text = _read(place, tokenizer)
  if text is None:
    raise OSError(f"{place} was made and is gone or damaged again: keep other programs away from the cache")
  return text


def tags(source: config.Files | config.Tfds | config.HuggingFace, data: config.DataConfig) -> list[str]:
  """The different values of a base's node_field, sorted; looked up once for each content."""
  corpus = sources.open_base(source, data.invalid_utf8)
  record = folder(data) / f"tags-{corpus.fingerprint[:32]}.json"
  if record.exists():
    return json.loads(record.read_text(encoding="utf-8"))
  found = sorted({document.tag for document in corpus.documents()})
  record.parent.mkdir(parents=True, exist_ok=True)
  partial = record.with_suffix(f".{os.getpid()}")
  _write_synced(partial, json.dumps(found).encode())
  partial.replace(record)
  return found
