"""An algorithm is a rule for the backbone and a rule for the key layers; the rest is the same for all.

`down` and `up` are one phase of one level: they hand the rules what they need, keep the books (tokens,
who trained, residual layers) and leave nodes that take no part as they were. Both are pure functions
of stacked states, to be jitted once per level.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from worldlm_jax import trees
from worldlm_jax.exchange.residuals import Residuals
from worldlm_jax.state import LevelState, Topology


class NodeInputs(NamedTuple):
  """What differs from node to node in an exchange; leaves `[N, ...]`."""

  active: Any  # bool: takes part in this phase
  temperature: Any  # float32, of this phase
  validated: Any  # bool: keeps its own key layers where the mixed ones are worse
  windows: Any  # int32 [E, W]: its validation batch; E is 0 where no rule needs one
  num_windows: Any  # int32: how many of them it has; 0 without data


class PhaseInputs(NamedTuple):
  """What is the same for all nodes of an exchange."""

  round_index: Any  # int32 scalar
  first_repeat: Any  # bool scalar: see schedule.Step


class BackboneRule(NamedTuple):
  """How backbones go down and up."""

  receive: Any  # (own [N, ...], parents' [N, ...]) -> [N, ...]
  merge: Any  # (own [P, ...], server state, members' [C, ...], parent [C], weights [C], own weights [P]) -> both new
  counts_tokens: bool  # whether a member weighs as many tokens as it saw, or one


class KeyLayerRule(Protocol):
  """How key layers go down and up. Logs are small arrays for the records, leaves `[N, ...]`."""

  def receive(
    self, backbone: trees.PyTree, level: LevelState, above: LevelState, pool: Residuals | None, eligible: jax.Array | None,
    topology: Topology, nodes: NodeInputs, phase: PhaseInputs,
  ) -> tuple[trees.PyTree, Residuals | None, dict[str, jax.Array]]:
    """New key layers, the residual layers each node received, and the log."""

  def merge(
    self, backbone: trees.PyTree, level: LevelState, below: LevelState, members_mask: jax.Array,
    topology: Topology, below_member: jax.Array, nodes: NodeInputs, phase: PhaseInputs,
  ) -> tuple[trees.PyTree, trees.PyTree, Residuals | None, dict[str, jax.Array]]:
    """New key layers, new updates, the residual layers each federation sends up, and the log."""


class Algorithm(NamedTuple):
  """A row of the table of algorithms."""

  backbone: BackboneRule
  key_layers: KeyLayerRule


def down(
  algorithm: Algorithm, topology: Topology, level: LevelState, above: LevelState | None,
  deeper: dict[int, Residuals], nodes: NodeInputs, phase: PhaseInputs,
) -> tuple[LevelState, dict[str, jax.Array]]:
  """The down-phase: nodes receive their parent's backbone and mix key layers.

  Args:
    algorithm: the pair of rules.
    topology: of this level.
    level: the receiving nodes.
    above: their parents' level; None for the root, which only begins a new count of tokens.
    deeper: the residual layers sent up by federations of the levels below, by level.
    nodes: per-node inputs; nodes that are not active stay exactly as they are.
    phase: the round.
  """
  begun = level._replace(
    own_tokens=jnp.zeros_like(level.own_tokens), tokens=jnp.zeros_like(level.tokens),
    trained=jnp.zeros_like(level.trained), fresh=jnp.zeros_like(level.fresh),
  )
  if above is None:
    return trees.where(nodes.active, begun, level), {}
  backbone = algorithm.backbone.receive(level.params["backbone"], trees.take(above.params["backbone"], topology.parent))
  key_layers, received, log = level.params["key_layers"], level.received, {}
  if key_layers:
    pool, eligible = _pool(level, above, deeper, topology)
    key_layers, received, log = algorithm.key_layers.receive(
      backbone, level, above, pool, eligible, topology, nodes, phase
    )
  after = begun._replace(params={"backbone": backbone, "key_layers": key_layers}, received=received)
  return trees.where(nodes.active, after, level), log


def up(
  algorithm: Algorithm, topology: Topology, level: LevelState, below: LevelState, below_active: jax.Array,
  topology_below: Topology, nodes: NodeInputs, phase: PhaseInputs,
) -> tuple[LevelState, dict[str, jax.Array]]:
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
  counts_tokens = algorithm.backbone.counts_tokens
  tokens = jnp.where(below_active & nodes.active[topology_below.parent], below.tokens, 0.0)
  merged, server = algorithm.backbone.merge(
    level.params["backbone"], level.server, below.params["backbone"], topology_below.parent,
    tokens if counts_tokens else jnp.float32(tokens > 0),
    jnp.where(level.trained, level.own_tokens, 0.0) if counts_tokens else jnp.float32(level.trained),
  )
  members_mask = topology.children_mask & below_active[topology.children]
  key_layers, update, residuals, log = level.params["key_layers"], level.update, level.residuals, {}
  if key_layers:
    key_layers, update, residuals, log = algorithm.key_layers.merge(
      merged, level, below, members_mask, topology, jnp.asarray(topology_below.member), nodes, phase
    )
  gained = jax.ops.segment_sum(tokens, topology_below.parent, level.tokens.shape[0])
  after = level._replace(
    params={"backbone": merged, "key_layers": key_layers}, server=server, update=update, residuals=residuals,
    tokens=level.tokens + gained, fresh=level.fresh | (gained > 0),
  )
  return trees.where(nodes.active & members_mask.any(axis=1), after, level), log


def _pool(
  level: LevelState, above: LevelState, deeper: dict[int, Residuals], topology: Topology
) -> tuple[Residuals | None, jax.Array | None]:
  """All residual layers on this side of the tree as one list `[P, M, ...]`, and who may get which: `[N, P]`."""
  if level.received is None:
    return None, None
  parts, allowed = [], []
  for j, eligible in topology.eligible.items():
    pool = level.residuals if level.residuals is not None and j not in deeper else deeper[j]
    parts.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), pool))
    allowed.append(jnp.repeat(jnp.asarray(eligible), pool.present.shape[1], axis=1))
  if above.received is not None:  # what a node received goes on to its children
    parts.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), above.received))
    num_above, count = above.received.present.shape[:2]
    mine = jnp.asarray(topology.parent)[:, None] == jnp.arange(num_above)[None, :]
    allowed.append(jnp.repeat(mine, count, axis=1))
  return trees.concatenate(parts), jnp.concatenate(allowed, axis=1)
