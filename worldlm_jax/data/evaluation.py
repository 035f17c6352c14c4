"""The windows on which nodes are scored: the same ones every time, read when they are needed.

Shape suffixes: R rows, E windows of a batch, W tokens per window.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from worldlm_jax.data.windows import Given, Windows, evenly_spaced


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
  """`count` windows of each node of a level, spread over its text; 0 means all. None stands for no text here.

  Of a node whose text another process has, `elsewhere` says how many windows there are and how many tokens they
  predict; here they are zeros.
  """

  windows: Sequence[Windows | Given | None]  # by node
  count: int
  width: int  # W
  elsewhere: Sequence[tuple[int, int]] = ()  # by node; empty where there is only one process
  _chosen: tuple[np.ndarray, ...] = dataclasses.field(init=False, repr=False)

  def __post_init__(self) -> None:
    none = np.zeros(0, np.int64)
    chosen = tuple(none if windows is None else evenly_spaced(windows, self.count) for windows in self.windows)
    object.__setattr__(self, "_chosen", chosen)

  @property
  def counts(self) -> np.ndarray:
    """How many windows each node has: int32 [n]."""
    here = np.array([len(chosen) for chosen in self._chosen], np.int32)
    if not self.elsewhere:
      return here
    is_here = [windows is not None for windows in self.windows]
    return np.where(is_here, here, np.array([count for count, _ in self.elsewhere], np.int32))

  def take(self, rows: np.ndarray, begin: int, counts: np.ndarray, size: int) -> np.ndarray:
    """Windows `begin` to `begin + counts[i] - 1` of node `rows[i]`, filled up with zeros: int32 [R, E=size, W].

    Rows beyond the last node are those of ghosts.
    """
    batch_RxExW = np.zeros((len(rows), size, self.width), np.int32)
    for i, row in enumerate(rows):
      for e in range(counts[i]) if row < len(self.windows) and self.windows[row] is not None else ():
        batch_RxExW[i, e] = self._window(int(row), begin + e)
    return batch_RxExW

  def arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """All of it at once: int32 `[n, E, W]`, E at least 1, and the counts int32 `[n]`."""
    counts = self.counts
    return self.take(np.arange(len(counts)), 0, counts, max(1, int(counts.max(initial=0)))), counts

  def num_targets(self, node: int) -> int:
    """How many tokens a node's windows predict."""
    windows = self.windows[node]
    if windows is None:
      return self.elsewhere[node][1] if self.elsewhere else 0
    if isinstance(windows, Windows) and windows.starts is None:
      return len(self._chosen[node]) * (self.width - 1)
    return sum(windows.num_targets(int(index)) for index in self._chosen[node])

  def _window(self, node: int, place: int) -> np.ndarray:
    windows = self.windows[node]
    assert windows is not None
    return windows[int(self._chosen[node][place])]
