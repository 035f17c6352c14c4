"""Aggregation that a few members cannot lead astray, whatever they send.

  trimmed_mean   per coordinate, the weighted mean of what is left when a share `trim` of the weight is cut off at
                 either end (D. Yin et al., arXiv:1803.01498, there without weights)
  median         per coordinate, the weighted median
  norm_bounded   the weighted mean of updates, each cut to `norm_bound` times their median norm
                 (Z. Sun et al., arXiv:1911.07963, there with a fixed bound)

Weights are those of the mean. A member that has more of the weight than is cut off at one end (`trim`; a half for the
median) decides alone, so where members are not believed, their weights should not be what they say of themselves:
`config.backbone.weights=uniform`. A federation that trained counts itself, with a difference of zero, as in the mean.
With less than 1 / trim members of equal weight, one of them is not cut off entirely, but only in part.

The mean of honest updates that differ is not their median: per coordinate most values lie around zero and the few that
are large carry what was learned, so that trimming takes smaller steps. Every coordinate is needed of all members at
once: where nodes are spread over devices, all updates travel to all of them, a layer at a time.

Shapes: C members of P federations.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from worldlm_jax import links, trees
from worldlm_jax.config import BackboneConfig
from worldlm_jax.exchange import guards
from worldlm_jax.partition import NODE

Combine = Callable[[trees.PyTree, jax.Array, int, jax.sharding.Mesh], trees.PyTree]

MEDIAN = 0.499  # trimmed at each end: the mean of the middle two of an even number, the middle one of an odd


def combiner(config: BackboneConfig) -> Combine:
  """What makes one difference of the members' updates: takes and gives what `links.sum_members` does."""
  trim = MEDIAN if config.aggregate == "median" else config.trim

  def trimmed(tree_C, shares_CxP, num_padded, mesh):
    return trimmed_mean(trim, tree_C, shares_CxP, num_padded, mesh)

  def bounded(tree_C, shares_CxP, num_padded, mesh):
    return links.sum_members(tree_C, shares_CxP * norm_factors(config.norm_bound, tree_C, shares_CxP), num_padded, mesh)

  return {
    "mean": links.sum_members, "trimmed_mean": trimmed, "median": trimmed, "norm_bounded": bounded
  }[config.aggregate]


def norm_factors(bound: float, tree_C: trees.PyTree, shares_CxP: jax.Array) -> jax.Array:
  """What each member's update is multiplied with to be at most `bound` median norms long: float32 `[C, P]`."""
  norms_Cx1 = jnp.sqrt(guards.squared_norms(tree_C))[:, None]
  median_P = guards.lower_median(jnp.where(shares_CxP > 0, norms_Cx1, jnp.inf))
  longest_P = jnp.where(jnp.isfinite(median_P), bound * median_P, 0.0)
  return jnp.where(norms_Cx1 > longest_P[None], longest_P[None] / jnp.where(norms_Cx1 > 0, norms_Cx1, 1.0), 1.0)


def trimmed_mean(
  trim: float, tree_C: trees.PyTree, shares_CxP: jax.Array, num_padded: int, mesh: jax.sharding.Mesh
) -> trees.PyTree:
  """The trimmed mean of each federation's members: leaves `[C, ...]` -> `[num_padded, ...]`, zero where nobody counts.

  Args:
    trim: the share of the weight that is cut off at each end, under a half.
    tree_C: the members' updates; those without a share do not count, whatever they hold.
    shares_CxP: as in `backbone.shares`; what they lack of 1 is the federation's own, whose difference is zero.
    num_padded: rows of the result.
    mesh: where the members lie.
  """
  own_P = jnp.sum(shares_CxP, axis=0)
  own_P = jnp.where((own_P > 0) & (own_P < 1 - 1e-6), 1 - own_P, 0.0)
  weights_PxR = jnp.concatenate([shares_CxP, own_P[None]]).T
  weights_PxR = jnp.pad(weights_PxR, [(0, num_padded - len(weights_PxR)), (0, 0)])
  counts_C = jnp.any(shares_CxP > 0, axis=1)

  def total(tree: trees.PyTree, weights_PxR: jax.Array, counts_C: jax.Array) -> trees.PyTree:
    def one(rows: jax.Array, _: object) -> jax.Array:
      every = jax.lax.all_gather(rows, NODE, tiled=True) if mesh.shape[NODE] > 1 else rows
      flat_CxX = jnp.where(counts_C[:, None], every.reshape(len(every), -1), 0.0)
      flat_RxX = jnp.pad(flat_CxX, [(0, 1), (0, 0)])
      order_RxX = jnp.argsort(flat_RxX, axis=0)
      sorted_RxX = jnp.take_along_axis(flat_RxX, order_RxX, axis=0)

      def of_federation(weights_R: jax.Array) -> jax.Array:
        w_RxX = weights_R[order_RxX]
        upto_RxX = jnp.cumsum(w_RxX, axis=0)
        kept_RxX = jnp.maximum(jnp.minimum(upto_RxX, 1 - trim) - jnp.maximum(upto_RxX - w_RxX, trim), 0.0)
        kept_X = jnp.sum(kept_RxX, axis=0)
        return jnp.sum(kept_RxX * sorted_RxX, axis=0) / jnp.where(kept_X > 0, kept_X, 1.0)

      found_PxX = jax.lax.map(of_federation, weights_PxR)
      return found_PxX.reshape(len(weights_PxR), *rows.shape[1:])

    return jax.tree.map(lambda leaf: links.by_layer(one, leaf, leaf.ndim > 3), tree)

  return links.on_devices(total, mesh, num_everywhere=1)(tree_C, weights_PxR, counts_C)
