"""A stream of tokens cut into windows.

Shape suffixes: W windows, L predicted tokens per window.
"""

import dataclasses
from collections.abc import Sized

import numpy as np

PADDING = -1  # fills a window up; it is neither predicted nor looked at


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Windows:
  """The windows of a stream of tokens: `length` predicted tokens each.

  Window i is int32 [L+1]: inputs are its first L tokens, targets its last L. A window begins with the
  last target of the one before, so every token but the first is predicted exactly once, up to the
  tokens left over at the end.

  With `starts` (where each document's separator stands) no window runs on across documents: each document
  has windows of its own, the last of them filled up with `PADDING`, and the separator after a document
  is its last target.
  """

  tokens: np.ndarray  # [tokens]
  length: int
  starts: np.ndarray | None = None  # [documents]
  _ends: np.ndarray = dataclasses.field(init=False, repr=False)  # [documents]: windows up to and with each document

  def __post_init__(self) -> None:
    ends = np.zeros(0, np.int64)
    if self.starts is not None:
      targets = np.diff(np.append(np.asarray(self.starts, np.int64), len(self.tokens) - 1))
      ends = np.cumsum(-(-targets // self.length))
    object.__setattr__(self, "_ends", ends)

  def __len__(self) -> int:
    if self.starts is not None:
      return int(self._ends[-1]) if len(self._ends) else 0
    return max(0, len(self.tokens) - 1) // self.length

  def __getitem__(self, index: int) -> np.ndarray:
    if not 0 <= index < len(self):
      raise IndexError(f"window {index} of {len(self)}")
    if self.starts is None:
      start = index * self.length
      return self.tokens[start : start + self.length + 1].astype(np.int32)
    start, targets = self._within_document(index)
    window = np.full(self.length + 1, PADDING, np.int32)
    window[: targets + 1] = self.tokens[start : start + targets + 1]
    return window

  def num_targets(self, index: int) -> int:
    """How many tokens window `index` predicts."""
    return self.length if self.starts is None else self._within_document(index)[1]

  def by_document(self) -> tuple[np.ndarray, np.ndarray]:
    """For each document that has any, its first window and how many there are: int64 `[documents]`, twice."""
    first = np.concatenate([np.zeros(1, np.int64), self._ends[:-1]]) if len(self._ends) else self._ends
    count = self._ends - first
    return first[count > 0], count[count > 0]

  def _within_document(self, index: int) -> tuple[int, int]:
    """Where a window of one document begins, and how many tokens it predicts."""
    assert self.starts is not None
    document = int(np.searchsorted(self._ends, index, side="right"))
    before = int(self._ends[document - 1]) if document else 0
    start = int(self.starts[document]) + (index - before) * self.length
    last = int(self.starts[document + 1]) if document + 1 < len(self.starts) else len(self.tokens) - 1
    return start, min(self.length, last - start)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Given:
  """Windows that are there as an array, of a text that another process may have."""

  windows_WxL: np.ndarray  # int32 [W, L+1]

  def __len__(self) -> int:
    return len(self.windows_WxL)

  def __getitem__(self, index: int) -> np.ndarray:
    return self.windows_WxL[index]

  def num_targets(self, index: int) -> int:
    """How many tokens window `index` predicts."""
    return int(np.sum(self.windows_WxL[index, 1:] != PADDING))


def evenly_spaced(windows: Sized, count: int) -> np.ndarray:
  """The numbers of the same `count` windows every time, spread over the whole stream: int64 [W]; 0 means all.

  W is `count`, or the number of windows where there are fewer.
  """
  total = len(windows)
  count = min(count or total, total)
  return (2 * np.arange(count) + 1) * total // (2 * max(count, 1))

