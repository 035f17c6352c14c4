"""Acceptance: a node that asks for it keeps its own key layers where mixed ones are worse on its validation batch."""

from collections.abc import Callable

import jax

from worldlm_jax import model, scoring, trees
from worldlm_jax.algorithms.rules import NodeInputs


def validation_loss(
  arch: model.Architecture, node: NodeInputs, backbone: trees.PyTree
) -> Callable[[trees.PyTree], jax.Array]:
  """The loss, in nats per token, that key layers have on one node's validation batch."""
  return lambda key_layers: scoring.mean_loss(
    arch, {"backbone": backbone, "key_layers": key_layers}, node.windows, node.num_windows
  )


def accept(
  arch: model.Architecture, node: NodeInputs, own: model.Params, mixed: model.Params
) -> tuple[model.Params, jax.Array]:
  """One node's model, and whether the mixed one was taken."""
  loss_own, loss_mixed = (validation_loss(arch, node, params["backbone"])(params["key_layers"])
                          for params in (own, mixed))
  accepted = ~node.validated | (node.num_windows == 0) | (loss_mixed <= loss_own)
  return trees.where(accepted, mixed, own), accepted
