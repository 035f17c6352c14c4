"""Documents packed into one stream of tokens, and the stream cut into windows.

Shape suffixes: W windows, L predicted tokens per window.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from worldlm_jax.data.tokenizer import Tokenizer


def pack(documents: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
  """The tokens of all documents, a separator before each: uint16 [tokens], or uint32 for large vocabularies."""
  dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
  separator = np.asarray([tokenizer.separator_id], dtype)
  pieces = [piece for text in documents for piece in (separator, tokenizer.encode(text).astype(dtype))]
  return np.concatenate([np.zeros(0, dtype), *pieces])


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Windows:
  """The windows of a stream of tokens: `length` predicted tokens each, one after the other.

  Window i is int32 [L+1]: inputs are its first L tokens, targets its last L. A window begins with the
  last target of the one before, so every token but the first is predicted exactly once, up to the
  tokens left over at the end.
  """

  tokens: np.ndarray  # [tokens]
  length: int

  def __len__(self) -> int:
    return max(0, len(self.tokens) - 1) // self.length

  def __getitem__(self, index: int) -> np.ndarray:
    if not 0 <= index < len(self):
      raise IndexError(f"window {index} of {len(self)}")
    start = index * self.length
    return self.tokens[start : start + self.length + 1].astype(np.int32)


def evenly_spaced(windows: Windows, count: int) -> np.ndarray:
  """The same `count` windows every time, spread over the whole stream: int32 [W, L+1]; 0 means all of them.

  W is `count`, or the number of windows where there are fewer.
  """
  total = len(windows)
  count = min(count or total, total)
  middles_W = (2 * np.arange(count) + 1) * total // (2 * max(count, 1))
  positions_WxL = middles_W[:, None] * windows.length + np.arange(windows.length + 1)
  return windows.tokens[positions_WxL].astype(np.int32)
