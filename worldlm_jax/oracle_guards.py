"""Guards and robust aggregation one node at a time, for the oracle: `exchange/guards.py` and `exchange/robust.py`."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from worldlm_jax import plain
from worldlm_jax.config import BackboneConfig, GuardConfig


def rejected(config: GuardConfig, updates: dict[str, Any]) -> dict[str, str]:
  """Whose update, of siblings by path, is rejected, and why."""
  flat = {path: plain.flat(update) for path, update in updates.items()}
  norms = {path: float(np.linalg.norm(update)) for path, update in flat.items()}
  found = {path: "not_finite" for path, norm in norms.items() if not math.isfinite(norm)}
  left = [path for path in flat if path not in found]
  if left and math.isfinite(config.norm_ratio):
    median = sorted(norms[path] for path in left)[(len(left) - 1) // 2]
    found |= {path: "too_large" for path in left if norms[path] > config.norm_ratio * median}
  left = [path for path in flat if path not in found]
  for path in left if config.opposition < 1 else ():
    others = [flat[p] for p in left if p != path]
    if len(others) > 1:
      mine = np.mean([plain.cosine(flat[path], other) for other in others])
      pairs = [plain.cosine(a, b) for i, a in enumerate(others) for b in others[:i]]
      if mine < -config.opposition and np.mean(pairs) > config.opposition:
        found[path] = "opposed"
  return found


def combined(config: BackboneConfig, updates: Sequence[Any], shares: Sequence[float]) -> Any:
  """What a federation makes of its members' updates: trees of the same shapes, float64."""
  if config.aggregate == "norm_bounded":
    norms = [float(np.linalg.norm(plain.flat(update))) for update in updates]
    counting = sorted(norm for norm, share in zip(norms, shares, strict=True) if share)
    longest = config.norm_bound * counting[(len(counting) - 1) // 2] if counting else 0.0
    shares = [share * min(1.0, longest / norm) if norm else share for share, norm in zip(shares, norms, strict=True)]
  if config.aggregate in ("mean", "norm_bounded"):
    return jax.tree.map(
      lambda *leaves: np.sum([w * np.float64(x) for w, x in zip(shares, leaves, strict=True)], axis=0), *updates
    )
  trim = 0.499 if config.aggregate == "median" else config.trim
  weights = [*shares, 1 - sum(shares)]
  return jax.tree.map(lambda *leaves: _trimmed([*leaves, np.zeros(leaves[0].shape)], weights, trim), *updates)


def _trimmed(values: list[Any], weights: list[float], trim: float) -> np.ndarray:
  """The weighted mean of what is left of each coordinate's values once `trim` of the weight is cut off at each end."""
  columns = np.stack([np.ravel(np.float64(value)) for value in values], axis=1)
  result = np.empty(len(columns))
  for i, column in enumerate(columns):
    below, total, kept = 0.0, 0.0, 0.0
    for place in np.argsort(column):
      part = max(0.0, min(below + weights[place], 1 - trim) - max(below, trim))
      below, total, kept = below + weights[place], total + part * column[place], kept + part
    result[i] = total / kept
  return result.reshape(values[0].shape)
