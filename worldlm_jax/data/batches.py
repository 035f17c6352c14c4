"""What training reads: the text of each node as windows, and its batches by step.

Shape suffixes: S steps, B windows per batch, L predicted tokens per window.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import grain
import numpy as np

from worldlm_jax import checks, config, rngs
from worldlm_jax.data import sources
from worldlm_jax.data.documents import SPLITS, first_bytes, num_bytes
from worldlm_jax.data.tokenizer import Tokenizer
from worldlm_jax.data.windows import Windows, pack


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


@dataclasses.dataclass(frozen=True, slots=True)
class NodeText:
  """The text of one node, packed. `digest` changes with any token of any split and with the tokenizer."""

  path: str
  train: Windows
  valid: Windows
  test: Windows
  text_bytes: dict[str, int]  # by split: UTF-8 bytes of the documents, without separators
  digest: str  # 16 hex digits

  @property
  def bytes_per_token(self) -> dict[str, float]:
    """By split: what turns nats per token into nats per byte. Separators count as tokens of no bytes."""
    return {name: size / len(getattr(self, name).tokens) for name, size in self.text_bytes.items()}


def load_node(path: str, source: config.Source, data: config.DataConfig, tokenizer: Tokenizer) -> NodeText:
  """Reads, cuts to `data.max_train_bytes` and packs the text of the node at `path`.

  Raises:
    ValueError: the text cannot be read, or a split is too short for one window; names the node.
  """
  try:
    documents = sources.read(source)
  except checks.InputError as error:
    raise checks.InputError(f"{path}: {error}") from error
  texts = {name: getattr(documents, name) for name in SPLITS}
  texts["train"] = first_bytes(texts["train"], data.max_train_bytes)
  digest = hashlib.sha256(tokenizer.name.encode())
  windows = {}
  for name, text in texts.items():
    tokens = pack(text, tokenizer)
    checks.require(len(tokens) > data.sequence_length, f"{path}: config.data.sequence_length", data.sequence_length,
                   f"at most {len(tokens) - 1}, because {documents.origins[name]} has {len(tokens)} tokens and one "
                   f"window takes {data.sequence_length + 1}", "set a shorter config.data.sequence_length, or use more "
                   "text" + (" (config.data.max_train_bytes)" if name == "train" and data.max_train_bytes else ""))
    digest.update(f"\n{name} {len(tokens)}\n".encode() + tokens.astype("<u4").tobytes())
    windows[name] = Windows(tokens, data.sequence_length)
  text_bytes = {name: num_bytes(text) for name, text in texts.items()}
  return NodeText(path, **windows, text_bytes=text_bytes, digest=digest.hexdigest()[:16])


def load(
  nodes: Sequence[tuple[str, config.Source]], data: config.DataConfig, tokenizer: Tokenizer
) -> dict[str, NodeText]:
  """The text of each (path, source), by path. Raises as `load_node` does."""
  return {path: load_node(path, source, data, tokenizer) for path, source in nodes}
