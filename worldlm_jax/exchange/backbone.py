"""Backbones: the weighted mean of a federation's members and the server optimizer that applies it.

  B_p <- server_optimizer(B_p, sum_c share_c (B_c - B_p)),   share_c = weight_c / sum of all weights

A federation that trained on data of its own counts itself among its members: its own difference is
zero and its weight enlarges the sum. With SGD at rate 1 this is the plain weighted mean. Server
optimizers: Reddi et al., arXiv:2003.00295 (FedAdam); Douillard et al., arXiv:2311.08105 (Nesterov).

Shapes: P federations, C members of all of them, one level below.
"""

import jax
import jax.numpy as jnp
import optax

from worldlm_jax import links, trees
from worldlm_jax.config import BackboneConfig


def server_optimizer(config: BackboneConfig) -> optax.GradientTransformation:
  """The Optax optimizer that takes minus the members' mean difference for a gradient."""
  rate, momentum = config.server_learning_rate, config.server_momentum
  return {
    "sgd": lambda: optax.sgd(rate),
    "nesterov": lambda: optax.sgd(rate, momentum=momentum, nesterov=True),
    "adam": lambda: optax.adam(rate, b1=momentum),
  }[config.server_optimizer]()


def shares(parent_C: jax.Array, weight_C: jax.Array, own_weight_P: jax.Array, num_federations: int) -> jax.Array:
  """What each member counts in its federation's mean: float32 `[C, P]`, for the P federations that there are.

  Args:
    parent_C: int, each member's federation.
    weight_C: float32 >= 0; members of weight 0 do not count.
    own_weight_P: float32 >= 0, the weight of the federation's own (zero) difference; ghosts may follow.
    num_federations: P.
  """
  total_P = jax.ops.segment_sum(weight_C, parent_C, len(own_weight_P)) + own_weight_P
  share_C = jnp.where(weight_C > 0, weight_C / jnp.where(total_P > 0, total_P, 1.0)[parent_C], 0.0)
  return jnp.where(parent_C[:, None] == jnp.arange(num_federations)[None, :], share_C[:, None], 0.0)


def mean_difference(
  backbone_P: trees.PyTree, members_C: trees.PyTree, shares_CxP: jax.Array, mesh: jax.sharding.Mesh
) -> trees.PyTree:
  """The weighted mean of what members moved away from their federation.

  Args:
    backbone_P: the federations' backbones, leaves `[P, ...]`, ghosts included.
    members_C: the members' backbones, leaves `[C, ...]`; members without a share do not count, whatever they hold.
    shares_CxP: see `shares`.
    mesh: where both lie.

  Returns:
    Leaves like the federations'; zero where no member counts.
  """
  num_rows = jax.tree.leaves(backbone_P)[0].shape[0]
  total_P = jnp.pad(jnp.sum(shares_CxP, axis=0), (0, num_rows - shares_CxP.shape[1]))
  sums = links.sum_members(members_C, shares_CxP, num_rows, mesh)
  return jax.tree.map(lambda own, sum_: sum_ - total_P.reshape(-1, *[1] * (own.ndim - 1)) * own, backbone_P, sums)


def apply_server_optimizer(
  optimizer: optax.GradientTransformation, backbone_P: trees.PyTree, state_P: trees.PyTree, difference_P: trees.PyTree
) -> tuple[trees.PyTree, trees.PyTree]:
  """One step of every federation's server optimizer: new backbones and states, leaves `[P, ...]`."""

  def step(backbone: trees.PyTree, state: trees.PyTree, difference: trees.PyTree) -> tuple[trees.PyTree, trees.PyTree]:
    updates, state = optimizer.update(jax.tree.map(jnp.negative, difference), state, backbone)
    return optax.apply_updates(backbone, updates), state

  return jax.vmap(step)(backbone_P, state_P, difference_P)
