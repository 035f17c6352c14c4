"""Attention and the routing of residual layers, one piece after the other: for the oracle.

The equations are those of `exchange/attend.py`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from worldlm_jax import plain
from worldlm_jax.config import KeyLayerConfig
from worldlm_jax.oracle_nodes import Residual
from worldlm_jax.oracle_rules import capped
from worldlm_jax.plain import Layers

Pieces = dict[Any, np.ndarray]  # an update in pieces, by place: (tensor, layer), and "backbone" for all of that


def attended_updates(
  keys: KeyLayerConfig, units: list[list], own: Pieces, candidates: list[Pieces], means: int
) -> Pieces:
  """What to add to a model that already holds `own`: attention over updates, `units` of places at a time.

  `means` says of how many updates the first candidate is the mean; 0 for a single one. What one lacks counts as zeros.
  """
  result: Pieces = {}
  for unit in units:
    direction = np.concatenate([own[place] for place in unit])
    steps = {place: own[place] for place in unit}
    for s, candidate in enumerate(candidates):
      count = means if s == 0 else 0
      theirs = np.concatenate([candidate.get(place, 0 * own[place]) for place in unit])
      agreement = plain.cosine(direction, theirs)
      if count and direction.any():
        agreement = float(direction @ theirs) / float(direction @ direction)
      beta = keys.update_strength * bool(direction.any()) * max(0.0, agreement - keys.update_threshold) * (count or 1)
      steps |= {place: steps[place] + beta * candidate[place] for place in unit if place in candidate}
    own_norm, step_norm = np.linalg.norm(direction), np.linalg.norm(np.concatenate([*steps.values()]))
    scale = min(1.0, keys.update_norm_cap * own_norm / step_norm) if own_norm and step_norm else 1.0
    result |= {place: scale * step - own[place] for place, step in steps.items()}
  return result


def routing_score(
  similarity: str, direction: Layers, origin: Layers | None, pool: list[Residual], r: Residual
) -> float:
  """How similar a residual layer is to a node's own, or to the mean of its pool where the node has no direction."""
  query = plain.layer(direction, r.index)
  if not any(t.any() for tensor in direction for t in tensor):
    everyone = [plain.displacement(o.layer, origin, o.index) for o in pool if o.index == r.index]
    query = [np.mean(tensors, axis=0) for tensors in zip(*everyone, strict=True)]
  a, b = np.concatenate(query), np.concatenate(plain.displacement(r.layer, origin, r.index))
  return float(a @ b) / np.sqrt(a.size) if similarity == "scaled_dot" else plain.cosine(a, b)


def attended_layers(
  keys: KeyLayerConfig, own: Layers, direction: Layers, origin: Layers | None,
  candidates: list[list[list[np.ndarray]]], prior: list[float] | None, temperature: float,
  loss: Callable[[Layers], float], num_own: int | None, cap: float,
) -> tuple[Layers, list[np.ndarray]]:
  """Softmax attention over whole layers: mixed layers, and per layer the weights `[S]`, averaged over tensors.

  `candidates[i]` are those for layer i. Where the first `num_own` are the federation's own and the others its members,
  no member's weight is over `cap`.
  """
  num_tensors, num_layers = len(own), len(own[0])
  moved = [[plain.displacement(layer, origin, i) for layer in c] for i, c in enumerate(candidates)]
  if not any(t.any() for tensor in direction for t in tensor):
    mean = [[np.mean([layer[t] for layer in c], axis=0) for t in range(num_tensors)] for c in moved]
    direction = [[mean[i][t] for i in range(num_layers)] for t in range(num_tensors)]
  result: Layers = [[np.empty(0)] * num_layers for _ in own]
  weights = [np.zeros((num_tensors, len(c))) for c in candidates]
  for unit in plain.units(keys.granularity, num_tensors, num_layers):
    for i in sorted({i for _, i in unit}):  # with granularity "all" the scores are shared, the candidates may not be
      scores = []
      for s in range(len(candidates[i])):
        a = np.concatenate([direction[t][j] for t, j in unit])
        b = np.concatenate([moved[j][s][t] for t, j in unit])
        if keys.similarity == "validation_loss":
          swapped = [list(row) for row in own]
          for t, j in unit:
            swapped[t][j] = candidates[j][s][t]
          scores.append(-loss(swapped))
        elif keys.similarity == "scaled_dot":
          scores.append(float(a @ b) / np.sqrt(a.size))
        else:
          scores.append(plain.cosine(a, b))
      w = plain.softmax(np.array(scores), prior, temperature)
      left = 0.0
      if num_own is not None and w.any():
        members = capped([*w[num_own:]], w[:num_own].sum(), cap)
        left = w.sum() - sum(members)
        w = np.array([left] * num_own + members)
        left *= not num_own
      for t in (t for t, j in unit if j == i):
        mixed = sum(w_s * c[t] for w_s, c in zip(w, candidates[i], strict=True))
        result[t][i] = mixed + left * own[t][i] if w.any() else own[t][i]
        weights[i][t] = w
  return result, [w.mean(axis=0) for w in weights]
