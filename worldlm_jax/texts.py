"""The texts of a federation: those that this process reads, and what it has to know of all the others.

A process reads the texts of the nodes that lie on its devices; where the root trains on everybody's text
(`algorithms/centralized.py`), whoever has the root reads all of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from worldlm_jax import distributed, fairness, partition, records
from worldlm_jax.config import Config
from worldlm_jax.data import batches, compression, duplicates
from worldlm_jax.data.evaluation import Evaluation
from worldlm_jax.data.tokenizer import Tokenizer
from worldlm_jax.federation import Federation


@dataclasses.dataclass(frozen=True)
class Texts:
  """Texts by path, parents before children. What is known of a text is the same in all processes."""

  federation: Federation
  here: dict[str, batches.NodeText]  # read by this process
  first: frozenset[str]  # the nodes for which this process is the first that has them: it counts for all
  digests: dict[str, str]
  bytes_per_token: dict[str, dict[str, float]]  # of valid and test
  held: dict[str, dict[str, Any]]  # what the texts hold; see `records.text_record`
  fairness: dict[str, str]  # what nodes are scored on; see `fairness.evaluation`
  duplicates: list[duplicates.Duplicates]

  @property
  def train_tokens(self) -> dict[str, int]:
    """How much text each node has to train on."""
    return {path: held["train"]["tokens"] for path, held in self.held.items()}

  def evaluations(self, split: str, count: int, sequence_length: int) -> list[Evaluation]:
    """Per level, `count` windows of each node's split (0: all), the same every time. Collective."""
    windows = [
      [getattr(self.here[m.path], split) if m.path in self.here else None for m in level]
      for level in self.federation.levels
    ]
    own = [Evaluation(level, count, sequence_length + 1) for level in windows]
    said = distributed.gather([[[*map(int, e.counts)], [*map(e.num_targets, range(len(e.windows)))]] for e in own])
    sizes = [np.max([process[level] for process in said], axis=0) for level in range(len(own))]
    return [
      dataclasses.replace(evaluation, elsewhere=[(int(c), int(t)) for c, t in zip(*size, strict=True)])
      for evaluation, size in zip(own, sizes, strict=True)
    ]


def load(
  config: Config, federation: Federation, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, say: Callable[[str], None]
) -> Texts:
  """Reads what this process has to read, and exchanges what has to be known. Collective.

  Raises:
    checks.InputError: a text, of whichever process, is not what it should be.
    OSError: the cache of tokenised texts cannot be written.
  """
  own = {
    m.identity for level in federation.levels
    for m, mine in zip(level, partition.own_nodes(len(level), mesh), strict=True) if mine
  }
  pooled = federation.root.pools if federation.root.path in own else ()
  members = [m for m in federation.members if not m.moved_from]
  sources = [(m.path, m.data) for m in members if m.path in own.union(pooled) and m.data is not None]
  limits = {m.path: m.settings.max_train_bytes for m in members}
  with distributed.agreed():
    here = batches.load(sources, config.data, tokenizer, say, limits)
    texts = {path: text.text for path, text in here.items()}
    compressed = compression.references(texts, tokenizer, say)
    data = {m.path: m.data for m in members if m.data is not None}
    facts = {
      path: {
        "digest": text.digest, "lossless": text.text.lossless,
        "bytes_per_token": {split: text.bytes_per_token(split) for split in ("valid", "test")},
        "held": records.text_record(text, data[path], compressed.get(path)),
        "fairness": fairness.evaluation({path: text}, config.evaluation.test_windows)[path],
      } for path, text in here.items()
    }
  said = distributed.gather([sorted(own), facts])
  others = set().union(*(nodes for nodes, _ in said[: jax.process_index()]))
  known = {m.path: next(f[m.path] for _, f in said if m.path in f) for m in members if m.data is not None}
  scored = [(path, split) for path in known for split in ("valid", "test")]
  hashes = distributed.gather_arrays({
    f"{path} {split}": texts[path].splits[split].hashes for path, split in scored if path in texts
  })
  found = duplicates.find(texts, {place: hashes[" ".join(place)] for place in scored})
  every = dict.fromkeys(tuple(one) for process in distributed.gather(found) for one in process)
  same = [duplicates.Duplicates(*one) for one in every]
  order = list(known)
  same.sort(key=lambda d: order.index(d.also_in_node))  # as a single process finds them; sorting is stable
  for line in duplicates.warnings(same):
    say(line)
  if lossy := [path for path, fact in known.items() if not fact["lossless"]]:
    say(f"warning: the tokenizer loses some of the text of {', '.join(lossy)}: no bits per byte there")
  # The same text, wherever its node is.
  with_text = [m for m in federation.members if m.data is not None]
  here = {m.path: here[m.identity] for m in with_text if m.identity in here}
  known = {m.path: known[m.identity] for m in with_text}
  digests, bytes_per_token, held, fair = (
    {path: fact[name] for path, fact in known.items()} for name in ("digest", "bytes_per_token", "held", "fairness")
  )
  return Texts(federation, here, frozenset(own - others), digests, bytes_per_token, held, fair, same)
