"""What one node of the oracle holds, a step of its training, and what crosses the edge to its parent in few bits.

Rounding one block after the other, in plain loops; `exchange/payload.py` says what it is and `algorithms/edges.py`
where it happens.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from worldlm_jax import local, model, plain
from worldlm_jax.config import KeyLayerConfig, OptimizerConfig
from worldlm_jax.exchange import relevance
from worldlm_jax.plain import Layers

BLOCK = 64


@dataclasses.dataclass
class Residual:
  """One layer that its federation could not use."""

  layer: list[np.ndarray]  # the block's tensors
  index: int
  origin: str  # the node whose layer it is
  round: int


class Shared(NamedTuple):
  """What others may see of a node: its last update, whether it is news, and its residual layers."""

  update: Layers
  fresh: bool
  gain: float
  sent: list[Residual]
  heard: bool  # whether all this has come in at its federation


@dataclasses.dataclass
class NodeState:
  """What one node holds."""

  backbone: Any
  key_layers: Layers
  opt_state: Any
  server: Any
  update: Layers
  backbone_update: Any
  step: int = 0
  own_weight: float = 0.0
  weight: float = 0.0
  relevance: float = relevance.UNKNOWN
  trust: float = 1.0
  trained: bool = False
  fresh: bool = False
  heard: bool = True
  handed: Any = None  # the parent's backbone and key layers, as they arrived
  errors: Any = None  # what has not arrived of the updates of both
  addition_error: Any = None  # nor of what the parent added to the key layers
  withheld: Any = None  # how much more than what is known of them the last updates were
  clip: float = math.inf  # of its updates; of a federation without text, of its members'
  within: float = 0.0  # which share of its last update was under it
  draws: int = 0  # how often it has trained or merged
  gain: float = math.inf  # how much better, in nats, its model is than its parent's
  kept: Any = None  # backbone and key layers of members, on top of what comes from above
  sent: list[Residual] = dataclasses.field(default_factory=list)
  received: list[Residual] = dataclasses.field(default_factory=list)

  def shared(self) -> Shared:
    """What others may see of the node now."""
    return Shared(self.update, self.fresh and self.heard, self.gain, self.sent, self.heard)

  def known(self) -> tuple[Any, Layers]:
    """Backbone and key layers, as others know them."""
    backbone, layers = self.withheld
    return jax.tree.map(plain.minus, self.backbone, backbone), plain.combine([self.key_layers, layers], [1.0, -1.0])


class Edge(NamedTuple):
  """Rounds what crosses an edge; `widths` are the last axes of a block's tensors."""

  kind: str
  widths: list[int]

  def send(self, node: NodeState) -> None:
    """Up: from now on the node's updates are what has arrived of them."""
    if not node.fresh:
      return
    backbone, backbone_error = self._tree(node.backbone_update, node.errors[0])
    layers, layer_error = self._layers(node.update, node.errors[1])
    node.errors = backbone_error, layer_error
    node.withheld = (
      jax.tree.map(lambda held, sent, arrived: held + plain.minus(sent, arrived), node.withheld[0],
                   node.backbone_update, backbone),
      plain.combine([node.withheld[1], node.update, layers], [1.0, 1.0, -1.0]),
    )
    node.backbone_update, node.update = backbone, layers

  def hand_down(self, node: NodeState, backbone: Any, layers: Layers) -> None:
    """Down: the parent's model, as the difference to what the node holds of it."""
    zeros = plain.zeros(backbone), plain.scaled(layers, 0.0)
    held_backbone, held_layers = node.handed
    moved, _ = self._tree(jax.tree.map(plain.minus, backbone, held_backbone), zeros[0])
    layers_moved, _ = self._layers(plain.combine([layers, held_layers], [1.0, -1.0]), zeros[1])
    node.handed = (
      jax.tree.map(lambda held, m: np.float32(held + m), held_backbone, moved),
      plain.combine([held_layers, layers_moved], [1.0, 1.0]),
    )

  def added(self, node: NodeState, addition: Layers) -> Layers:
    """What arrives of it."""
    arrived, node.addition_error = self._layers(addition, node.addition_error)
    return arrived

  def _tree(self, update: Any, error: Any) -> tuple[Any, Any]:
    wanted = jax.tree.map(np.add, update, error)
    arrived = jax.tree.map(lambda x: rounded(x, x.shape[-1], self.kind), wanted)
    return arrived, jax.tree.map(plain.minus, wanted, arrived)

  def _layers(self, update: Layers, error: Layers) -> tuple[Layers, Layers]:
    wanted = plain.combine([update, error], [1.0, 1.0])
    arrived = [
      [rounded(layer, width, self.kind) for layer in tensor] for tensor, width in zip(wanted, self.widths, strict=True)
    ]
    return arrived, plain.combine([wanted, arrived], [1.0, -1.0])


def attended_updates(
  keys: KeyLayerConfig, units: list[list[tuple[int, int]]], own: Layers, candidates: list[list[list[np.ndarray]]]
) -> Layers:
  """What to add to layers that already hold `own`: attention over updates, `units` of (tensor, layer) at a time."""
  result: Layers = [[np.empty(0)] * len(tensor) for tensor in own]
  for unit in units:
    direction = np.concatenate([own[t][i] for t, i in unit])
    steps = {(t, i): own[t][i] for t, i in unit}
    for t, i in unit:
      for s, candidate in enumerate(candidates[i]):
        # With granularity "all", a candidate's missing layers count as zeros.
        theirs = np.concatenate([
          candidates[j][s][u] if s < len(candidates[j]) else 0 * own[u][j] for u, j in unit
        ])
        agreement = plain.cosine(direction, theirs) - keys.update_threshold
        beta = keys.update_strength * bool(direction.any()) * max(0.0, agreement)
        steps[t, i] = steps[t, i] + beta * candidate[t]
    step_vector = np.concatenate([steps[t, i] for t, i in unit])
    own_norm, step_norm = np.linalg.norm(direction), np.linalg.norm(step_vector)
    scale = min(1.0, keys.update_norm_cap * own_norm / step_norm) if own_norm and step_norm else 1.0
    for t, i in unit:
      result[t][i] = scale * steps[t, i] - own[t][i]
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


def rounded(x: np.ndarray, width: int, kind: str) -> np.ndarray:
  """What arrives of an array whose last axis has this width (it may be flat)."""
  if kind == "float32":
    return x
  if kind == "bfloat16":
    return np.asarray(np.asarray(x, np.float32).astype(jnp.bfloat16), np.float64)
  levels = {"int8": 127, "int4": 7}[kind]
  arrived = np.array(x, np.float64, order="C")
  for row in arrived.reshape(-1, width):
    for block in (row[i : i + BLOCK] for i in range(0, width, BLOCK)):
      scale = np.float64(np.asarray(np.float32(np.abs(block).max()) / np.float32(levels)).astype(jnp.bfloat16))
      block[:] = np.round(block / scale) * scale if scale else 0.0
  return arrived


@functools.partial(jax.jit, static_argnums=0)
def loss(arch: model.Architecture, params: model.Params, windows_BxW: jax.Array) -> jax.Array:
  """Summed over a batch."""
  return model.loss_sum(arch, params, windows_BxW, jnp.ones(windows_BxW.shape[0], bool))


def optimizer_step(
  arch: model.Architecture, config: OptimizerConfig, params: model.Params, state: Any, windows_BxW: jax.Array,
  rate: float, clip_norm: float, weight_decay: float, grads: Any,
) -> tuple[Any, Any]:
  """One step of a node: its new parameters and its optimizer's new state."""
  tokens = jnp.sum(windows_BxW[:, 1:] >= 0)
  grads = grads or jax.grad(lambda p: loss(arch, p, windows_BxW) / tokens)(params)
  updates, state = local.optimizer(config, clip_norm, weight_decay).update(grads, state, params)
  return optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates)), state
