"""Guards: what is not taken over from a partner, because it cannot be honest or would do harm.

Each member's update u (all of the model that it shares) is judged beside those of its siblings that have come in:

  not finite   |u| is not finite. Always rejected.
  too large    |u| > norm_ratio * median |u|, the lower median of the siblings' norms and its own
  opposed      a < -opposition and b > opposition,   a: mean cosine of u and its siblings' updates,
                                                     b: mean cosine of these among each other

A rejected update counts for nothing: not in any mean, not for attention, not as a residual layer. Judging is pure, so
that everybody who looks at a level between two of its down-phases rejects the same.

What these catch and what they cannot. With one sibling the lower median is the smaller norm of the two; without any,
nothing is too large. An update of usual length that points the wrong way shows as `opposed` only where the honest ones
agree with each other and there are two of them at least. The cosine of unrelated texts is near 0. Where a federation
has converged, members pull it apart and all cosines are negative, those of the others too, so nobody is rejected; a
single member that pulls against all others, who agree, looks the same as one whose sign was flipped.
An update of usual length and direction passes; `exchange/robust.py` bounds what it can do.

Shapes: N nodes of a level, S siblings.
"""

import jax
import jax.numpy as jnp

from worldlm_jax import links, trees
from worldlm_jax.config import GuardConfig
from worldlm_jax.exchange import rows
from worldlm_jax.links import Neighbours

VERDICTS = ("", "not_finite", "too_large", "opposed")  # by code; 0 is fine, or nothing to judge
NOT_FINITE, TOO_LARGE, OPPOSED = 1, 2, 3


def judge(
  config: GuardConfig, update_N: trees.PyTree, there_N: jax.Array, siblings_NxS: jax.Array, mask_NxS: jax.Array,
  neighbours: Neighbours, mesh: jax.sharding.Mesh,
) -> jax.Array:
  """The verdict on every node of a level: int32 `[N]`, places in `VERDICTS`.

  Args:
    config: the limits.
    update_N: what is judged, leaves `[N, ...]`.
    there_N: bool, whose update has come in; the others are neither judged nor compared with.
    siblings_NxS: int32, places of the siblings.
    mask_NxS: bool, which of these places are taken.
    neighbours: where they lie (see `links.py`).
    mesh: where the level lies.
  """
  squares_N = jnp.broadcast_to(squared_norms(update_N), there_N.shape)  # where nothing is shared, 0
  finite_N = jnp.isfinite(squares_N)
  verdict_N = jnp.where(there_N & ~finite_N, NOT_FINITE, 0)
  counts_N = there_N & finite_N
  if config.norm_ratio < jnp.inf:
    norms_N = jnp.sqrt(jnp.where(counts_N, squares_N, 0.0))
    there_NxS = mask_NxS & counts_N[siblings_NxS]
    group_NxG = jnp.concatenate([norms_N[:, None], jnp.where(there_NxS, norms_N[siblings_NxS], jnp.inf)], axis=1)
    median_N = lower_median(group_NxG.T)
    verdict_N = jnp.where(counts_N & (norms_N > config.norm_ratio * median_N), TOO_LARGE, verdict_N)
    counts_N &= verdict_N == 0
  if config.opposition < 1:
    there_NxS = mask_NxS & counts_N[siblings_NxS]
    mine_N, theirs_N = _agreement(update_N, counts_N, there_NxS, neighbours, mesh)
    opposed_N = (mine_N < -config.opposition) & (theirs_N > config.opposition) & (jnp.sum(there_NxS, axis=1) > 1)
    verdict_N = jnp.where(counts_N & opposed_N, OPPOSED, verdict_N)
  return verdict_N


def squared_norms(tree_N: trees.PyTree) -> jax.Array:
  """Of each row over all leaves: float32 `[N]`; not finite where anything in the row is not, or too large to square."""
  return sum(
    (jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(tree_N)),
    start=jnp.float32(0),
  )


def finite(tree_N: trees.PyTree, like_N: jax.Array) -> jax.Array:
  """Which rows are finite, all over: bool, of the shape of `like_N`; true where the tree has no leaves."""
  return jnp.broadcast_to(jnp.isfinite(squared_norms(tree_N)), like_N.shape)


def lower_median(values_RxQ: jax.Array) -> jax.Array:
  """Of the finite values in each column, the lower one of two in the middle: `[Q]`; inf where there is none."""
  count_Q = jnp.sum(jnp.isfinite(values_RxQ), axis=0)
  place_Q = jnp.maximum(count_Q - 1, 0) // 2
  return jnp.take_along_axis(jnp.sort(values_RxQ, axis=0), place_Q[None], axis=0)[0]


def _agreement(
  update_N: trees.PyTree, counts_N: jax.Array, there_NxS: jax.Array, neighbours: Neighbours, mesh: jax.sharding.Mesh
) -> tuple[jax.Array, jax.Array]:
  """The mean cosine of each node and its siblings, and that of the siblings among each other; both `[N]`."""

  def on_device(update, places_NxS, counts_N, there_NxS):
    table_XxX = rows.total(rows.gram([rows.Source(rows.layered(update), neighbours.fetch)]))

    def one(n, places_S, counts, there_S):
      index_G = jnp.append(n, places_S)
      there_G = jnp.append(counts, there_S)
      table_GxG = jnp.where(there_G[:, None] & there_G[None, :], table_XxX[index_G][:, index_G], 0.0)
      norms_G = jnp.sqrt(jnp.diagonal(table_GxG))
      both_GxG = norms_G[:, None] * norms_G[None, :]
      cosines_GxG = jnp.where(both_GxG > 0, table_GxG / jnp.where(both_GxG > 0, both_GxG, 1.0), 0.0)
      number = jnp.sum(there_S)
      among = jnp.sum(cosines_GxG[1:, 1:]) - jnp.sum(jnp.diagonal(cosines_GxG)[1:])
      return jnp.sum(cosines_GxG[0, 1:]) / jnp.maximum(number, 1), among / jnp.maximum(number * (number - 1), 1)

    return jax.vmap(one)(jnp.arange(len(places_NxS)), places_NxS, counts_N, there_NxS)

  run = links.on_devices(on_device, mesh)
  return run(update_N, jnp.asarray(neighbours.siblings), counts_N, there_NxS)
