"""Relevance: how well what a node learned agrees with what its siblings learned from the same start.

  relevance_q = cos(D_q, sum_{s != q} weight_s D_s),   D: the updates of all parts of the model in the first round

The cosine of first updates tells related text from unrelated better than any later one: all of them begin at the
same parameters, and nobody has learned what all text has in common yet. Shapes: N nodes of a level.
"""

import jax
import jax.numpy as jnp

from worldlm_jax import trees

UNKNOWN = 2.0  # no cosine is as large


def relevance(update_N: trees.PyTree, weight_N: jax.Array, parent_N: jax.Array, num_parents: int) -> jax.Array:
  """Each node's relevance, float32 `[N]`; UNKNOWN where it or all of its siblings have no update.

  Args:
    update_N: leaves `[N, ...]`.
    weight_N: float32 >= 0; nodes of weight 0 do not count, whatever they hold.
    parent_N: int, places in the level above.
    num_parents: how many nodes that level has.
  """
  product_N = own_N = others_N = jnp.zeros_like(weight_N)
  for leaf in jax.tree.leaves(update_N):
    flat_NxP = jnp.where(weight_N[:, None] > 0, leaf.reshape(len(weight_N), -1), 0.0)
    weighted_NxP = weight_N[:, None] * flat_NxP
    rest_NxP = jax.ops.segment_sum(weighted_NxP, parent_N, num_parents)[parent_N] - weighted_NxP
    product_N += jnp.sum(flat_NxP * rest_NxP, axis=1)
    own_N += jnp.sum(jnp.square(flat_NxP), axis=1)
    others_N += jnp.sum(jnp.square(rest_NxP), axis=1)
  # A node without siblings that count has nothing but rounding errors left to compare with.
  count_N = jax.ops.segment_sum(jnp.float32(weight_N > 0), parent_N, num_parents)[parent_N]
  known_N = (weight_N > 0) & (count_N > 1) & (own_N > 0) & (others_N > 0)
  norms_N = jnp.sqrt(own_N) * jnp.sqrt(others_N)
  return jnp.where(known_N, product_N / jnp.where(known_N, norms_N, 1.0), UNKNOWN)
