"""What training reads: the text of each node as windows, and its batches by step.

Shape suffixes: S steps, B windows per batch, L predicted tokens per window.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np

from worldlm_jax import checks, config, rngs
from worldlm_jax.data import cache
from worldlm_jax.data.tokenizer import Tokenizer
from worldlm_jax.data.windows import PADDING, Windows


class NodeBatches:
  """The endless batches of one node: each epoch goes through every window once, in an order of its own.

  A batch depends on (windows, batch_size, seed, path, step) alone, so there is no state to checkpoint
  and no node's batches depend on another node. Batches run on from one epoch into the next.
  """

  def __init__(self, windows: Windows, batch_size: int, seed: int, path: str):
    checks.require(len(windows) > 0, f"{path}: windows", len(windows), "at least one", "give the node more text")
    # Grain draws each epoch's order from this seed and the epoch's number. Its shuffle takes longer the fewer
    # windows there are (7 ms an index for 3 windows, 0.05 ms for 1000), which matters for toy data only.
    shuffled = grain.MapDataset.source(windows).seed(rngs.stable_int(seed, path, "shuffle")).shuffle()
    self._dataset = shuffled.repeat().batch(batch_size)
    self._shape = (batch_size, windows.length + 1)

  def batch(self, step: int) -> np.ndarray:
    """The batch of a step, counted from 0 over the node's whole life: int32 [B, L+1]."""
    return self._dataset[step]

  def batches(self, start: int, count: int) -> np.ndarray:
    """The batches of steps `start` to `start + count - 1`: int32 [S, B, L+1]."""
    batches_SxBxL = np.empty((count, *self._shape), np.int32)
    for i in range(count):
      batches_SxBxL[i] = self.batch(start + i)
    return batches_SxBxL


class PooledBatches:
  """The batches of several nodes, round by round, mixed evenly into batches of one size.

  Round r holds the very windows that the nodes take in round r; where they do not fill the last batch, it ends in
  windows of padding.
  """

  def __init__(self, parts: Sequence[tuple[NodeBatches, int]], batch_size: int):
    """`parts`: each node's batches and its steps per round."""
    self._parts, self._batch_size = parts, batch_size

  def round(self, index: int) -> np.ndarray:
    """The batches of a round: int32 [S, B, L+1]."""
    rows, places = [], []
    for part, steps in self._parts:
      windows = part.batches(index * steps, steps)
      rows.append(windows.reshape(-1, windows.shape[-1]))
      places.append((np.arange(len(rows[-1])) + 0.5) / max(1, len(rows[-1])))
    mixed = np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]
    missing = -len(mixed) % self._batch_size
    mixed = np.pad(mixed, [(0, missing), (0, 0)], constant_values=PADDING)
    return mixed.reshape(-1, self._batch_size, mixed.shape[-1])

  def batches(self, start: int, count: int) -> np.ndarray:
    """The batches of a whole round of `count` steps, the first of which is step `start`: int32 [S, B, L+1]."""
    assert start % count == 0, (start, count)
    found = self.round(start // count)
    assert len(found) == count, (len(found), count)
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class NodeText:
  """The text of one node as windows. `digest` changes with any token of any split and with the tokenizer."""

  path: str
  train: Windows
  valid: Windows
  test: Windows
  text: cache.Text

  @property
  def digest(self) -> str:
    """16 hex digits."""
    return self.text.digest

  def bytes_per_token(self, split: str) -> float:
    """What turns nats per token into nats per byte. Separators count as tokens of no bytes.

    NaN where the tokenizer loses some of the text, since a model need not know what is lost.
    """
    counts = self.text.splits[split].counts
    return counts.text_bytes / counts.tokens if self.text.lossless else math.nan


def load(
  nodes: Sequence[tuple[str, config.Source]], data: config.DataConfig, tokenizer: Tokenizer,
  report: Callable[[str], None] = lambda line: None, max_train_bytes: Mapping[str, int] | None = None,
) -> dict[str, NodeText]:
  """The text of each (path, source), by path.

  `report` is told what is being tokenised; `max_train_bytes` has the limits of the nodes that have one.

  Raises:
    ValueError: a text cannot be read, or a split is too short for one window; names the node.
  """
  limits = max_train_bytes or {}
  texts = cache.load(nodes, data, tokenizer, report, limits)
  return {path: _node_text(path, text, data, bool(limits.get(path))) for path, text in texts.items()}


def _node_text(path: str, text: cache.Text, data: config.DataConfig, limited: bool) -> NodeText:
  for name, split in text.splits.items():
    if data.packing == "stream":
      checks.require(split.counts.tokens > data.sequence_length, f"{path}: config.data.sequence_length",
                     data.sequence_length, f"at most {split.counts.tokens - 1}, because the {name} split has "
                     f"{split.counts.tokens} tokens and one window takes {data.sequence_length + 1}",
                     "set a shorter config.data.sequence_length, or use more text"
                     + (f" (--node={path}.max_train_bytes=...)" if name == "train" and limited else ""))
  windows = {
    name: Windows(split.tokens, data.sequence_length, split.starts if data.packing == "documents" else None)
    for name, split in text.splits.items()
  }
  return NodeText(path, **windows, text=text)
