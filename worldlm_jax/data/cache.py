"""Tokenised texts on disk: made once for each content, tokenizer and way of choosing documents.

  CACHE/<key>/{train,valid,test}.tokens      uint16 or uint32, a separator before each document
  CACHE/<key>/{train,valid,test}.documents   uint64, where each document's separator stands
  CACHE/<key>/{train,valid,test}.hashes      uint64, sorted: the digests of the documents
  CACHE/<key>/meta.json                      counts; written last
  CACHE/<key>/compressor.json                see compression.py; added at the first need

The files are memory-mapped, so that a text of any size takes no memory to speak of. A text is made in
`<key>.partial` under a lock and renamed when it is whole: a crash half-way leaves nothing that looks
finished, and a second process waits for the first.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np

from worldlm_jax import checks, config
from worldlm_jax.data import documents, reading, sources, writing
from worldlm_jax.data.tokenizer import Tokenizer, token_dtype

VERSION = 1  # of the files' layout, and of how documents are split and tokenised
BUFFER_CHARS = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
  """One split of a tokenised text. The arrays are memory-mapped."""

  tokens: np.ndarray  # uint16 or uint32 [tokens]
  starts: np.ndarray  # uint64 [documents]: the place of each document's separator
  hashes: np.ndarray  # uint64 [documents], sorted
  counts: writing.Counts


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
  """A tokenised text. `digest` changes with any token of any split and with the tokenizer."""

  splits: dict[str, Split]
  digest: str  # 16 hex digits
  lossless: bool  # whether the tokenizer gives the text back, as far as that was tried
  place: Path  # the folder of its files


def folder(data: config.DataConfig) -> Path:
  """Where tokenised texts are kept."""
  if data.cache:
    return Path(data.cache).expanduser()
  return user_folder()


def user_folder() -> Path:
  """Where this package keeps what it can make again, unless it is told otherwise."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "worldlm_jax"


def load(
  nodes: Sequence[tuple[str, config.Source]], data: config.DataConfig, tokenizer: Tokenizer,
  report: Callable[[str], None], max_train_bytes: Mapping[str, int] | None = None,
) -> dict[str, Text]:
  """The tokenised text of each (path, source), by path; made where the cache does not hold it.

  Nodes that choose among the documents of the same base are made in one pass over it, others side by
  side. `report` is told what is being made. `max_train_bytes` has the limits of the nodes that have one,
  by path (0: none).

  Raises:
    ValueError: a source cannot be read, or has too few documents, or the cache is no folder; names the node.
    OSError: the cache cannot be written.
  """
  limits = max_train_bytes or {}
  wanted = [_Wanted(path, source, tuple(sources.choices(source)), limits.get(path, 0)) for path, source in nodes]
  opened = _open_bases(wanted, data.invalid_utf8)
  fingerprints = {name: corpus.fingerprint for name, corpus in opened.items()}
  keys = {w.path: _key(w, fingerprints, data, tokenizer) for w in wanted}
  root = folder(data)
  _allow_open_files(12 * len(nodes) + 256)
  first = {keys[w.path]: w for w in reversed(wanted)}  # the same text may lie at several nodes
  missing = [w for key, w in first.items() if _read(root / key, tokenizer) is None]
  if missing:
    making = _Making(root, opened, keys, data, tokenizer, report)
    with _explained(root):
      root.mkdir(parents=True, exist_ok=True)
      making.all(_groups(missing))
  return {path: _present(root / key, tokenizer) for path, key in keys.items()}


@contextlib.contextmanager
def _explained(root: Path) -> Iterator[None]:
  """Errors of the file system say that it is the cache which cannot be written."""
  try:
    yield
  except OSError as error:
    why = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
      message = f"no space left for the tokenised texts in {root}: free some, or set config.data.cache to another disk"
      raise OSError(errno.ENOSPC, message) from error
    reading.fail_from(error, "config.data.cache", str(root), f"a folder that can be written to ({why})",
                      "set it to another folder")


def _allow_open_files(count: int) -> None:
  """A mapped file counts as an open one; systems allow many more than they do by default, if asked."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != resource.RLIM_INFINITY and soft < count:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count if hard == resource.RLIM_INFINITY else min(count, hard), hard))


class _Wanted(NamedTuple):
  path: str
  source: config.Source
  choices: tuple[sources.Choice, ...]
  max_train_bytes: int


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


def _key(w: _Wanted, fingerprints: Mapping[str, str], data: config.DataConfig, tokenizer: Tokenizer) -> str:
  what = [VERSION, tokenizer.name, w.max_train_bytes, data.invalid_utf8, sources.identity(w.source, fingerprints)]
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


class _Stopped(Exception):
  """Another group has failed."""


class _Making:
  """The texts that are made by one call of `load`."""

  def __init__(
    self, root: Path, opened: Mapping[str, documents.Corpus], keys: Mapping[str, str], data: config.DataConfig,
    tokenizer: Tokenizer, report: Callable[[str], None],
  ):
    self.root, self.opened, self.keys, self.data, self.tokenizer = root, opened, keys, data, tokenizer
    self._report, self._reporting, self._stop = report, threading.Lock(), threading.Event()

  def all(self, groups: Sequence[Sequence[_Wanted]]) -> None:
    """Makes the groups side by side; where one fails, the others stop."""
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      made = [pool.submit(self.group, group) for group in groups]
      try:
        futures.wait(made, return_when=futures.FIRST_EXCEPTION)
      finally:
        if not all(future.done() and future.exception() is None for future in made):
          self._stop.set()
        pool.shutdown(cancel_futures=True)
    failures = [error for future in made if not future.cancelled() and (error := future.exception()) is not None]
    for error in failures:
      if not isinstance(error, _Stopped):
        raise error

  def group(self, group: Sequence[_Wanted]) -> None:
    """Makes the texts of a group, but for those that another process has made meanwhile."""
    with contextlib.ExitStack() as stack:
      for key in sorted({self.keys[w.path] for w in group}):  # in one order, so that no two wait in a circle
        stack.enter_context(self._locked(key))
      left = [w for w in group if _read(self.root / self.keys[w.path], self.tokenizer) is None]
      if left:
        self.say(f"tokenising {_listed(left)}")
      try:
        # A small text may leave a split empty; it is read again, with its last two documents as valid and test.
        bounds = {w.path: documents.SplitBounds() for w in left}
        while left:
          writers = self._write(left, bounds)
          left = [w for w in left if not writers[w.path].whole]
      finally:
        for w in left:
          shutil.rmtree(self._partial(w), ignore_errors=True)

  def say(self, line: str) -> None:
    """Reports a line; one thread at a time."""
    with self._reporting:
      self._report(line)

  @contextlib.contextmanager
  def _locked(self, key: str) -> Iterator[None]:
    lock = filelock.FileLock(self.root / f"{key}.lock")
    try:
      lock.acquire(timeout=2)
    except filelock.Timeout:
      self.say(f"waiting for another process that makes {self.root / key}")
      lock.acquire()
    try:
      yield
    finally:
      lock.release()

  def _partial(self, w: _Wanted) -> Path:
    return self.root / f"{self.keys[w.path]}.partial"

  def _write(self, left: Sequence[_Wanted], bounds: dict[str, documents.SplitBounds]) -> dict[str, writing.Writer]:
    """One pass over the bases, or two where a limit has to see everything first. Changes `bounds` for another try."""
    limited = [w for w in left if w.max_train_bytes]
    limits = {w.path: writing.TrainLimit(w.max_train_bytes, bounds[w.path]) for w in limited}
    self._read_bases(limited, limits)
    num_parts = sum(len(w.choices) for w in left)
    writers = {
      w.path: writing.Writer(self._partial(w), self.tokenizer, bounds[w.path], limits.get(w.path), len(w.choices),
                             max(BUFFER_CHARS // 64, min(BUFFER_CHARS, 16 * BUFFER_CHARS // num_parts)))
      for w in left
    }
    self._read_bases(left, writers)
    self._check_unchanged(left)
    for w in left:
      with _naming(w.path):
        origin = self.opened[sources.name(w.choices[0].base)].origin
        final = self.root / self.keys[w.path]
        bounds[w.path] = writers[w.path].finish(origin, sources.remedy(w.source), final)
    return writers

  def _read_bases(
    self, wanted: Sequence[_Wanted], takers: Mapping[str, writing.Writer] | Mapping[str, writing.TrainLimit]
  ) -> None:
    """One pass over each base. Every choice of a node is a part of its text, so the order of the bases is the same."""
    choices: dict[str, list[tuple[str, int, sources.Choice]]] = collections.defaultdict(list)
    for w in wanted:
      for part, choice in enumerate(w.choices):
        choices[sources.name(choice.base)].append((w.path, part, choice))
    for name, here in choices.items():
      with _naming(here[0][0]):
        for document in self.opened[name].documents():
          if self._stop.is_set():
            raise _Stopped
          encoded = document.text.encode()
          digest = documents.digest(encoded)
          for path, part, choice in here:
            if choice.accepts(document, digest):
              takers[path].add(document, encoded, digest, part)

  def _check_unchanged(self, wanted: Sequence[_Wanted]) -> None:
    """What was read must be what the key was made of."""
    bases = {sources.name(c.base): (w.path, c.base) for w in wanted for c in w.choices}
    for name, (path, base) in bases.items():
      if isinstance(base, config.Files | config.Tfds):
        before = self.opened[name]
        with _naming(path):
          now = sources.open_base(base, self.data.invalid_utf8).fingerprint
          checks.require(now == before.fingerprint, "data", before.origin, "a text that stays as it is while it is "
                         "read, but it has changed", "start again once nothing writes to it")


def _listed(wanted: Sequence[_Wanted]) -> str:
  names = ", ".join(w.path for w in wanted[:4])
  return names + (f" and {len(wanted) - 4} more" if len(wanted) > 4 else "")


def _read(place: Path, tokenizer: Tokenizer) -> Text | None:
  """The text at `place`, or None where there is none or its files have not the length they should have."""
  try:
    meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
    splits = {}
    for name in documents.SPLITS:
      counts = writing.Counts(**meta["splits"][name])
      types = {kind: token_dtype(tokenizer) if kind == "tokens" else np.dtype(np.uint64) for kind in writing.KINDS}
      arrays = {kind: np.memmap(place / f"{name}.{kind}", dtype, "r") for kind, dtype in types.items()}
      lengths = {"tokens": counts.tokens, "documents": counts.documents, "hashes": counts.documents}
      if any(len(array) != lengths[kind] for kind, array in arrays.items()):
        return None
      splits[name] = Split(arrays["tokens"], arrays["documents"], arrays["hashes"], counts)
    return Text(splits, meta["digest"], meta["lossless"], place)
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
  with contextlib.suppress(OSError, ValueError):
    return checks.read_json(record)
  found = sorted({document.tag for document in corpus.documents()})
  with _explained(record.parent):
    record.parent.mkdir(parents=True, exist_ok=True)
    partial = record.with_suffix(f".{os.getpid()}")
    writing.write_synced(partial, json.dumps(found).encode())
    partial.replace(record)
  return found
