"""Batches drawn as the accounting of DP-SGD has it: every example for each step by itself.

Shape suffixes: S steps, B places per batch, L predicted tokens per window.
"""

import hashlib
import math

import numpy as np

from worldlm_jax import checks
from worldlm_jax.data.windows import PADDING, Windows


def places(batch_size: int) -> int:
  """How many examples a step has at most where `batch_size` is their average: 16 of 4, 57 of 32.

  About one step in ten thousand has more; then a random subset of them is taken, as the accounting knows.
  """
  return batch_size + math.ceil(4 * math.sqrt(batch_size)) + 4


def num_examples(windows: Windows) -> int:
  """How many examples there are: windows, or documents where no window runs on across them."""
  return len(windows) if windows.starts is None else len(windows.by_document()[0])


class PoissonBatches:
  """The endless batches of one node, of as many examples as turn up and padding in the other places.

  An example is a window or, where no window runs on across documents, a document, of which a random window is taken.
  A batch depends on (windows, batch_size, seed, path, step) alone, as that of `batches.NodeBatches`.
  """

  def __init__(self, windows: Windows, batch_size: int, seed: int, path: str):
    self._windows, self._first, self._count = windows, np.arange(len(windows)), np.ones(len(windows), np.int64)
    if windows.starts is not None:
      self._first, self._count = windows.by_document()
    self._number, self._name = num_examples(windows), f"{seed}\x1f{path}\x1fpoisson"
    checks.require(self._number >= batch_size, f"{path}: batch_size", batch_size,
                   f"at most the {self._number} examples that the node has",
                   "give it more text, or a smaller batch_size")
    self._rate, self._places = batch_size / self._number, places(batch_size)

  def batch(self, step: int) -> np.ndarray:
    """The batch of a step, counted from 0 over the node's whole life: int32 [B, L+1]."""
    seed = hashlib.sha256(f"{self._name}\x1f{step}".encode()).digest()
    draw = np.random.default_rng(int.from_bytes(seed, "big"))
    chosen = np.flatnonzero(draw.random(self._number) < self._rate)
    chosen = draw.permutation(chosen)[: self._places]
    batch_BxL = np.full((self._places, self._windows.length + 1), PADDING, np.int32)
    for place, example in enumerate(chosen):
      batch_BxL[place] = self._windows[int(self._first[example] + draw.integers(self._count[example]))]
    return batch_BxL

  def batches(self, start: int, count: int) -> np.ndarray:
    """The batches of steps `start` to `start + count - 1`: int32 [S, B, L+1]."""
    return np.stack([self.batch(start + i) for i in range(count)])
