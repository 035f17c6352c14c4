"""Relevance: how well what a node learned agrees with what everybody else learned from the same start.

  relevance_q = cos(D_q, R_q - share_q D_q),   D_q: q's own update in the first round,
                                               R_q: how far the model that it is handed next has moved meanwhile

R_q is the weighted mean of everybody's updates, and q's own share is taken out of it. The cosine of first updates
tells related text from unrelated better than any later one: all of them begin at the same parameters, and nobody has
learned what all text has in common yet. Shapes: N nodes of a level.
"""

import jax
import jax.numpy as jnp

from worldlm_jax import trees

UNKNOWN = 2.0  # no cosine is as large


def relevance(update_N: trees.PyTree, moved_N: trees.PyTree, share_N: jax.Array) -> jax.Array:
  """Each node's relevance, float32 `[N]`; UNKNOWN where it, or everybody else, has not moved.

  Args:
    update_N: D, leaves `[N, ...]`.
    moved_N: R, of the same shapes.
    share_N: float32, the share of a node's own update in R.
  """
  product_N = own_N = others_N = jnp.zeros_like(share_N)
  for update, moved in zip(jax.tree.leaves(update_N), jax.tree.leaves(moved_N), strict=True):
    update_NxP, moved_NxP = (leaf.reshape(len(share_N), -1) for leaf in (update, moved))
    rest_NxP = moved_NxP - share_N[:, None] * update_NxP
    product_N += jnp.sum(update_NxP * rest_NxP, axis=1)
    own_N += jnp.sum(jnp.square(update_NxP), axis=1)
    others_N += jnp.sum(jnp.square(rest_NxP), axis=1)
  known_N = (own_N > 0) & (others_N > 0)
  norms_N = jnp.sqrt(own_N) * jnp.sqrt(others_N)
  return jnp.where(known_N, product_N / jnp.where(known_N, norms_N, 1.0), UNKNOWN)
