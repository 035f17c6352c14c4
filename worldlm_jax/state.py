"""The state of a federation: for each level of the tree, everything its nodes hold, stacked.

All of it survives in a checkpoint. Leaves have a leading node axis `[N]`, N being the level's size
rounded up to the mesh (ghosts included); M is the number of key layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldlm_jax import links, local, model, partition, trees
from worldlm_jax.config import Config
from worldlm_jax.exchange import attend, backbone, relevance, residuals
from worldlm_jax.federation import Federation
from worldlm_jax.governance import Governance, Permissions, permissions
from worldlm_jax.privacy import policy, release


class LevelState(NamedTuple):
  """What the nodes of one level hold."""

  params: model.Params  # {"backbone", "key_layers"}, leaves [N, ...]
  opt_state: trees.PyTree  # the local optimizer's moments
  server: trees.PyTree  # the server optimizer's state; only where the level has federations
  update: trees.PyTree  # by part of the model: what has changed since the last down-phase, if `fresh`; leaves [N, ...]
  handed: trees.PyTree  # by part: the parent's model as it arrived, leaves [N, ...]; None where nothing is rounded
  errors: trees.PyTree  # by message: what has not arrived yet, leaves [N, ...]; None too (see algorithms/edges.py)
  residuals: residuals.Residuals | None  # sent up by the level's federations, [N, R, M, ...]
  received: residuals.Residuals | None  # routed to the level's nodes, for their children to have, [N, R, M, ...]
  own_weight: jax.Array  # float32 [N]: what the node's training since its last down-phase weighs in a mean
  weight: jax.Array  # float32 [N]: the same for its whole subtree
  relevance: jax.Array  # float32 [N]: see exchange/relevance.py; UNKNOWN until it has been measured
  trust: jax.Array  # float32 [N]: see exchange/trust.py
  trained: jax.Array  # bool [N]: whether the node trained since its last down-phase
  fresh: jax.Array  # bool [N]: whether `update` is news to the others since its last down-phase
  private: release.Private | None = None  # None where nobody's text is protected (see privacy/release.py)
  kept: trees.PyTree = None  # by part: what federations keep of members' updates, see governance.py; None without rules
  gain: jax.Array | None = None  # float32 [N]: how much better, in nats, a model is than its parent's; None, too


State = tuple[LevelState, ...]


def news(level: LevelState) -> trees.PyTree:
  """`LevelState.update` where it is fresh, zeros elsewhere: a down-phase clears no arrays, since that takes a copy."""
  return trees.where(level.fresh, level.update, trees.zeros_like(level.update))


def with_copied(level: LevelState, source: LevelState, to: jax.Array, row: jax.Array) -> LevelState:
  """A level whose row `to` holds what row `row` of another one does.

  What the other one does not have, such as a server optimizer where there are no federations, stays as it is.
  """

  def copied(own: trees.PyTree, theirs: trees.PyTree) -> trees.PyTree:
    if str(jax.tree.structure(own)) != str(jax.tree.structure(theirs)):
      return own
    return jax.tree.map(lambda mine, other: mine.at[to].set(other[row]), own, theirs)

  return LevelState(*map(copied, level, source))


class Topology(NamedTuple):
  """How the nodes of one level are related, as index arrays; N and S include ghosts and padding."""

  parent: np.ndarray  # int32 [N]: place in the level above
  siblings: np.ndarray  # int32 [N, S]: places in this level, oneself excluded
  siblings_mask: np.ndarray  # bool [N, S]
  children: np.ndarray  # int32 [N, S]: places in the level below
  children_mask: np.ndarray  # bool [N, S]
  member: np.ndarray  # int32 [N]: place in Federation.members; -1 for ghosts
  follows: np.ndarray  # bool [N]: whether its updates are clipped where its federation says
  eligible: dict[int, np.ndarray]  # per level j: bool [N, N_j], whose residual layers a node may get
  num_real: dict[int, int]  # of each level j in `eligible`, how many of its nodes are no ghosts
  num_parents: int  # the same of the level above
  neighbours: links.Neighbours
  mesh: jax.sharding.Mesh  # where nodes meet
  permissions: Permissions | None = None  # None where no node has any rules


def topology(
  federation: Federation, level: int, mesh: jax.sharding.Mesh, home: jax.sharding.Mesh,
  governance: Governance | None = None,
) -> Topology:
  """The relations of one level, whose nodes train on `mesh` and meet on `home`, as far as `governance` permits them."""
  members = federation.levels[level]
  size = partition.padded_size(len(members), mesh)

  def pad(array: np.ndarray, value: int = 0) -> np.ndarray:
    return np.pad(array, [(0, size - len(members))] + [(0, 0)] * (array.ndim - 1), constant_values=value)

  parent = federation.parents[level]
  groups = [[j for j in np.flatnonzero(parent == parent[i]) if j != i] for i in range(len(members))]
  width = max(1, *(len(group) for group in groups)) if len(groups) > 1 else 1
  siblings = np.zeros((len(members), width), np.int32)
  siblings_mask = np.zeros((len(members), width), bool)
  for i, group in enumerate(groups):
    siblings[i, : len(group)], siblings_mask[i, : len(group)] = group, True
  children = children_mask = np.zeros((len(members), 1), np.int32)
  if level + 1 < len(federation.levels):
    children, children_mask = federation.children(level)
  offset = sum(len(above) for above in federation.levels[:level])
  eligible = {}
  for j in range(level, len(federation.levels)) if level else ():
    allowed = np.zeros((size, partition.padded_size(len(federation.levels[j]), mesh)), bool)
    for n, member in enumerate(members):
      for o, other in enumerate(federation.levels[j]):
        mine, others = (federation.is_within(other.path, p) for p in (member.path, str(member.parent)))
        allowed[n, o] = others and not mine and federation.is_federation(j)[o]
    if allowed.any():
      eligible[j] = allowed
  siblings, siblings_mask = pad(siblings), pad(siblings_mask).astype(bool)
  return Topology(
    np.maximum(pad(parent), 0), siblings, siblings_mask, pad(children), pad(children_mask).astype(bool),
    pad(np.arange(offset, offset + len(members), dtype=np.int32), -1),
    pad(np.array([m.trains and m.settings.privacy == "central" and m.settings.privacy_quantile > 0 for m in members])),
    eligible,
    {j: len(federation.levels[j]) for j in eligible}, len(federation.levels[level - 1]) if level else 0,
    links.neighbours(siblings, siblings_mask, home), home,
    permissions(governance, level, siblings, size) if governance is not None and governance.restricts else None,
  )


def init(
  config: Config, federation: Federation, topologies: Sequence[Topology], params: model.Params, tracks: Sequence[str],
  governance: Governance | None = None,
) -> State:
  """The state before the first round: all nodes hold the same parameters. Traceable; leaves `[N, ...]`.

  `tracks` names the parts of the model whose updates are kept: with a payload that rounds, all that cross an edge.
  """
  tx, server = local.optimizer(config.optimizer), backbone.server_optimizer(config.backbone)
  key_layers = params["key_layers"]
  rounds = config.payload != "float32"
  withholds = policy.any_updates(federation)
  protects = withholds or policy.any_examples(federation)
  errors = {part: trees.zeros_like(params[part]) for part in tracks}
  if config.key_layers.values == "updates" and "key_layers" in tracks:
    added = attend.added_parts(config.key_layers, config.payload)
    errors["addition"] = {part: trees.zeros_like(params[part]) for part in added}
  sends, receives = config.key_layers.residuals_per_layer, config.key_layers.residuals_received
  exchanges_residuals = "key_layers" in tracks and bool(key_layers) and sends > 0 and receives > 0
  reached = [bool(own.eligible) for own in topologies]  # residual layers come from the pool of one's side of the tree
  for level in range(1, len(reached)):
    reached[level] |= reached[level - 1]  # and from what the parent received

  def node(level: int) -> LevelState:
    has_federations = bool(federation.is_federation(level).any())
    kept = [] if governance is None else governance.keeps(level)
    return LevelState(
      params=params,
      opt_state=tx.init(params),
      server=server.init(params["backbone"]) if has_federations else (),
      update={part: trees.zeros_like(params[part]) for part in tracks},
      handed={part: params[part] for part in tracks} if rounds else None,
      errors=errors if rounds else None,
      residuals=residuals.empty(key_layers, sends) if exchanges_residuals and has_federations and level else None,
      received=residuals.empty(key_layers, receives) if exchanges_residuals and has_federations and reached[level]
      else None,
      own_weight=jnp.float32(0),
      weight=jnp.float32(0),
      relevance=jnp.float32(relevance.UNKNOWN),
      trust=jnp.float32(1),
      trained=jnp.bool_(False),
      fresh=jnp.bool_(False),
      private=release.Private(
        {part: trees.zeros_like(params[part]) for part in tracks} if withholds else {}, jnp.float32(0), jnp.float32(0),
        jnp.int32(0),
      ) if protects else None,
      kept={part: trees.zeros_like(params[part]) for part in kept} if kept else None,
      gain=jnp.float32(jnp.inf) if governance is not None and governance.has_floor else None,
    )

  def stacked(level: int) -> LevelState:
    size = len(topologies[level].member)
    found = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape)), node(level))
    if found.private is None:
      return found
    clips = jnp.array([member.settings.privacy_clip for member in federation.levels[level]], jnp.float32)
    return found._replace(private=found.private._replace(clip=jnp.pad(clips, (0, size - len(clips)))))

  return tuple(stacked(level) for level in range(len(federation.levels)))


def handed(state: State, level: int) -> trees.PyTree:
  """What a level knows of its parents' models: a row for each node, or each parent's where nothing is rounded."""
  if not level:
    return None
  return state[level - 1].params if state[level].handed is None else state[level].handed


def with_level(state: State, level: int, new: LevelState) -> State:
  """The state with one level replaced."""
  return (*state[:level], new, *state[level + 1 :])
