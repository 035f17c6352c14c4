"""Key layers that attend to whole layers of others, as in the paper (equations in `exchange/attend.py`).

Where the paper (arXiv:2405.14446) is silent: in the down-phase all candidates have the same prior; a residual layer
that a node received is offered to its children with everything else in their pool; a federation that did not train
has no direction of its own and takes its members' mean one.

Every node gathers its candidates whole, so that it takes memory for as many key layers as there are candidates. Axes
as in `exchange/attend.py`: N nodes, S candidates, M key layers, P pooled residual layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from worldlm_jax import model, trees
from worldlm_jax.algorithms import acceptance, permitted
from worldlm_jax.algorithms.rules import Ascent, Descent, Log, NodeInputs, Received
from worldlm_jax.config import KeyLayerConfig
from worldlm_jax.exchange import attend, caps, residuals as residuals_lib
from worldlm_jax.exchange.residuals import Residuals
from worldlm_jax.state import news


class AttendLayers(NamedTuple):
  """Attention over layers with residual layers, as a `KeyLayerRule`."""

  config: KeyLayerConfig
  arch: model.Architecture
  any_validated: bool

  def receive(self, descent: Descent) -> Received:
    """The down-phase of a level: see `KeyLayerRule.receive`."""
    level, above, topology = descent.level, descent.above, descent.topology
    pool, eligible_NxPxM = _joined(descent)
    may_take_N = permitted.takes(topology, "key_layers", jnp.ones_like(descent.takes["key_layers"]))
    restricted = topology.permissions is not None

    def one(node, takes, kept, own, update, parents, may_take, eligible_PxM, backbone):
      if descent.handed is None:
        parents = trees.take(above.params["key_layers"], parents)
      if restricted:
        parents = trees.where(may_take, parents, own)
      received, log = None, {}
      if pool is not None:
        received = self._route(pool, eligible_PxM, *self._query(own, update, parents))
        log = {"routed_origin": jnp.where(received.present, received.origin, -1), "routed_round": received.round,
               "norm_residual": jax.vmap(trees.norms)(received.layers)}
      candidates = _stack([own, parents], received, None)
      mask_SxM = _masks([jnp.bool_(True), may_take], received, None, own)
      query = own, *self._query(own, update, parents)
      prior_S = jnp.ones(mask_SxM.shape[0])
      mixed, weights = self._attend(query, candidates, mask_SxM, prior_S, node, backbone, own_first=True)
      mixed, accepted = self._accept(own, mixed, node, backbone)
      from_parent = jnp.arange(mask_SxM.shape[0]) == 1
      weights = jnp.where(takes, jnp.float32(from_parent)[:, None], weights)
      mixed = trees.where(node.active, trees.where(takes, parents, mixed), kept)
      log |= {"hands_key_layers": may_take, "weights": weights, "accepted": accepted}
      return mixed, received if level.received is not None else None, log

    # Rounded or noised, a node goes on from its layers as its parent knows them, lest that mix other ones than it has.
    mixed, received, log = jax.vmap(one)(
      descent.nodes, descent.takes["key_layers"], descent.own["key_layers"], level.params["key_layers"],
      news(level)["key_layers"], topology.parent if descent.handed is None else descent.handed, may_take_N,
      eligible_NxPxM, descent.own["backbone"],
    )
    return Received(descent.own | {"key_layers": mixed}, received, None, log)

  def merge(self, ascent: Ascent) -> tuple[trees.PyTree, trees.PyTree, Residuals | None, trees.PyTree, Log]:
    """The up-phase of a level: see `KeyLayerRule.merge`."""
    level, below = ascent.level, ascent.below
    caps_N, offers_C = permitted.caps_of(ascent.topology), permitted.offered(ascent.topology_below, ascent.takes_part)

    def one(node, own, update, trained, own_weight, members_S, mask_S, backbone, cap):
      mask_SxM = _masks([], None, mask_S, own)
      weight_S = jnp.where(mask_S, ascent.weights[members_S], 0.0)
      base = trees.where(trained, update, trees.zeros_like(update))
      layers = trees.take(below.params["key_layers"], members_S)
      all_mask_SxM = _masks([trained], None, mask_S, own)
      all_weights_S = jnp.append(own_weight, weight_S)
      prior_S = jnp.ones_like(all_weights_S) if self.config.prior == "uniform" else all_weights_S
      query = own, *self._query(own, base, trees.subtract(own, base))
      mixed, weights = self._attend(query, _stack([own], None, layers), all_mask_SxM, prior_S, node, backbone, cap=cap)
      mixed, accepted = self._accept(own, mixed, node, backbone)
      sent = None
      if level.residuals is not None:
        # A federation with a single layer to take has nothing that it could not use.
        offered_SxM = mask_SxM & offers_C[members_S][:, None] & (jnp.sum(mask_S) + trained > 1)
        origin_S, count = jnp.asarray(ascent.topology_below.member)[members_S], level.residuals.present.shape[1]
        sent = residuals_lib.select(layers, weights[1:], offered_SxM, origin_S, ascent.phase.round_index, count)
      if level.handed is not None:  # what a federation sends up is all that has changed
        update = trees.add(update, trees.subtract(mixed, own))
      return mixed, update, sent, {"weights": weights, "accepted": accepted}

    mixed, update, sent, log = jax.vmap(one)(
      ascent.nodes, level.params["key_layers"], level.update["key_layers"], level.trained, ascent.own_weights,
      ascent.topology.children, ascent.members_mask, ascent.backbone, caps_N,
    )
    return mixed, update, sent, None, log

  def _route(
    self, pool: Residuals, eligible_PxM: jax.Array, direction: trees.PyTree, reference: trees.PyTree | None
  ) -> Residuals:
    """The pooled layers most similar to a node's own. Losses would cost too much: cosines stand in for them."""
    similarity = "param_cosine" if self.config.similarity == "validation_loss" else self.config.similarity
    there = pool.present & eligible_PxM
    scores = attend.parameter_scores(similarity, "layer", direction, reference, pool.layers, there)
    return residuals_lib.route(pool, eligible_PxM, scores[0], self.config.residuals_received)

  def _query(
    self, own: trees.PyTree, update: trees.PyTree, parents: trees.PyTree
  ) -> tuple[trees.PyTree, trees.PyTree | None]:
    """The direction that candidates are compared with, and the point they are seen from."""
    if self.config.similarity == "centered_cosine":  # displacement from the parent's layer
      return trees.subtract(own, parents), parents
    if self.config.similarity == "update_cosine":  # displacement from where the node's own training began
      return update, trees.subtract(own, update)
    return own, None

  def _attend(self, query, candidates, mask_SxM, prior_S, node, backbone, *, own_first=False, cap=None):
    """Mixed layers and the weights `[S, M]`, averaged over tensors; `query` is (own, direction, reference).

    `own_first` says that the first candidate is the node itself, which by any cosine is most like itself. `cap`, where
    there is one, is the largest weight of any but the first candidate; what is left falls to that one.
    """
    config, (own, direction, reference) = self.config, query
    if config.similarity == "validation_loss":
      loss = acceptance.validation_loss(self.arch, node, backbone)
      scores = attend.loss_scores(config.granularity, own, candidates, loss)
      scores = jnp.where(node.num_windows > 0, scores, 0.0)  # without data of its own, no preference
    else:
      scores = attend.parameter_scores(
        config.similarity, config.granularity, direction, reference, candidates, mask_SxM
      )
    scores = jnp.broadcast_to(scores, (scores.shape[0], *mask_SxM.shape))
    if own_first and config.similarity.endswith("cosine"):
      keeps = (node.temperature == 0) & (jnp.arange(mask_SxM.shape[0]) == 0)
      scores = jnp.where(keeps[None, :, None], jnp.inf, scores)
    weights = attend.attention_weights(scores, mask_SxM, prior_S, node.temperature)
    if cap is not None:
      cap_M = jnp.broadcast_to(cap, weights.shape[2:])
      others = jax.vmap(caps.capped, (0, 0, None))(weights[:, 1:], weights[:, 0], cap_M)
      rest = jnp.sum(weights, axis=1) - jnp.sum(others, axis=1)
      weights = jnp.concatenate([rest[:, None], others], axis=1)
    return attend.mix(own, candidates, weights), jnp.mean(weights, axis=0)

  def _accept(self, own, mixed, node: NodeInputs, backbone):
    """Keeps the own layers where the node asks for validation and the mixed ones are worse."""
    if not self.any_validated:
      return mixed, jnp.bool_(True)
    before, after = ({"backbone": backbone, "key_layers": layers} for layers in (own, mixed))
    kept, accepted = acceptance.accept(self.arch, node, before, after)
    return kept["key_layers"], accepted


def _joined(descent: Descent) -> tuple[Residuals | None, jax.Array]:
  """All pools as one, leaves `[P, M, ...]`, and who may get which layer of it: bool `[N, P, M or 1]`."""
  if not descent.pools:
    return None, jnp.zeros((len(descent.takes["key_layers"]), 0, 1), bool)
  flat = [jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), pool.residuals) for pool in descent.pools]
  eligible = [jnp.repeat(pool.eligible, pool.residuals.present.shape[1], axis=1) for pool in descent.pools]
  pool = trees.concatenate(flat)
  return pool, permitted.residuals(descent.topology, jnp.concatenate(eligible, axis=1), pool.origin)


def _stack(first: list, received: Residuals | None, last: trees.PyTree | None) -> trees.PyTree:
  """Joins single layers, received residual layers and a stack of layers: leaves `[S, M, ...]`."""
  parts = [jax.tree.map(lambda leaf: leaf[None], layers) for layers in first]
  parts += [received.layers] if received is not None else []
  parts += [last] if last is not None else []
  return trees.concatenate(parts)


def _masks(first: list, received: Residuals | None, last_S: jax.Array | None, key_layers: trees.PyTree) -> jax.Array:
  """The mask `[S, M]` of what `_stack` joins."""
  num_layers = jax.tree.leaves(key_layers)[0].shape[0]
  parts = [jnp.broadcast_to(there, (1, num_layers)) for there in first]
  parts += [received.present] if received is not None else []
  parts += [jnp.broadcast_to(last_S[:, None], (last_S.shape[0], num_layers))] if last_S is not None else []
  return jnp.concatenate(parts)
