"""An algorithm is a rule for the backbone and a rule for the key layers; the rest is the same for all.

`down` and `up` are one phase of one level: they hand the rules what they need, keep the books (weights,
who trained, residual layers) and leave nodes that take no part as they were. Both are pure functions
of stacked states, to be jitted once per level.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from worldlm_jax import links, model, trees
from worldlm_jax.algorithms import edges, own_way, permitted
from worldlm_jax.config import BackboneConfig, GuardConfig
from worldlm_jax.exchange import backbone as backbone_lib, guards as guards_lib, relevance, robust
from worldlm_jax.exchange.residuals import Residuals
from worldlm_jax.governance import Governance
from worldlm_jax.privacy import release
from worldlm_jax.state import LevelState, Topology, news

Log = dict[str, jax.Array]


class NodeInputs(NamedTuple):
  """What differs from node to node in an exchange; leaves `[N, ...]`."""

  active: Any  # bool: takes part in this phase
  heard: Any  # bool: its last update has come in and is news
  temperature: Any  # float32, of this phase
  epochs: Any  # float32: how often it sees its text in the whole run; see schedule.epochs
  backbone_independence: Any  # float32: see exchange/relevance.py
  key_layer_independence: Any  # float32
  text_share: Any  # float32: of all text, how much the node has
  num_others: Any  # float32: how many others with text are behind the parent's model
  validated: Any  # bool: keeps its own key layers where the mixed ones are worse
  windows: Any  # int32 [E, W]: its validation batch; E is 0 where no rule needs one
  num_windows: Any  # int32: how many of them it has; 0 without data


class PhaseInputs(NamedTuple):
  """What is the same for all nodes of an exchange."""

  round_index: Any  # int32 scalar
  first_repeat: Any  # bool scalar: see schedule.Step
  num_rounds: Any  # int32 scalar: of the whole run


class Guards(NamedTuple):
  """How an up-phase's nodes are protected where some federation noises its mean."""

  level: release.Guard  # of the federations, [N]
  below: release.Guard  # of their members, [C]


class BackboneRule(NamedTuple):
  """How backbones go down and up."""

  receive: Any  # (own [N, ...], parents' [N, ...], bool [N]: who takes the parent's as it is) -> [N, ...], else own
  merge: Any  # (own [P, ...], server state, level of members, their shares [C, P], mesh, noise or None) -> both new


class Pool(NamedTuple):
  """Residual layers of one level, and who may get which of them."""

  residuals: Residuals  # leaves [N_j, R, M, ...]
  eligible: jax.Array  # bool [N, N_j]
  num_real: int  # how many of the N_j are no ghosts
  is_news: Any  # bool scalar: not so for what has been handed down before


class Descent(NamedTuple):
  """What a level sees in its down-phase."""

  level: LevelState  # as others know it
  own: model.Params  # as the nodes themselves know them; backbones as just received
  above: LevelState
  handed: trees.PyTree  # the parents' key layers as they arrived, leaves [N, ...]; None: just as they are
  pools: list[Pool]  # the residual layers on this side of the tree
  takes: dict[str, jax.Array]  # by part, bool [N]: who takes the parent's as it is
  topology: Topology
  nodes: NodeInputs
  phase: PhaseInputs
  payload: str


class Ascent(NamedTuple):
  """What a level of federations sees in its up-phase."""

  level: LevelState
  below: LevelState  # as others know it
  backbone: trees.PyTree  # as just merged, leaves [N, ...]
  weights: jax.Array  # float32 [C], of the level below: what its nodes weigh; 0 where they take no part
  own_weights: jax.Array  # float32 [N]: the same for the federations' own training
  shares: permitted.Shares  # what both make of it in the means of the P federations that there are
  takes_part: jax.Array  # bool [C]: whose key layers federations may look at
  members_mask: jax.Array  # bool [N, S]: which of Topology.children did
  topology: Topology
  topology_below: Topology
  nodes: NodeInputs
  phase: PhaseInputs
  noise: trees.PyTree  # what is added to the means of key layers' updates; None for nothing


class Received(NamedTuple):
  """What a down-phase makes of a level; leaves `[N, ...]`. Logs are small arrays for the records."""

  params: model.Params  # those that are not active keep what they have; the rest is not looked at for them
  residuals: Residuals | None  # the residual layers that nodes received
  error: trees.PyTree  # by part: what has not arrived of what their parents added; None where nothing is rounded
  log: Log


class KeyLayerRule(Protocol):
  """How key layers go down and up, and backbones that are a node's own with them."""

  def receive(self, descent: Descent) -> Received:
    """The down-phase of a level."""

  def merge(self, ascent: Ascent) -> tuple[trees.PyTree, trees.PyTree, Residuals | None, trees.PyTree, Log]:
    """New key layers, new updates, the residual layers each federation sends up, what it keeps to itself of what it
    merged (or None), and the log."""


class Algorithm(NamedTuple):
  """A row of the table of algorithms."""

  backbone: BackboneRule
  key_layers: KeyLayerRule
  shares: tuple[str, ...]  # the parts of a model that cross an edge: "backbone", "key_layers"
  tracks: tuple[str, ...] = ()  # the parts whose `LevelState.update` it looks at
  weights: str = "uniform"  # what a member weighs: see BackboneConfig
  needs_validation: bool = False  # whether it looks at the nodes' validation batches
  trusts: bool = False  # whether nodes use models between their parent's and their own (see exchange/trust.py)
  hands_all: bool = True  # whether nodes get their parent's model when they do not take it over, too
  goes_own_way: bool = False  # whether nodes may cease to take their parent's model (see exchange/relevance.py)
  payload: str = "float32"  # one of payload.KINDS; if not this one, `tracks` has all that it `shares`
  guards: GuardConfig = GuardConfig()  # what is rejected; where it has limits, `tracks` has all that it `shares`
  governance: Governance | None = None  # where nodes have rules of their own; `tracks` then has the same


KEPT_BACKBONE = BackboneRule(lambda own, parents, takes: own, lambda own, server, *members: (own, server))


class KeptKeyLayers(NamedTuple):
  """Key layers that never leave their node, as a `KeyLayerRule`."""

  def receive(self, descent: Descent) -> Received:
    """Those it has."""
    return Received(descent.own, descent.level.received, None, {})

  def merge(self, ascent: Ascent) -> tuple[trees.PyTree, trees.PyTree, Residuals | None, trees.PyTree, Log]:
    """Those it has."""
    return ascent.level.params["key_layers"], {}, ascent.level.residuals, None, {}


def take_over(own: trees.PyTree, parents: trees.PyTree, takes: jax.Array) -> trees.PyTree:
  """A `BackboneRule.receive`: the parent's for those who take it."""
  return trees.where(takes, parents, own)


def averaged(config: BackboneConfig, by_updates: bool = False) -> BackboneRule:
  """The members' weighted mean, applied by the server optimizer; members receive their federation's backbone.

  `by_updates` says that it is of what their updates hold, not of what they are away from it.
  """
  server, combine = backbone_lib.server_optimizer(config), robust.combiner(config)

  def merge(own, state, below, shares, mesh, noise):
    if below.errors is not None or by_updates or config.aggregate != "mean":
      # Rounded, what has not arrived of `own` at the members must not be lost.
      difference = combine(below.update["backbone"], shares, own["final_norm"].shape[0], mesh)
    elif below.private is not None and below.private.withheld:
      # What is released of them, without the rounding of what is not.
      is_bounded = jnp.isfinite(below.private.clip)[:, None]
      by_update, by_params = jnp.where(is_bounded, shares, 0.0), jnp.where(is_bounded, 0.0, shares)
      difference = trees.add(
        backbone_lib.mean_difference(own, below.params["backbone"], by_params, mesh),
        links.sum_members(below.update["backbone"], by_update, own["final_norm"].shape[0], mesh),
      )
    else:
      difference = backbone_lib.mean_difference(own, below.params["backbone"], shares, mesh)
    difference = difference if noise is None else trees.add(difference, noise)
    return backbone_lib.apply_server_optimizer(server, own, state, difference)

  return BackboneRule(take_over, merge)


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
    nodes: per-node inputs; nodes that are not active stay exactly as they are, and so do, but for the count, those
      whose parent's model is not finite.
    phase: the round.
  """
  known, handed, before, asked = level, level.handed, level, nodes

  def moved(before: LevelState, after: LevelState, who: NodeInputs) -> trees.PyTree:
    return own_way.movement(before, after, topology, who.active) if algorithm.goes_own_way else before.update

  if above is not None:
    known = edges.as_known(permitted.admitted(level, topology), algorithm.payload)
    known = known._replace(fresh=known.fresh & nodes.heard)
    known = known._replace(fresh=known.fresh & (_verdicts(algorithm, known, known.fresh, topology) == 0))
    handed = permitted.handed(level, topology, edges.handed(level, above, topology, algorithm.payload))
    if algorithm.goes_own_way:
      measured = nodes.active & phase.first_repeat
      level = level._replace(relevance=own_way.relevance(known, above, topology, measured, nodes.text_share))
  new_count: dict[str, Any] = {
    "errors": known.errors, "own_weight": jnp.zeros_like(level.own_weight), "weight": jnp.zeros_like(level.weight),
    "trained": jnp.zeros_like(level.trained), "fresh": jnp.zeros_like(level.fresh),
    "private": _begun(level.private, above, topology),
  }
  begun = level._replace(handed=handed, **new_count)
  if above is None:
    return _where_active(nodes, begun, level)._replace(update=moved(level, level, nodes)), {}
  if handed is None:
    parents = links.take_parents(above.params["backbone"], topology.parent, topology.num_parents, topology.mesh)
  else:
    parents = handed["backbone"]
  sound = guards_lib.finite({part: above.params[part] for part in algorithm.shares}, above.fresh)[topology.parent]
  nodes = nodes._replace(active=nodes.active & sound)  # nobody takes over what is not finite
  parents = permitted.parents(level, topology, "backbone", parents)
  takes = {"backbone": _takes(algorithm, level, nodes, nodes.backbone_independence, phase)}
  backbone = algorithm.backbone.receive(level.params["backbone"], parents, takes["backbone"])
  params, received = level.params | {"backbone": backbone}, level.received
  log: Log = {"hands_backbone": permitted.takes(topology, "backbone", takes["backbone"] | algorithm.hands_all),
              "refused": asked.active & ~sound}
  log |= {f"norm_{part}": trees.norms(above.params[part]) for part in algorithm.shares if above.params[part]}
  if params["key_layers"]:
    shares = _takes(algorithm, level, nodes, nodes.key_layer_independence, phase)
    takes["key_layers"] = permitted.takes(topology, "key_layers", shares)
    pools = _pools(level, above, deeper, topology, nodes, phase)
    params, received, error, key_log = algorithm.key_layers.receive(Descent(
      known, params, above, handed and handed.get("key_layers"), pools, takes, topology, nodes, phase,
      algorithm.payload,
    ))
    if level.kept and "key_layers" in level.kept:
      kept = trees.add(params["key_layers"], level.kept["key_layers"])
      params = params | {"key_layers": trees.where(takes["key_layers"], kept, params["key_layers"])}
    everybody = permitted.takes(topology, "key_layers", jnp.ones_like(shares))
    log |= key_log | ({"hands_key_layers": everybody} if algorithm.hands_all else {})
    if error is not None:
      begun = begun._replace(errors=begun.errors | {"addition": error})
  after = begun._replace(params=params, received=received)
  kept = _where_active(asked, before._replace(**new_count), before)
  found = _where_active(nodes, after, kept)._replace(params=after.params)
  return found._replace(update=moved(before, after, nodes)), log


def up(
  algorithm: Algorithm, topology: Topology, level: LevelState, below: LevelState, arrived: jax.Array,
  topology_below: Topology, nodes: NodeInputs, phase: PhaseInputs, guards: Guards | None = None,
) -> tuple[LevelState, Log]:
  """The up-phase: federations merge their members' backbones and key layers.

  Args:
    algorithm: the pair of rules.
    topology: of the federations' level.
    level: the federations.
    below: the level of their members.
    arrived: float32, what the members' updates count: 0 where none has come in, 1 in time, less if late.
    topology_below: of the members' level.
    nodes: per-node inputs of the federations; those that are not active stay exactly as they are.
    phase: the round.
    guards: where some federation noises its mean.
  """
  below = edges.as_known(permitted.admitted(below, topology_below), algorithm.payload)
  level = level._replace(update=news(level))
  verdict = _verdicts(algorithm, below, (arrived > 0) & below.fresh, topology_below)
  arrived = jnp.where(verdict == 0, arrived, 0.0)
  below_active = arrived > 0
  weight = jnp.where(below_active & nodes.active[topology_below.parent], arrived * below.weight, 0.0)
  travelling = permitted.travelling(topology_below, weight)
  gained = jax.ops.segment_sum(weight, topology_below.parent, level.weight.shape[0])
  sends = gained
  if travelling is not weight:
    sends = jax.ops.segment_sum(travelling, topology_below.parent, level.weight.shape[0])
  own_weight = jnp.where(level.trained, level.own_weight, 0.0)
  if algorithm.weights == "uniform":
    weight, own_weight = jnp.where(weight > 0, arrived, 0.0), jnp.float32(level.trained)
  shares = permitted.shares(topology, topology_below, "backbone", weight, own_weight)
  noise, private = {}, level.private
  if guards is not None and private is not None and below.private is not None:  # no rules then: see `algorithms.make`
    like = {part: level.params[part] for part in algorithm.shares}
    clip_C = below.private.clip
    noise = release.mean_noise(like, shares.mean, clip_C, guards.level, guards.below, private)
    parent_C = jnp.asarray(topology_below.parent)
    within_C = below.private.within
    private = release.merged(private, guards.level, guards.below, within_C, shares.mean, parent_C)
  own = level.params["backbone"]

  def merged_by(counts: jax.Array) -> tuple[trees.PyTree, trees.PyTree]:
    return algorithm.backbone.merge(own, level.server, below, counts, topology.mesh, noise.get("backbone"))

  merged, server = merged_by(shares.mean)
  log: Log = {"verdict": verdict, "share_backbone": jnp.sum(shares.mean, axis=1)}
  log |= {f"norm_{part}": trees.norms(moved) for part, moved in _moved(algorithm, level, below, topology_below).items()}
  log |= {"gain": below.gain} if below.gain is not None else {}
  key_layers, update, residuals, kept = level.params["key_layers"], level.update, level.residuals, level.kept
  if "backbone" in update:
    moved = trees.subtract(merged if shares.travels is None else merged_by(shares.travels)[0], own)
    update = update | {"backbone": trees.add(update["backbone"], moved)}
    kept = permitted.keep(level, "backbone", None if shares.stays is None else
                          trees.subtract(merged_by(shares.stays)[0], own))
  if key_layers:
    takes_part = permitted.members(topology_below, below_active, below)
    members_mask = jnp.asarray(topology.children_mask) & takes_part[topology.children]
    shares = permitted.shares(topology, topology_below, "key_layers", weight, own_weight)
    key_layers, key_update, residuals, stays, key_log = algorithm.key_layers.merge(
      Ascent(level, below, merged, weight, own_weight, shares, takes_part, members_mask, topology, topology_below,
             nodes, phase, noise.get("key_layers"))
    )
    update = update | {"key_layers": key_update} if "key_layers" in update else update
    kept = permitted.keep(level._replace(kept=kept), "key_layers", stays)
    log |= key_log
  after = level._replace(
    params={"backbone": merged, "key_layers": key_layers}, server=server, update=update, residuals=residuals,
    weight=level.weight + sends, fresh=level.fresh | (sends > 0), private=private, kept=kept,
  )
  return trees.where(nodes.active & (gained > 0), after, level), log  # where nobody trained, nothing is merged


def _moved(
  algorithm: Algorithm, level: LevelState, below: LevelState, topology_below: Topology
) -> dict[str, trees.PyTree]:
  """The updates that members send, by part; where they are not kept, what they are away from their federation."""
  parts = [part for part in algorithm.shares if level.params[part]]
  if set(parts) <= set(below.update):
    return {part: below.update[part] for part in parts}
  parents = links.take_parents({part: level.params[part] for part in parts}, topology_below.parent,
                               topology_below.num_parents, topology_below.mesh)
  return trees.subtract({part: below.params[part] for part in parts}, parents)


def _verdicts(algorithm: Algorithm, known: LevelState, there: jax.Array, topology: Topology) -> jax.Array:
  """Whose update is rejected, and why: int32 `[N]`, see `guards.judge`."""
  # Whether a model is finite can be said without its update.
  what = known.update or {part: known.params[part] for part in algorithm.shares}
  return guards_lib.judge(
    algorithm.guards, what, there, jnp.asarray(topology.siblings), jnp.asarray(topology.siblings_mask),
    topology.neighbours, topology.mesh,
  )


def _begun(
  private: release.Private | None, above: LevelState | None, topology: Topology
) -> release.Private | None:
  """After a down-phase: a clip that adapts to all members of a federation is known to them."""
  if private is None or above is None or above.private is None:
    return private
  theirs = links.take_parents(above.private.clip, topology.parent, topology.num_parents, topology.mesh)
  return private._replace(clip=jnp.where(jnp.asarray(topology.follows), theirs, private.clip))


def _takes(
  algorithm: Algorithm, level: LevelState, nodes: NodeInputs, independence: jax.Array, phase: PhaseInputs
) -> jax.Array:
  """Who takes the parent's part of the model as it is: bool `[N]`."""
  if not algorithm.goes_own_way:
    return nodes.active
  shares = relevance.shares(level.relevance, nodes.epochs, independence, phase.round_index, phase.num_rounds)
  return nodes.active & shares


def _where_active(nodes: NodeInputs, after: LevelState, before: LevelState) -> LevelState:
  """What `down` leaves: the rest as it was before. Rules see to parameters themselves, in place; updates stay."""
  kept: Any = {"params": None, "update": None}
  chosen = trees.where(nodes.active, after._replace(**kept), before._replace(**kept))
  return chosen._replace(params=before.params, update=before.update)


def _pools(
  level: LevelState, above: LevelState, deeper: dict[int, Residuals], topology: Topology, nodes: NodeInputs,
  phase: PhaseInputs,
) -> list[Pool]:
  """`pools` of a `Descent`: what federations have sent up, and what the level above has received."""
  found = []
  for j, eligible in topology.eligible.items():
    sent = deeper.get(j, level.residuals)
    if sent is not None and j not in deeper:
      sent = sent._replace(present=sent.present & nodes.heard[:, None, None])
    if sent is not None:
      found.append(Pool(sent, jnp.asarray(eligible), topology.num_real[j], jnp.bool_(True)))
  if above.received is not None:  # what a node received goes on to its children
    mine = jnp.asarray(topology.parent)[:, None] == jnp.arange(above.received.present.shape[0])[None, :]
    found.append(Pool(above.received, mine, topology.num_parents, phase.first_repeat))
  return found
