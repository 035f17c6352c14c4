"""What the oracle's nodes release, and what its federations add to their means: `privacy/release.py` in plain loops.

The same draws as the engine's, since both name them by (seed, path, purpose, count); norms and sums in float64.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldlm_jax import plain, rngs
from worldlm_jax.config import NodeSettings
from worldlm_jax.federation import Member
from worldlm_jax.oracle_nodes import NodeState
from worldlm_jax.privacy import release as release_lib


def draw_key(seed: int, path: str, purpose: int, count: int) -> jax.Array:
  """The key of one draw of one node."""
  return jax.random.fold_in(jax.random.fold_in(rngs.key(seed, path, "privacy"), purpose), count)


def clip(update: Any, settings: NodeSettings, norm: float) -> tuple[Any, float]:
  """The update, leaves as in the model's parameters, at this norm at most, and the share that was there already."""
  layers: dict[str, list[np.ndarray]] = {}
  for name, piece in _pieces(update):
    layers.setdefault(name, []).append(piece)
  norms = {name: float(np.linalg.norm(np.concatenate(found))) for name, found in layers.items()}
  whole = float(np.linalg.norm(list(norms.values())))
  if settings.privacy_clip_by == "layer":
    each = norm / np.sqrt(len(norms))
    factors = {name: min(1.0, each / n) if n else 1.0 for name, n in norms.items()}
  else:
    factors = dict.fromkeys(norms, min(1.0, norm / whole) if whole else 1.0)

  def scaled(path: tuple, leaf: np.ndarray) -> np.ndarray:
    return np.stack([factors[f"{_stack(path)} {i}"] * layer for i, layer in enumerate(leaf)]) if _stack(path) else (
      factors[jax.tree_util.keystr(path)] * leaf)

  return jax.tree_util.tree_map_with_path(scaled, update), float(np.mean([f >= 1 for f in factors.values()]))


def _pieces(update: Any) -> list[tuple[str, np.ndarray]]:
  """Every tensor of every layer, flat, with the name of its layer."""
  found = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(update):
    stack = _stack(path)
    found += [(f"{stack} {i}", layer.ravel()) for i, layer in enumerate(leaf)] if stack else [
      (jax.tree_util.keystr(path), leaf.ravel())]
  return found


def _stack(path: tuple) -> str:
  return next((key.key for key in path if key.key in ("blocks", "key_layers")), "")


def release(
  q: Member, node: NodeState, seed: int, structure: Any, shapes: list[tuple[int, ...]], hands_down: bool
) -> None:
  """Puts what others see of q's update in its place; what it hands down to members of its own goes by that, too."""
  settings = q.settings
  update = as_update(structure, shapes, node.backbone_update, node.update)
  norm = node.clip if settings.privacy != "none" else np.inf
  released, node.within = clip(update, settings, norm)
  if settings.privacy == "local" and settings.privacy_noise:
    drawn = release_lib.noise(draw_key(seed, q.path, release_lib.NOISE, node.draws), update, np.float32(1))
    released = jax.tree.map(lambda c, n: c + settings.privacy_noise * norm * np.float64(n), released, drawn)
  if settings.privacy == "local" and settings.privacy_quantile:
    node.clip = moved_clip(q, node, draw_key(seed, q.path, release_lib.SHARE, node.draws), node.within, 1)
  backbone = released["backbone"]
  layers = [[layer.ravel() for layer in leaf] for leaf in jax.tree.leaves(released["key_layers"])]
  withheld = (
    jax.tree.map(plain.minus, node.backbone_update, backbone), plain.combine([node.update, layers], [1.0, -1.0])
  )
  if hands_down:
    node.backbone = jax.tree.map(lambda own, w: jnp.float32(plain.minus(own, w)), node.backbone, withheld[0])
    node.key_layers = plain.combine([node.key_layers, withheld[1]], [1.0, -1.0])
  else:
    node.withheld = withheld
  node.backbone_update, node.update = backbone, layers


def moved_clip(q: Member, node: NodeState, key: jax.Array, share: float, members: int) -> float:
  """The node's clip after an update of which this share was under it."""
  noisy = share + q.settings.privacy_quantile_noise / 2 / members * float(jax.random.normal(key))
  return node.clip * float(np.exp(-q.settings.privacy_quantile_rate * (noisy - q.settings.privacy_quantile)))


def mean_noise(p: Member, node: NodeState, seed: int, members: list[tuple[Member, NodeState]], shares: list[float],
               like: Any) -> Any:
  """What federation p adds to the mean of its members' updates; its members' clip moves where it adapts."""
  asked = [
    share * c.settings.privacy_noise * m.clip if c.trains and c.settings.privacy == "central" else 0.0
    for (c, m), share in zip(members, shares, strict=True)
  ]
  drawn = release_lib.noise(draw_key(seed, p.path, release_lib.MEAN, node.draws), like, np.float32(1))
  counted = [
    m.within for (c, m), share in zip(members, shares, strict=True)
    if share > 0 and c.trains and c.settings.privacy != "none"
  ]
  if p.settings.privacy == "central" and p.settings.privacy_quantile and counted:
    key = draw_key(seed, p.path, release_lib.MEAN_SHARE, node.draws)
    node.clip = moved_clip(p, node, key, float(np.mean(counted)), len(counted))
  node.draws += 1
  return jax.tree.map(lambda n: max(asked) * np.float64(n), drawn)


def example_gradient(
  gradient: Callable[[Any, np.ndarray], Any], q: Member, node: NodeState, seed: int, params: Any, windows: np.ndarray,
  step: int,
) -> Any:
  """The gradient of a step of DP-SGD; None without.

  `gradient` is that of one window's summed loss, `step` counts within this training.
  """
  settings, total = q.settings, None
  if settings.example_clip == np.inf:
    return None
  for window in windows:
    found = jax.tree.map(np.float64, gradient(params, window[None]))
    found = jax.tree.map(lambda g, w=window: g / max(1, np.count_nonzero(w[1:] >= 0)), found)
    norm = float(np.linalg.norm(plain.flat(found)))
    factor = min(1.0, settings.example_clip / norm) if norm else 1.0
    found = jax.tree.map(lambda g, f=factor: f * g, found)
    total = found if total is None else jax.tree.map(np.add, total, found)
  key = draw_key(seed, q.path, release_lib.EXAMPLES, node.draws)
  drawn = release_lib.noise(jax.random.fold_in(key, step), params, np.float32(1))
  deviation = settings.example_noise * settings.example_clip if settings.example_noise else 0.0
  return jax.tree.map(lambda g, n: jnp.float32((g + deviation * np.float64(n)) / settings.batch_size), total, drawn)


def as_update(structure: Any, shapes: list[tuple[int, ...]], backbone: Any, layers: plain.Layers) -> Any:
  """Both parts in the shapes of the model's parameters, float64."""
  leaves = [
    np.stack([layer.reshape(shape) for layer in tensor]) for tensor, shape in zip(layers, shapes, strict=True)
  ]
  return {"backbone": jax.tree.map(np.float64, backbone), "key_layers": jax.tree.unflatten(structure, leaves)}
