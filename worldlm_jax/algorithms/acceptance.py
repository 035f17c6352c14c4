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
  arch: model.Architecture, node: NodeInputs, backbone: trees.PyTree, own: trees.PyTree, mixed: trees.PyTree
) -> tuple[trees.PyTree, jax.Array]:
  """One node's key layers, and whether the mixed ones were taken."""
  loss = validation_loss(arch, node, backbone)
  accepted = ~node.validated | (node.num_windows == 0) | (loss(mixed) <= loss(own))
  return trees.where(accepted, mixed, own), accepted
