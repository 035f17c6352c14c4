"""WorldLM: nodes share their federation's model, then go their own way; key layers attend to those of others.

After A. Iacob, L. Sani, B. Marino, P. Aleksandrov, W. F. Shen, N. D. Lane, "Worldwide Federated Training of
Language Models", arXiv:2405.14446.

  down   B_q <- B_p while q shares it
         K_q <- K_p while q shares them, else attend(K_q, memory + residual layers routed to q)
  up     B_p <- server_optimizer(B_p, mean_c D_c);  K_p <- K_p + mean_c D_c     D: changes since the down-phase

How long a node shares is ours (`exchange/relevance.py`), and so is attention over updates.
With attention over layers the memory is {K_q, K_p}, and {K_c} + {K_p if p trained} in the up-phase, where it takes the
place of the mean. Where the paper is silent: in the down-phase all candidates have the same prior; a residual layer
that a node received is offered to its children with everything else in their pool; a federation that did not train
has no direction of its own and takes its members' mean one. With attention over updates the candidates are the updates
of siblings, of a parent that trained, and routed ones; each is used once.

Axes as in `exchange/attend.py`: N nodes, S candidates, M key layers, P pooled residual layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from worldlm_jax import model, scoring, trees
from worldlm_jax.algorithms.rules import Algorithm, Ascent, BackboneRule, Descent, Log, NodeInputs
from worldlm_jax.config import Config, KeyLayerConfig
from worldlm_jax.exchange import attend, backbone as backbone_lib, residuals as residuals_lib
from worldlm_jax.exchange.residuals import Residuals
from worldlm_jax.federation import Federation, as_given

arrange, has_key_layers = as_given, True


def make(config: Config, arch: model.Architecture, federation: Federation) -> Algorithm:
  """The pair of rules."""
  server = backbone_lib.server_optimizer(config.backbone)

  def receive(own, parents, takes):
    return trees.where(takes, parents, own)

  def merge(own, state, below, parent, weights, own_weights):
    mean = backbone_lib.mean_update(below.update["backbone"], parent, weights, own_weights)
    return backbone_lib.apply_server_optimizer(server, own, state, mean)

  any_validated = any(member.settings.acceptance == "validated" for member in federation.members)
  trusts = any(member.settings.trust == "validated" for member in federation.members)
  return Algorithm(
    BackboneRule(receive, merge), AttendRule(config.key_layers, arch, any_validated), shares=("backbone", "key_layers"),
    tracks=("backbone", "key_layers"), weights=config.backbone.weights,
    needs_validation=trusts or any_validated or config.key_layers.similarity == "validation_loss", trusts=trusts,
  )


class AttendRule(NamedTuple):
  """Attention over parameters with residual layers, as a `KeyLayerRule`."""

  config: KeyLayerConfig
  arch: model.Architecture
  any_validated: bool

  def receive(self, descent: Descent) -> tuple[trees.PyTree, Residuals | None, Log]:
    """The down-phase of a level: see `KeyLayerRule.receive`."""
    level, above, topology = descent.level, descent.above, descent.topology
    over_updates = self.config.values == "updates"
    pool = self._news(descent) if over_updates else descent.pool

    def one(node, takes, own, update, parent, eligible_P, siblings_S, siblings_mask_S, backbone):
      parents = trees.take(above.params["key_layers"], parent)
      received, log = None, {}
      if pool is not None and level.received is not None:
        received = self._route(pool, eligible_P, *self._query(own, update, parents), level.received.present.shape[1])
        log = {"routed_origin": jnp.where(received.present, received.origin, -1), "routed_round": received.round}
      loss = self._loss(node, backbone)
      if over_updates:
        siblings = trees.take(level.update["key_layers"], siblings_S)
        candidates = _stack([trees.take(above.update["key_layers"], parent)], received, siblings)
        mask_SxM = _masks(
          [above.trained[parent] & descent.phase.first_repeat], received,
          siblings_mask_S & level.fresh[siblings_S], own,
        )
        addition, weights, _ = self._attend_updates(update, candidates, mask_SxM)
        mixed = trees.add(own, addition)
      else:
        candidates = _stack([own, parents], received, None)
        mask_SxM = _masks([jnp.bool_(True)] * 2, received, None, own)
        query = own, *self._query(own, update, parents)
        prior_S = jnp.ones(mask_SxM.shape[0])
        mixed, weights = self._attend_layers(query, candidates, mask_SxM, prior_S, node, loss, own_first=True)
      mixed, accepted = self._accept(own, mixed, node, loss)
      from_parent = jnp.arange(mask_SxM.shape[0]) == (0 if over_updates else 1)
      weights = jnp.where(takes, jnp.float32(from_parent)[:, None], weights)
      mixed = trees.where(takes, parents, mixed)
      return mixed, received, log | {"weights": weights, "accepted": accepted}

    num_nodes = descent.nodes.active.shape[0]
    eligible_NxP = jnp.zeros((num_nodes, 0), bool) if descent.eligible is None else descent.eligible
    return jax.vmap(one)(
      descent.nodes, descent.takes, level.params["key_layers"], level.update["key_layers"], topology.parent,
      eligible_NxP, topology.siblings, topology.siblings_mask, descent.backbone,
    )

  def merge(self, ascent: Ascent) -> tuple[trees.PyTree, trees.PyTree, Residuals | None, Log]:
    """The up-phase of a level: see `KeyLayerRule.merge`."""
    level, below = ascent.level, ascent.below
    over_updates = self.config.values == "updates"
    mean = backbone_lib.mean_update(
      below.update["key_layers"], jnp.asarray(ascent.below_parent), ascent.weights, ascent.own_weights
    )

    def one(node, own, update, trained, own_weight, mean, members_S, mask_S, backbone):
      loss = self._loss(node, backbone)
      mask_S &= below.fresh[members_S] | (not over_updates)  # an old update has been used before
      mask_SxM = _masks([], None, mask_S, own)
      weight_S = jnp.where(mask_S, ascent.weights[members_S], 0.0)
      if over_updates:
        layers = trees.take(below.update["key_layers"], members_S)
        total = jnp.sum(weight_S) + own_weight
        mixed = trees.add(own, mean)
        weights = jnp.broadcast_to((weight_S / jnp.where(total > 0, total, 1.0))[:, None], mask_SxM.shape)
        use_SxM = attend.parameter_scores("update_cosine", "layer", mean, None, layers, mask_SxM)[0]
      else:
        base = trees.where(trained, update, trees.zeros_like(update))
        layers = trees.take(below.params["key_layers"], members_S)
        all_mask_SxM = _masks([trained], None, mask_S, own)
        all_weights_S = jnp.append(own_weight, weight_S)
        prior_S = jnp.ones_like(all_weights_S) if self.config.prior == "uniform" else all_weights_S
        query = own, *self._query(own, base, trees.subtract(own, base))
        mixed, weights = self._attend_layers(query, _stack([own], None, layers), all_mask_SxM, prior_S, node, loss)
        use_SxM = weights[1:]
      mixed, accepted = self._accept(own, mixed, node, loss)
      sent = None
      if level.residuals is not None:
        # A federation with a single layer to take has nothing that it could not use.
        offered_SxM = mask_SxM & (jnp.sum(mask_S) + trained > 1)
        origin_S, count = ascent.below_member[members_S], level.residuals.present.shape[1]
        sent = residuals_lib.select(layers, use_SxM, offered_SxM, origin_S, ascent.phase.round_index, count)
      # What it takes over from its members is its own progress from now on.
      update = trees.add(update, trees.subtract(mixed, own)) if over_updates else update
      return mixed, update, sent, {"weights": weights, "accepted": accepted}

    return jax.vmap(one)(
      ascent.nodes, level.params["key_layers"], level.update["key_layers"], level.trained, ascent.own_weights, mean,
      ascent.topology.children, ascent.members_mask, ascent.backbone,
    )

  def _news(self, descent: Descent) -> Residuals | None:
    """The pool without what was used before: each update is used once, and not when it is old."""
    pool, phase = descent.pool, descent.phase
    if pool is None:
      return None
    num_pooled = pool.present.shape[0]
    from_above_P = jnp.arange(num_pooled) >= num_pooled - descent.above_in_pool
    news_PxM = (pool.round >= phase.round_index - 1) & (phase.first_repeat | ~from_above_P[:, None])
    return pool._replace(present=pool.present & news_PxM)

  def _route(
    self, pool: Residuals, eligible_P: jax.Array, direction: trees.PyTree, reference: trees.PyTree | None, count: int
  ) -> Residuals:
    """The pooled layers most similar to a node's own. Losses would cost too much: cosines stand in for them."""
    similarity = "param_cosine" if self.config.similarity == "validation_loss" else self.config.similarity
    there = pool.present & eligible_P[:, None]
    scores = attend.parameter_scores(similarity, "layer", direction, reference, pool.layers, there)
    return residuals_lib.route(pool, eligible_P, scores[0], count)

  def _query(
    self, own: trees.PyTree, update: trees.PyTree, parents: trees.PyTree
  ) -> tuple[trees.PyTree, trees.PyTree | None]:
    """The direction that candidates are compared with, and the point they are seen from."""
    if self.config.values == "updates":
      return update, None
    if self.config.similarity == "centered_cosine":  # displacement from the parent's layer
      return trees.subtract(own, parents), parents
    if self.config.similarity == "update_cosine":  # displacement from where the node's own training began
      return update, trees.subtract(own, update)
    return own, None

  def _attend_layers(self, query, candidates, mask_SxM, prior_S, node, loss, *, own_first=False):
    """Mixed layers and the weights `[S, M]`, averaged over tensors; `query` is (own, direction, reference).

    `own_first` says that the first candidate is the node itself, which by any cosine is most like itself.
    """
    config, (own, direction, reference) = self.config, query
    if config.similarity == "validation_loss":
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
    return attend.mix(own, candidates, weights), jnp.mean(weights, axis=0)

  def _attend_updates(self, update, candidates, mask_SxM):
    """What to add, the weights beta and the cosines `[S, M]`, averaged over tensors."""
    addition, weights, cosines = attend.attend_updates(
      update, candidates, mask_SxM, self.config.granularity, strength=self.config.update_strength,
      threshold=self.config.update_threshold, norm_cap=self.config.update_norm_cap,
    )
    return addition, jnp.mean(weights, axis=0), jnp.mean(cosines, axis=0)

  def _loss(self, node: NodeInputs, backbone: trees.PyTree):
    """The loss of key layers on the node's validation batch."""
    return lambda key_layers: scoring.mean_loss(
      self.arch, {"backbone": backbone, "key_layers": key_layers}, node.windows, node.num_windows
    )

  def _accept(self, own, mixed, node, loss):
    """Keeps the own layers where the node asks for validation and the mixed ones are worse."""
    if not self.any_validated:
      return mixed, jnp.bool_(True)
    accepted = ~node.validated | (node.num_windows == 0) | (loss(mixed) <= loss(own))
    return trees.where(accepted, mixed, own), accepted


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
