"""An algorithm is a rule for the backbone and a rule for the key layers; the rest is the same for all.

`down` and `up` are one phase of one level: they hand the rules what they need, keep the books (weights,
who trained, residual layers) and leave nodes that take no part as they were. Both are pure functions
of stacked states, to be jitted once per level.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from worldlm_jax import trees
from worldlm_jax.config import BackboneConfig
from worldlm_jax.exchange import backbone as backbone_lib, relevance
from worldlm_jax.exchange.residuals import Residuals
from worldlm_jax.state import LevelState, Topology

Log = dict[str, jax.Array]


class NodeInputs(NamedTuple):
  """What differs from node to node in an exchange; leaves `[N, ...]`."""

  active: Any  # bool: takes part in this phase
  temperature: Any  # float32, of this phase
  epochs: Any  # float32: how often it sees its text in the whole run; see schedule.epochs
  backbone_independence: Any  # float32: see exchange/relevance.py
  key_layer_independence: Any  # float32
  text_share: Any  # float32: of all text, how much the node has
  validated: Any  # bool: keeps its own key layers where the mixed ones are worse
  windows: Any  # int32 [E, W]: its validation batch; E is 0 where no rule needs one
  num_windows: Any  # int32: how many of them it has; 0 without data


class PhaseInputs(NamedTuple):
  """What is the same for all nodes of an exchange."""

  round_index: Any  # int32 scalar
  first_repeat: Any  # bool scalar: see schedule.Step
  num_rounds: Any  # int32 scalar: of the whole run


class BackboneRule(NamedTuple):
  """How backbones go down and up."""

  receive: Any  # (own [N, ...], parents' [N, ...], bool [N]: who takes the parent's as it is) -> [N, ...]
  merge: Any  # (own [P, ...], server state, level of members, parent [C], weights [C], own weights [P]) -> both new


class Descent(NamedTuple):
  """What a level sees in its down-phase."""

  level: LevelState
  above: LevelState
  backbone: trees.PyTree  # as just received, leaves [N, ...]
  pool: Residuals | None  # the residual layers on this side of the tree, leaves [P, M, ...]
  above_in_pool: int  # how many of them, at the end, are what the level above received
  eligible: jax.Array | None  # bool [N, P]: who may get which
  takes: jax.Array  # bool [N]: who takes the parent's key layers as they are
  topology: Topology
  nodes: NodeInputs
  phase: PhaseInputs


class Ascent(NamedTuple):
  """What a level of federations sees in its up-phase."""

  level: LevelState
  below: LevelState
  backbone: trees.PyTree  # as just merged, leaves [N, ...]
  weights: jax.Array  # float32 [C], of the level below: what its nodes weigh; 0 where they take no part
  own_weights: jax.Array  # float32 [N]: the same for the federations' own training
  members_mask: jax.Array  # bool [N, S]: which of Topology.children took part
  below_member: jax.Array  # int32: the place in Federation.members of the nodes below
  topology: Topology
  below_parent: np.ndarray  # int32 [C]: the federation of each node below
  nodes: NodeInputs
  phase: PhaseInputs


class KeyLayerRule(Protocol):
  """How key layers go down and up. Logs are small arrays for the records, leaves `[N, ...]`."""

  def receive(self, descent: Descent) -> tuple[trees.PyTree, Residuals | None, Log]:
    """New key layers, the residual layers each node received, and the log."""

  def merge(self, ascent: Ascent) -> tuple[trees.PyTree, trees.PyTree, Residuals | None, Log]:
    """New key layers, new updates, the residual layers each federation sends up, and the log."""


class Algorithm(NamedTuple):
  """A row of the table of algorithms."""

  backbone: BackboneRule
  key_layers: KeyLayerRule
  shares: tuple[str, ...]  # the parts of a model that cross an edge: "backbone", "key_layers"
  tracks: tuple[str, ...] = ()  # the parts whose `LevelState.update` it looks at
  weights: str = "uniform"  # what a member weighs: see BackboneConfig
  needs_validation: bool = False  # whether it looks at the nodes' validation batches
  trusts: bool = False  # whether nodes use models between their parent's and their own (see exchange/trust.py)


KEPT_BACKBONE = BackboneRule(lambda own, parents, takes: own, lambda own, server, *members: (own, server))


class KeptKeyLayers(NamedTuple):
  """Key layers that never leave their node, as a `KeyLayerRule`."""

  def receive(self, descent: Descent) -> tuple[trees.PyTree, Residuals | None, Log]:
    """Those it has."""
    return descent.level.params["key_layers"], descent.level.received, {}

  def merge(self, ascent: Ascent) -> tuple[trees.PyTree, trees.PyTree, Residuals | None, Log]:
    """Those it has."""
    return ascent.level.params["key_layers"], {}, ascent.level.residuals, {}


def averaged(config: BackboneConfig) -> BackboneRule:
  """The members' weighted mean, applied by the server optimizer; members receive their federation's backbone."""
  server = backbone_lib.server_optimizer(config)

  def merge(own, state, below, parent, weights, own_weights):
    difference = backbone_lib.mean_difference(own, below.params["backbone"], parent, weights, own_weights)
    return backbone_lib.apply_server_optimizer(server, own, state, difference)

  return BackboneRule(lambda own, parents, takes: parents, merge)


def down(
  algorithm: Algorithm, topology: Topology, level: LevelState, above: LevelState | None,
  deeper: dict[int, Residuals], nodes: NodeInputs, phase: PhaseInputs,
) -> tuple[LevelState, Log]:
  """The down-phase: nodes receive their parent's backbone and mix key layers.

  Args:
    algorithm: the pair of rules.
    topology: of this level.
    level: the receiving nodes.
    above: their parents' level; None for the root, which only begins a new count of weights.
    deeper: the residual layers sent up by federations of the levels below, by level.
    nodes: per-node inputs; nodes that are not active stay exactly as they are.
    phase: the round.
  """
  if "backbone" in algorithm.tracks and above is not None:
    begun_from = trees.subtract(level.params, level.update)
    moved = trees.subtract(trees.take(above.params, topology.parent), begun_from)
    found = relevance.relevance(level.update, moved, nodes.text_share)
    measured = level.fresh & phase.first_repeat & (level.relevance == relevance.UNKNOWN)
    level = level._replace(relevance=jnp.where(measured, found, level.relevance))
  begun = level._replace(
    update=trees.zeros_like(level.update),
    own_weight=jnp.zeros_like(level.own_weight), weight=jnp.zeros_like(level.weight),
    trained=jnp.zeros_like(level.trained), fresh=jnp.zeros_like(level.fresh),
  )
  if above is None:
    return trees.where(nodes.active, begun, level), {}
  parents = trees.take(above.params["backbone"], topology.parent)
  backbone = algorithm.backbone.receive(
    level.params["backbone"], parents, _takes(level, nodes, nodes.backbone_independence, phase)
  )
  key_layers, received = level.params["key_layers"], level.received
  log: Log = {}
  if key_layers:
    pool, above_in_pool, eligible = _pool(level, above, deeper, topology)
    key_layers, received, log = algorithm.key_layers.receive(
      Descent(level, above, backbone, pool, above_in_pool, eligible,
              _takes(level, nodes, nodes.key_layer_independence, phase), topology, nodes, phase)
    )
  after = begun._replace(params={"backbone": backbone, "key_layers": key_layers}, received=received)
  return trees.where(nodes.active, after, level), log


def up(
  algorithm: Algorithm, topology: Topology, level: LevelState, below: LevelState, below_active: jax.Array,
  topology_below: Topology, nodes: NodeInputs, phase: PhaseInputs,
) -> tuple[LevelState, Log]:
  """The up-phase: federations merge their members' backbones and key layers.

  Args:
    algorithm: the pair of rules.
    topology: of the federations' level.
    level: the federations.
    below: the level of their members.
    below_active: bool, which members took part.
    topology_below: of the members' level.
    nodes: per-node inputs of the federations; those that are not active stay exactly as they are.
    phase: the round.
  """
  weight = jnp.where(below_active & nodes.active[topology_below.parent], below.weight, 0.0)
  gained = jax.ops.segment_sum(weight, topology_below.parent, level.weight.shape[0])
  own_weight = jnp.where(level.trained, level.own_weight, 0.0)
  if algorithm.weights == "uniform":
    weight, own_weight = jnp.float32(weight > 0), jnp.float32(level.trained)
  merged, server = algorithm.backbone.merge(
    level.params["backbone"], level.server, below, topology_below.parent, weight, own_weight
  )
  members_mask = jnp.asarray(topology.children_mask) & below_active[topology.children]
  key_layers, update, residuals = level.params["key_layers"], level.update, level.residuals
  if "backbone" in update:
    moved = trees.subtract(merged, level.params["backbone"])
    update = update | {"backbone": trees.add(update["backbone"], moved)}
  log: Log = {}
  if key_layers:
    below_member = jnp.asarray(topology_below.member)
    key_layers, key_update, residuals, log = algorithm.key_layers.merge(
      Ascent(level, below, merged, weight, own_weight, members_mask, below_member, topology, topology_below.parent,
             nodes, phase)
    )
    update = update | {"key_layers": key_update} if "key_layers" in update else update
  after = level._replace(
    params={"backbone": merged, "key_layers": key_layers}, server=server, update=update, residuals=residuals,
    weight=level.weight + gained, fresh=level.fresh | (gained > 0),
  )
  return trees.where(nodes.active & (gained > 0), after, level), log  # where nobody trained, nothing is merged


def _takes(level: LevelState, nodes: NodeInputs, independence: jax.Array, phase: PhaseInputs) -> jax.Array:
  """Who takes the parent's part of the model as it is: bool `[N]`."""
  return relevance.shares(level.relevance, nodes.epochs, independence, phase.round_index, phase.num_rounds)


def _pool(
  level: LevelState, above: LevelState, deeper: dict[int, Residuals], topology: Topology
) -> tuple[Residuals | None, int, jax.Array | None]:
  """`pool`, `above_in_pool` and `eligible` of a `Descent`."""
  if level.received is None:
    return None, 0, None
  parts: list[Residuals] = []
  allowed: list[jax.Array] = []
  above_in_pool = 0
  for j, eligible in topology.eligible.items():
    pool = level.residuals if level.residuals is not None and j not in deeper else deeper[j]
    parts.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), pool))
    allowed.append(jnp.repeat(jnp.asarray(eligible), pool.present.shape[1], axis=1))
  if above.received is not None:  # what a node received goes on to its children
    parts.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), above.received))
    num_above, count = above.received.present.shape[:2]
    above_in_pool = num_above * count
    mine = jnp.asarray(topology.parent)[:, None] == jnp.arange(num_above)[None, :]
    allowed.append(jnp.repeat(mine, count, axis=1))
  return trees.concatenate(parts), above_in_pool, jnp.concatenate(allowed, axis=1)
