"""WorldLM: the backbone is averaged, the key layers are attended to, residual layers are routed.

A. Iacob, L. Sani, B. Marino, P. Aleksandrov, W. F. Shen, N. D. Lane, "Worldwide Federated Training of
Language Models", arXiv:2405.14446.

  down   B_q <- B_p;  K_q <- attend(K_q, {K_q, K_p} + residual layers routed to q)
  up     B_p <- server_optimizer(B_p, mean_c (B_c - B_p));  K_p <- attend(K_p, {K_c} + {K_p if p trained})

Where the paper is silent: in the down-phase all candidates have the same prior. A residual layer that
a node received is offered to its children with everything else in their pool. A federation that did
not train has no direction of its own: it takes its members' mean one. With attention over updates the
candidates are the updates of siblings, of a parent that trained, and routed ones; each is used once.

Axes as in `exchange/attend.py`: N nodes, S candidates, M key layers, P pooled residual layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from worldlm_jax import model, scoring, trees
from worldlm_jax.algorithms.rules import Algorithm, BackboneRule, NodeInputs, PhaseInputs
from worldlm_jax.config import Config, KeyLayerConfig
from worldlm_jax.exchange import attend, backbone as backbone_lib, residuals as residuals_lib
from worldlm_jax.exchange.residuals import Residuals
from worldlm_jax.state import LevelState, Topology


def make(config: Config, arch: model.Architecture, *, any_validated: bool) -> Algorithm:
  """The pair of rules; `any_validated` says whether some node's acceptance is "validated"."""
  server = backbone_lib.server_optimizer(config.backbone)

  def merge(own, state, members, parent, weights, own_weights):
    difference = backbone_lib.mean_difference(own, members, parent, weights, own_weights)
    return backbone_lib.apply_server_optimizer(server, own, state, difference)

  mean = BackboneRule(lambda own, parents: parents, merge, counts_tokens=config.backbone.weights == "tokens")
  return Algorithm(mean, AttendRule(config.key_layers, arch, any_validated))


def needs_validation_batch(config: KeyLayerConfig, any_validated: bool) -> bool:
  """Whether the exchange looks at the nodes' validation batches."""
  return any_validated or config.similarity == "validation_loss"


class AttendRule(NamedTuple):
  """Attention over parameters with residual layers, as a `KeyLayerRule`."""

  config: KeyLayerConfig
  arch: model.Architecture
  any_validated: bool

  def receive(
    self, backbone: trees.PyTree, level: LevelState, above: LevelState, pool: Residuals | None, eligible: jax.Array | None,
    topology: Topology, nodes: NodeInputs, phase: PhaseInputs,
  ) -> tuple[trees.PyTree, Residuals | None, dict[str, jax.Array]]:
    """The down-phase of a level: see `KeyLayerRule.receive`."""
    over_updates = self.config.values == "updates"
    if pool is not None and over_updates:
      # Each update is used once: not again in a later repeat of the same round, and not when it is old.
      above_count = 0 if above.received is None else above.received.present.shape[0] * above.received.present.shape[1]
      from_above = jnp.arange(pool.present.shape[0]) >= pool.present.shape[0] - above_count
      news = (pool.round >= phase.round_index - 1) & (phase.first_repeat | ~from_above[:, None])
      pool = pool._replace(present=pool.present & news)

    def one(node: NodeInputs, own, update, parent, eligible_P, siblings_S, siblings_mask_S, backbone_q):
      own_layers, parents_layers = own, trees.take(above.params["key_layers"], parent)
      direction, reference = self._query(own_layers, update, parents_layers)
      received, log = None, {}
      if pool is not None:
        similarity = "param_cosine" if self.config.similarity == "validation_loss" else self.config.similarity
        there = pool.present & eligible_P[:, None]
        scores = attend.parameter_scores(similarity, "layer", direction, reference, pool.layers, there)[0]
        received = residuals_lib.route(pool, eligible_P, scores, level.received.present.shape[1])
        log = {"routed_origin": jnp.where(received.present, received.origin, -1), "routed_round": received.round}
      loss = self._loss(node, backbone_q)
      if over_updates:
        own_first = [trees.take(above.update, parent)]
        candidates = _stack(own_first, received, trees.take(level.update, siblings_S))
        mask_SxM = _masks(
          [above.trained[parent] & phase.first_repeat], received, siblings_mask_S & level.fresh[siblings_S], own_layers
        )
        addition, weights, _ = self._attend_updates(update, candidates, mask_SxM, jnp.ones(mask_SxM.shape[0]))
        mixed = trees.add(own_layers, addition)
      else:
        candidates = _stack([own_layers, parents_layers], received, None)
        mask_SxM = _masks([jnp.bool_(True)] * 2, received, None, own_layers)
        mixed, weights = self._attend_layers(
          own_layers, direction, reference, candidates, mask_SxM, jnp.ones(mask_SxM.shape[0]), node, loss
        )
      mixed, accepted = self._accept(own_layers, mixed, node, loss)
      return mixed, received, log | {"weights": weights, "accepted": accepted}

    eligible_NxP = jnp.zeros((nodes.active.shape[0], 0), bool) if eligible is None else eligible
    return jax.vmap(one)(
      nodes, level.params["key_layers"], level.update, topology.parent, eligible_NxP,
      topology.siblings, topology.siblings_mask, backbone,
    )

  def merge(
    self, backbone: trees.PyTree, level: LevelState, below: LevelState, members_mask: jax.Array,
    topology: Topology, below_member: jax.Array, nodes: NodeInputs, phase: PhaseInputs,
  ) -> tuple[trees.PyTree, trees.PyTree, Residuals | None, dict[str, jax.Array]]:
    """The up-phase of a level: see `KeyLayerRule.merge`."""

    def one(node: NodeInputs, own, update, trained, own_tokens, members_S, mask_S, backbone_p):
      update = trees.where(trained, update, trees.zeros_like(update))
      tokens_S = below.tokens[members_S]
      uniform = self.config.prior == "uniform"
      loss = self._loss(node, backbone_p)
      mask_SxM = _masks([], None, mask_S, own)
      if self.config.values == "updates":
        layers = trees.take(below.update, members_S)
        prior_S = jnp.float32(tokens_S > 0) if uniform else tokens_S
        addition, weights, use_SxM = self._attend_updates(update, layers, mask_SxM, prior_S)
        mixed = trees.add(own, addition)
        update = trees.where(trained, update, addition)
      else:
        layers = trees.take(below.params["key_layers"], members_S)
        candidates = _stack([own], None, layers)
        all_mask_SxM = _masks([trained], None, mask_S, own)
        prior_S = jnp.ones(all_mask_SxM.shape[0]) if uniform else jnp.append(own_tokens, tokens_S)
        direction, reference = self._query(own, update, own)
        mixed, weights = self._attend_layers(
          own, direction, reference, candidates, all_mask_SxM, prior_S, node, loss
        )
        use_SxM = weights[1:]
      mixed, accepted = self._accept(own, mixed, node, loss)
      sent = None
      if level.residuals is not None:
        # A federation with a single layer to take has nothing that it could not use.
        choice = jnp.sum(mask_S) + trained > 1
        sent = residuals_lib.select(
          layers, use_SxM, mask_SxM & choice, below_member[members_S], phase.round_index, level.residuals.present.shape[1]
        )
      return mixed, update, sent, {"weights": weights, "accepted": accepted}

    return jax.vmap(one)(
      nodes, level.params["key_layers"], level.update, level.trained, level.own_tokens,
      topology.children, members_mask, backbone,
    )

  def _query(self, own: trees.PyTree, update: trees.PyTree, parents: trees.PyTree) -> tuple[trees.PyTree, trees.PyTree | None]:
    """The direction that candidates are compared with, and the point they are seen from."""
    if self.config.values == "updates":
      return update, None
    if self.config.similarity == "centered_cosine":  # displacement from the parent's layer
      return trees.subtract(own, parents), parents
    if self.config.similarity == "update_cosine":  # displacement from where the node's own training began
      return update, trees.subtract(own, update)
    return own, None

  def _attend_layers(self, own, direction, reference, candidates, mask_SxM, prior_S, node, loss):
    """Mixed layers and the weights `[S, M]`, averaged over tensors."""
    config = self.config
    if config.similarity == "validation_loss":
      scores = attend.loss_scores(config.granularity, own, candidates, loss)
      scores = jnp.where(node.num_windows > 0, scores, 0.0)  # without data of its own, no preference
    else:
      scores = attend.parameter_scores(
        config.similarity, config.granularity, direction, reference, candidates, mask_SxM
      )
    weights = attend.attention_weights(
      jnp.broadcast_to(scores, (scores.shape[0], *mask_SxM.shape)), mask_SxM, prior_S, node.temperature
    )
    return attend.mix(own, candidates, weights, mask_SxM), jnp.mean(weights, axis=0)

  def _attend_updates(self, update, candidates, mask_SxM, prior_S):
    """What to add, the weights beta and the cosines `[S, M]`, averaged over tensors."""
    addition, weights, cosines = attend.attend_updates(
      update, candidates, mask_SxM, prior_S, self.config.granularity, strength=self.config.update_strength,
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
