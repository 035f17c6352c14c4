"""What one node of the oracle holds, a step of its training, and what crosses the edge to its parent in few bits.

Rounding one block after the other, in plain loops; `exchange/payload.py` says what it is and `algorithms/edges.py`
where it happens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from worldlm_jax import local, model, plain
from worldlm_jax.config import OptimizerConfig
from worldlm_jax.exchange import relevance
from worldlm_jax.federation import Member
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
  backbone_update: Any
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
  addition_errors: Any = None  # nor of what the parent added to them
  moved: Any = None  # how far both have moved from one down-phase to the next
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
    return Shared(self.update, self.backbone_update, self.fresh and self.heard, self.gain, self.sent, self.heard)

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

  def added_backbone(self, node: NodeState, addition: Any) -> Any:
    """What arrives of what the parent adds to it."""
    arrived, error = self._tree(addition, node.addition_errors[0])
    node.addition_errors = error, node.addition_errors[1]
    return arrived

  def added_layers(self, node: NodeState, addition: Layers) -> Layers:
    """The same of key layers."""
    arrived, error = self._layers(addition, node.addition_errors[1])
    node.addition_errors = node.addition_errors[0], error
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


class Judge(NamedTuple):
  """Losses of models on the validation batches of nodes."""

  arch: model.Architecture
  windows: dict[str, np.ndarray]  # path -> int32 [E, W]
  from_lists: Callable[[Layers], Any]  # key layers as the model takes them

  def loss(self, path: str, params: model.Params) -> float:
    """In nats per token."""
    windows = self.windows[path]
    return float(loss(self.arch, params, windows)) / np.count_nonzero(windows[:, 1:] >= 0)

  def loss_of(self, path: str, backbone: Any, layers: Layers) -> float:
    """The same; 0 where a node has no batch."""
    if path not in self.windows:
      return 0.0
    return self.loss(path, {"backbone": backbone, "key_layers": self.from_lists(layers)})

  def accept(self, q: Member, own: tuple[Any, Layers], mixed: tuple[Any, Layers]) -> tuple[Any, Layers]:
    """A node's backbone and key layers: the mixed ones, unless it asks for validation and they are worse."""
    asks = q.settings.acceptance == "validated"
    losses = [self.loss_of(q.path, *parts) if asks else 0.0 for parts in (mixed, own)]
    return own if losses[0] > losses[1] else mixed


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
