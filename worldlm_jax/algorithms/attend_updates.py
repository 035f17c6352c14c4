"""Nodes that attend to the updates of others: the rule of `worldlm` (equations in `exchange/attend.py`).

The candidates are what a node's parent learned, routed updates of layers, and those of siblings if told so; each is
used once. A parent without text of its own stands for everybody else: how far its model has moved since it was handed
down last is the mean of everybody's updates, out of which one's own share is taken, and it counts as many updates as
there are others. Where the paper (arXiv:2405.14446) is silent: a residual layer that a node received is offered to its
children with everything else in their pool; a federation takes its members' mean update for its own progress, and
offers the members' updates that agree with it least.

Key layers attend, and with `granularity=model` a backbone that is a node's own does so with them, all of it as one
unit. All of it is linear: one pass over the updates for their inner products, in which everything is decided, and one
that adds them up (`exchange/rows.py`). Axes: N nodes, S candidates, M key layers (and, in tables, the backbone as one
more), T tensors of a block, R residual layers, P layers in the pool, C members of federations, X all rows that a device
needs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldlm_jax import links, model, trees
from worldlm_jax.algorithms import acceptance, edges, permitted
from worldlm_jax.algorithms.rules import Ascent, Descent, Log, Received
from worldlm_jax.config import KeyLayerConfig
from worldlm_jax.exchange import attend, residuals as residuals_lib, robust, rows
from worldlm_jax.exchange.residuals import Residuals


class _Relatives(NamedTuple):
  """Where a node's candidates are; leaves `[N, ...]`."""

  parent: jax.Array  # int32 [N]: place in the level above
  parent_counts: jax.Array  # bool [N]: whether what the parent learned is news
  stands_for: jax.Array  # float32 [N]: of how many nodes' updates that is the mean; 0 where it is the parent's own
  own_share: jax.Array  # float32 [N]: what the node's own update counts in it
  siblings: jax.Array  # int32 [N, S]: places among the rows that `Neighbours.fetch` gives
  siblings_count: jax.Array  # bool [N, S]
  eligible: jax.Array  # bool [N, P, M or 1]: who may get which residual layer
  takes: jax.Array  # bool [N, 2]: whether it takes its parent's key layers, and backbone, as they are


class _Offered(NamedTuple):
  """What is known of the residual layers in the pool."""

  origin: jax.Array  # int32 [P, M]
  round: jax.Array  # int32 [P, M]
  counts: jax.Array  # bool [P, M]: there, and not used before


class AttendUpdates(NamedTuple):
  """Attention over updates with residual layers, as a `KeyLayerRule`."""

  config: KeyLayerConfig
  arch: model.Architecture
  any_validated: bool
  added: tuple[str, ...]  # see `attend.added_parts`
  combine: robust.Combine = links.sum_members  # how members' updates become one

  def receive(self, descent: Descent) -> Received:
    """The down-phase of a level: see `KeyLayerRule.receive`."""
    level, above, topology = descent.level, descent.above, descent.topology
    relatives, neighbours, offered = self._relatives(descent)
    parts = ["key_layers", "backbone"] if self.config.granularity == "model" else ["key_layers"]
    rounds = descent.handed is not None

    def on_device(base, update, fresh, theirs, above_update, pools, active, relatives, offered):
      num_layers, num_parents = jax.tree.leaves(base["key_layers"])[0].shape[1], topology.num_parents
      from_above = links.broadcast(num_parents, _num_rows(above_update))
      fetches = neighbours.fetch, from_above
      trees_of = update, above_update
      sources = [rows.Source(tree["key_layers"], fetch) for tree, fetch in zip(trees_of, fetches, strict=True)]
      news = [neighbours.fetch(jnp.int32(fresh)), jnp.ones(num_parents, jnp.int32)]
      first_parent = len(active) * neighbours.num_blocks
      known = first_parent + num_parents  # of these rows the backbone is known, too
      for pool, layers in zip(descent.pools, pools, strict=True):
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), layers)
        num_real = pool.num_real * pool.residuals.present.shape[1]
        sources.append(rows.Source(flat, links.broadcast(num_real, _num_rows(flat))))
        news.append(jnp.ones(num_real, jnp.int32))
      gram = jnp.stack(rows.gram(sources))
      if "backbone" in base:  # as one more layer, of a single tensor
        backbones = [rows.Source(rows.layered(tree["backbone"]), fetch)
                     for tree, fetch in zip(trees_of, fetches, strict=True)]
        table = jnp.zeros_like(gram[0, 0]).at[:known, :known].set(rows.total(rows.gram(backbones)))
        gram = jnp.concatenate([gram, jnp.zeros_like(gram[:, :1]).at[0, 0].set(table)], axis=1)
      counts_X = jnp.all(jnp.isfinite(jnp.diagonal(gram, axis1=2, axis2=3)), axis=(0, 1)) & (jnp.concatenate(news) > 0)
      gram = jnp.where(counts_X[:, None] & counts_X[None, :], gram, 0.0)

      def choose(n, relatives):
        return self._choose(gram, counts_X, n, relatives, offered, first_parent, num_parents, num_layers)

      coefficients_NxTxMxX, routed, log = jax.vmap(choose)(jnp.arange(len(active)), relatives)
      coefficients_NxTxMxX = jnp.where(active[:, None, None, None], coefficients_NxTxMxX, 0.0)
      c_TxMxNxX = jnp.moveaxis(coefficients_NxTxMxX, 0, 2)
      instead = rows.Instead(rows.Source(theirs, from_above), relatives.parent, relatives.takes[:, 0])
      if rounds:
        instead = instead._replace(source=rows.Source(theirs, lambda rows: rows), place=jnp.arange(len(active)))
      mixed = {"key_layers": rows.combine(base["key_layers"], c_TxMxNxX[:, :num_layers], sources, counts_X, instead)}
      if "backbone" in base:
        backbone, c_NxX = rows.layered(base["backbone"]), c_TxMxNxX[0, num_layers, :, :known]
        each = [jnp.broadcast_to(c_NxX, (leaf.shape[1], *c_NxX.shape)) for leaf in jax.tree.leaves(backbone)]
        added = rows.combine(backbone, each, backbones, counts_X[:known])
        mixed["backbone"] = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), added, base["backbone"])
      received = _picked(update["key_layers"], routed, sources, counts_X) if level.received is not None else None
      return mixed, received, log

    run = links.on_devices(on_device, topology.mesh, num_everywhere=1)
    own, pools = {part: descent.own[part] for part in parts}, [pool.residuals.layers for pool in descent.pools]
    mixed, layers, log = run(
      trees.zeros_like(own) if rounds else own, {part: level.update[part] for part in parts}, level.fresh,
      descent.handed if rounds else above.params["key_layers"], {part: above.update[part] for part in parts}, pools,
      descent.nodes.active, relatives, offered,
    )
    error = None
    if rounds:
      error = {}
      for part, before in level.errors["addition"].items():
        arrived = edges.added(own[part], mixed[part], before, descent.payload)
        kept = own[part] if part == "backbone" else mixed[part]  # the parent's backbone has been taken before
        mixed[part], error[part] = trees.where(descent.takes[part], (kept, before), arrived)
      mixed = trees.where(descent.nodes.active, mixed, own)
    received = None
    if level.received is not None:
      present = log["routed_origin"] >= 0
      received = Residuals(layers, log["routed_origin"], log["routed_round"], present)
    takes = descent.takes["key_layers"]
    from_parent_S = jnp.arange(log["weights"].shape[1]) == 0
    shown = takes & descent.takes["backbone"] if len(parts) > 1 else takes
    log["weights"] = jnp.where(shown[:, None, None], jnp.float32(from_parent_S)[None, :, None], log["weights"])
    log |= {"hands_key_layers": takes, "attends": ~shown}
    log |= {f"hands_addition_{part}": ~descent.takes[part] for part in self.added}
    after = descent.own | mixed
    before = descent.own | {"key_layers": trees.where(takes, after["key_layers"], descent.own["key_layers"])}
    after, log["accepted"] = self._accepted(descent, before, after)
    return Received(after, received, error, log)

  def _relatives(self, descent: Descent) -> tuple[_Relatives, links.Neighbours, _Offered]:
    """Where all nodes' candidates are, whose rows they need for that, and what is known of the pool."""
    level, topology, nodes = descent.level, descent.topology, descent.nodes
    offered, eligible = _offered(descent)
    trained = descent.above.trained[topology.parent]
    stands_for = jnp.where(trained, 0.0, nodes.num_others)
    counts = permitted.parent_counts(topology, trained) & descent.phase.first_repeat & (trained | (stands_for > 0))
    neighbours, siblings = topology.neighbours, permitted.siblings(topology)
    if self.config.candidates == "siblings":
      counts &= trained
    elif self.config.candidates == "everybody":
      neighbours, siblings = links.NOBODY, np.zeros_like(siblings)
    relatives = _Relatives(
      jnp.asarray(topology.parent), counts, stands_for, jnp.where(trained, 0.0, nodes.text_share),
      jnp.asarray(topology.neighbours.siblings), jnp.asarray(siblings) & level.fresh[topology.siblings], eligible,
      jnp.stack([descent.takes["key_layers"], descent.takes["backbone"]], axis=1),
    )
    return relatives, neighbours, offered

  def _choose(
    self, gram, counts_X, n, relatives: _Relatives, offered: _Offered, first_parent: int, num_parents: int,
    num_layers: int,
  ):
    """What the n-th of the device's nodes adds: coefficients `[T, M, X]`, the rows routed to it, and its log."""
    count = self.config.residuals_received if len(offered.origin) else 0
    of_layers, of_all = gram[:, :num_layers], gram.shape[1]
    log = {}
    routed_RxM, there_RxM = jnp.zeros((0, num_layers), jnp.int32), jnp.zeros((0, num_layers), bool)
    if count:
      index_P = jnp.arange(len(offered.origin)) + first_parent + num_parents
      counts_PxM = offered.counts & relatives.eligible & counts_X[index_P][:, None]
      scores_PxM = self._routing_scores(of_layers, n, index_P, counts_PxM)
      place_RxM, there_RxM = residuals_lib.choose(scores_PxM, counts_PxM, count)
      routed_RxM = place_RxM + first_parent + num_parents
      log = {name: jnp.where(there_RxM, jnp.take_along_axis(getattr(offered, kind), place_RxM, axis=0), -1)
             for name, kind in (("routed_origin", "origin"), ("routed_round", "round"))}
      squares_MxX = jnp.sum(jnp.diagonal(of_layers, axis1=2, axis2=3), axis=0)
      log["norm_residual"] = jnp.sqrt(jnp.take_along_axis(squares_MxX.T, routed_RxM, axis=0))

    def every_layer(x: jax.Array) -> jax.Array:
      return jnp.broadcast_to(x[:, None], (len(x), of_all))

    more = [(0, 0), (0, of_all - num_layers)]
    index_CxM = jnp.concatenate([
      every_layer(jnp.stack([n, first_parent + relatives.parent])), jnp.pad(routed_RxM, more),
      every_layer(relatives.siblings),
    ])
    mask_SxM = jnp.concatenate([
      every_layer(relatives.parent_counts[None]), jnp.pad(there_RxM, more), every_layer(relatives.siblings_count)
    ]) & counts_X[index_CxM[1:]]
    # What it takes over is no part of what attends.
    own_M = jnp.append(jnp.broadcast_to(~relatives.takes[0], num_layers), ~relatives.takes[1])[:of_all]
    of_layer = jax.vmap(lambda table_TxXxX, index_C: table_TxXxX[:, index_C][:, :, index_C], (1, 1), 1)
    apart_CxC = _without_own(relatives.own_share, len(index_CxM))
    gram_TxMxCxC = of_layer(jnp.where(own_M[:, None, None], gram, 0.0), index_CxM)
    means_S = jnp.zeros(len(mask_SxM)).at[0].set(relatives.stands_for)
    c_TxMxC, weights, _ = attend.update_coefficients(
      jnp.einsum("ac,tmcd,bd->tmab", apart_CxC, gram_TxMxCxC, apart_CxC, precision="highest"), mask_SxM,
      self.config.granularity, strength=self.config.update_strength, threshold=self.config.update_threshold,
      norm_cap=self.config.update_norm_cap, means_S=means_S,
    )
    c_TxMxC = jnp.where(own_M[:, None], jnp.einsum("tma,ac->tmc", c_TxMxC, apart_CxC, precision="highest"), 0.0)
    layer_MxC = jnp.broadcast_to(jnp.arange(of_all)[:, None], index_CxM.T.shape)
    c_TxMxX = jnp.zeros(gram.shape[:3]).at[:, layer_MxC, index_CxM.T].add(c_TxMxC)
    weights_SxM = jnp.broadcast_to(jnp.mean(weights, axis=0), mask_SxM.shape)[:, :num_layers]
    # The norm of what is added, from inner products.
    with_sum_TxMxX = jnp.einsum("tmxy,tmy->tmx", gram, c_TxMxX, precision=jax.lax.Precision.HIGHEST)
    squared = jnp.maximum(jnp.sum(c_TxMxX * with_sum_TxMxX), 0.0)
    log |= {"weights": weights_SxM, "norm_addition": jnp.sqrt(squared)}
    return c_TxMxX, (routed_RxM, there_RxM), log

  def _routing_scores(self, gram, n, index_P, counts_PxM):
    """How similar the pooled updates are to the n-th node's own, or to their mean where it has none: `[P, M]`."""
    table_MxXxX = jnp.sum(gram, axis=0)
    moves = jnp.any(table_MxXxX[:, n, n] > 0)
    number_M = jnp.maximum(jnp.sum(counts_PxM, axis=0), 1)
    both_MxPxP = counts_PxM.T[:, :, None] & counts_PxM.T[:, None, :]
    pool_MxPxP = jnp.where(both_MxPxP, table_MxXxX[:, index_P][:, :, index_P], 0.0)
    mean_MxP = jnp.sum(pool_MxPxP, axis=1) / number_M[:, None]
    products_MxP = jnp.where(moves, table_MxXxX[:, n, index_P], mean_MxP)
    if self.config.similarity == "scaled_dot":
      return products_MxP.T
    own_squared_M = jnp.where(moves, table_MxXxX[:, n, n], jnp.sum(mean_MxP, axis=1) / number_M)
    squares_MxP = jnp.diagonal(pool_MxPxP, axis1=1, axis2=2)
    return attend.cosine(products_MxP, own_squared_M[:, None], squares_MxP).T

  def merge(self, ascent: Ascent) -> tuple[trees.PyTree, trees.PyTree, Residuals | None, trees.PyTree, Log]:
    """The up-phase of a level: see `KeyLayerRule.merge`."""
    level, below, topology = ascent.level, ascent.below, ascent.topology
    own, update = level.params["key_layers"], level.update["key_layers"]
    num_rows, num_layers = _num_rows(own), jax.tree.leaves(own)[0].shape[1]
    sums_CxPxQ = jnp.stack(ascent.shares.sums, axis=2)
    num_sums = sums_CxPxQ.shape[2]
    num_federations = sums_CxPxQ.shape[1]
    coefficients_CxMxPxQ = jnp.broadcast_to(
      sums_CxPxQ[:, None], (len(ascent.weights), num_layers, num_federations, num_sums)
    )
    sent = None
    if level.residuals is not None:
      sent, member_NxRxM = self._selected(ascent, level.residuals)
      picks_NxRxMxC = jnp.where(sent.present[..., None], jax.nn.one_hot(member_NxRxM, len(ascent.weights)), 0.0)
      picks_CxMxPxR = jnp.transpose(picks_NxRxMxC[:num_federations], (3, 2, 0, 1))
      coefficients_CxMxPxQ = jnp.concatenate([coefficients_CxMxPxQ, picks_CxMxPxR], axis=3)
    sums_per_node = coefficients_CxMxPxQ.shape[3]
    sums = links.sum_members(
      below.update["key_layers"], coefficients_CxMxPxQ.reshape(len(ascent.weights), num_layers, -1),
      num_rows * sums_per_node, topology.mesh,
    )
    sums = jax.tree.map(lambda leaf: leaf.reshape(num_rows, sums_per_node, *leaf.shape[1:]), sums)
    mean, *apart = (jax.tree.map(lambda leaf, i=i: leaf[:, i], sums) for i in range(num_sums))
    if self.combine is not links.sum_members:
      mean = self.combine(below.update["key_layers"], ascent.shares.mean, num_rows, topology.mesh)
    mean = mean if ascent.noise is None else trees.add(mean, ascent.noise)
    if sent is not None:
      sent = sent._replace(layers=jax.tree.map(lambda leaf: leaf[:, num_sums:], sums))
    before = {"backbone": ascent.backbone, "key_layers": own}
    mixed, accepted = self._accepted(ascent, before, before | {"key_layers": trees.add(own, mean)})
    # What it takes over from its members is its own progress from now on, as far as it may go further.
    update = trees.where(accepted, trees.add(update, apart[0] if apart else mean), update)
    stays = trees.where(accepted, apart[1], trees.zeros_like(apart[1])) if apart else None
    share_C = jnp.sum(ascent.shares.mean, axis=1)
    weights_NxS = jnp.where(ascent.members_mask, share_C[topology.children], 0.0)
    weights = jnp.broadcast_to(weights_NxS[:, :, None], (*weights_NxS.shape, num_layers))
    log = {"weights": weights, "accepted": accepted, "share_key_layers": share_C}
    return mixed["key_layers"], update, sent, stays, log

  def _selected(self, ascent: Ascent, before: Residuals) -> tuple[Residuals, jax.Array]:
    """What each federation sends up after `before`, but for its layers, and whose they are: int32 `[N, R, M]`, of C."""
    level, below, topology, topology_below = ascent.level, ascent.below, ascent.topology, ascent.topology_below
    share_C, counts_C = jnp.sum(ascent.shares.mean, axis=1), ascent.takes_part & below.fresh

    def of_siblings(values_C: jax.Array) -> jax.Array:
      return jnp.where(topology_below.siblings_mask, values_C[topology_below.siblings], 0)

    def on_device(update, siblings_CxS, share_CxS, counts_CxS):
      gram = rows.gram([rows.Source(update, topology_below.neighbours.fetch)])
      own = jnp.arange(len(siblings_CxS))[:, None]
      return jax.vmap(_use, (None, 0, 0, 0))(
        functools.reduce(jnp.add, gram), jnp.concatenate([own, siblings_CxS], axis=1), share_CxS, counts_CxS
      )

    use_CxM = links.on_devices(on_device, topology.mesh)(
      below.update["key_layers"], jnp.asarray(topology_below.neighbours.siblings),
      jnp.concatenate([share_C[:, None], of_siblings(share_C)], axis=1),
      jnp.concatenate([counts_C[:, None], of_siblings(counts_C)], axis=1),
    )
    count, num_layers = before.present.shape[1:]
    mask_NxS = ascent.members_mask & below.fresh[topology.children]
    # A federation with a single layer to take has nothing that it could not use.
    offered_NxS = mask_NxS & (jnp.sum(mask_NxS, axis=1) + level.trained > 1)[:, None]
    offered_NxS &= permitted.offered(topology_below, ascent.takes_part)[topology.children]
    offered_NxSxM = jnp.broadcast_to(offered_NxS[:, :, None], (*offered_NxS.shape, num_layers))
    place_NxRxM, present = jax.vmap(residuals_lib.choose, (0, 0, None))(
      -use_CxM[topology.children], offered_NxSxM, count
    )
    member_NxRxM = jax.vmap(lambda children_S, place_RxM: children_S[place_RxM])(
      jnp.asarray(topology.children), place_NxRxM
    )
    origin = jnp.asarray(topology_below.member)[member_NxRxM]
    made = jnp.full_like(origin, ascent.phase.round_index)
    return before._replace(origin=origin, round=made, present=present), member_NxRxM

  def _accepted(
    self, phase: Descent | Ascent, own: model.Params, mixed: model.Params
  ) -> tuple[model.Params, jax.Array]:
    """Keeps the own models of nodes that ask for validation, where the mixed ones are worse."""
    if not self.any_validated:
      return mixed, jnp.ones(phase.nodes.active.shape, bool)
    return jax.vmap(functools.partial(acceptance.accept, self.arch))(phase.nodes, own, mixed)


def _without_own(own_share: jax.Array, count: int) -> jax.Array:
  """From the rows of one's own update and of a mean in which it has a share, those of it and of the mean of the rest.

  `[C, C]`; all others stay.
  """
  rest = 1 / (1 - jnp.minimum(own_share, 1 - 1e-6))
  return jnp.eye(count).at[1, :2].set(jnp.stack([-own_share * rest, rest]))


def _use(table_MxXxX: jax.Array, index_C: jax.Array, share_C: jax.Array, counts_C: jax.Array) -> jax.Array:
  """How far the mean of a federation's members agrees with the first of them: cosines `[M]`.

  `index_C` says where the members are in the table of inner products, `share_C` what they count in the mean. Where
  that is zero everywhere, the plain mean of those that count takes its place.
  """
  there_C = (share_C > 0) | counts_C | (jnp.arange(len(index_C)) == 0)
  table = jnp.where(there_C[:, None] & there_C[None, :], table_MxXxX[:, index_C][:, :, index_C], 0.0)

  def products(c_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    with_each_MxC = jnp.sum(table * c_C[None, None, :], axis=2)
    return with_each_MxC[:, 0], jnp.sum(with_each_MxC * c_C[None, :], axis=1)

  shared = products(share_C)
  plain = products(counts_C / jnp.maximum(jnp.sum(counts_C), 1))
  with_first_M, squared_M = trees.where(jnp.any(shared[1] > 0), shared, plain)
  return attend.cosine(with_first_M, squared_M, table[:, 0, 0])


def _offered(descent: Descent) -> tuple[_Offered, jax.Array]:
  """What the pools of a level hold, one after the other and without ghosts, and who may get which: bool
  `[N, P, M or 1]`.

  What was used before is not offered: each update is used once, and not when it is old.
  """
  num_nodes, num_layers = jax.tree.leaves(descent.level.params["key_layers"])[0].shape[:2]
  nothing = jnp.zeros((0, num_layers), jnp.int32)
  found, eligible = [_Offered(nothing, nothing, nothing.astype(bool))], [jnp.zeros((num_nodes, 0), bool)]
  for pool in descent.pools:
    own = jax.tree.map(lambda leaf, pool=pool: leaf[: pool.num_real].reshape(-1, num_layers), pool.residuals[1:])
    origin, made, present = own
    found.append(_Offered(origin, made, present & pool.is_news & (made >= descent.phase.round_index - 1)))
    eligible.append(jnp.repeat(pool.eligible[:, : pool.num_real], pool.residuals.present.shape[1], axis=1))
  offered = trees.concatenate(found)
  return offered, permitted.residuals(descent.topology, jnp.concatenate(eligible, axis=1), offered.origin)


def _picked(
  update: trees.PyTree, routed: tuple[jax.Array, jax.Array], sources: list[rows.Source], counts_X: jax.Array
) -> trees.PyTree:
  """The layers at rows int32 `[N, R, M]` of the sources, zero where there is none: leaves `[N, R, M, ...]`."""
  index_NxRxM, there_NxRxM = routed
  num_nodes, count, num_layers = index_NxRxM.shape
  picks_NxRxMxX = jnp.where(there_NxRxM[..., None], jax.nn.one_hot(index_NxRxM, len(counts_X)), 0.0)
  picks_MxQxX = jnp.moveaxis(picks_NxRxMxX, 2, 0).reshape(num_layers, num_nodes * count, -1)
  empty = jax.tree.map(lambda leaf: jnp.zeros((num_nodes * count, *leaf.shape[1:]), leaf.dtype), update)
  coefficients = jnp.broadcast_to(picks_MxQxX, (len(jax.tree.leaves(update)), *picks_MxQxX.shape))
  layers = rows.combine(empty, coefficients, sources, counts_X)
  return jax.tree.map(lambda leaf: leaf.reshape(num_nodes, count, *leaf.shape[1:]), layers)


def _num_rows(tree: trees.PyTree) -> int:
  return jax.tree.leaves(tree)[0].shape[0]
