"""Relevance: how well what a node learned agrees with what everybody else learned from the same start.

  relevance_q = cos(D_q, R_q - share_q D_q),   D_q: q's own update in the first round,
                                               R_q: how far the model that it is handed next has moved meanwhile

R_q is the weighted mean of everybody's updates, and q's own share is taken out of it. The cosine of first updates
tells related text from unrelated better than any later one: all of them begin at the same parameters, and nobody has
learned what all text has in common yet.

It tells who shares a model at all, and how often a node sees its text tells for how long it does, before it goes its
own way:

  until  e^2 / (e^2 + c^2)  of the run,   e: how often it sees its text,  c: its independence

but for a LEAST share of the run, so that nobody leaves before what all text has in common has been learned, and a
MOST, so that everybody's model ends as its own. Whoever is less relevant than RELATED leaves after the LEAST. A shared
model errs by how others differ, one's own by overfitting, the more the more often it has seen the same text. Beyond
that, how long does not depend on the relevance: a model gets worse for those who stay when the others leave, so nodes
with as much text had better leave together; and those who have left still follow what they have in common with the
others (`attend.py`). Shapes: N nodes of a level.
"""

import jax
import jax.numpy as jnp

from worldlm_jax import trees

UNKNOWN = 2.0  # no cosine is as large
RELATED = 0.3  # languages of one script have 0.6 to 0.8 with each other, one of another script -0.1
LEAST, MOST = 0.15, 0.9


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


def shares(
  relevance_N: jax.Array, epochs_N: jax.Array, independence_N: jax.Array, round_index: jax.Array, num_rounds: jax.Array
) -> jax.Array:
  """Which nodes still take over their parent's model as it is: bool `[N]`. As long as r is UNKNOWN, whoever may.

  Args:
    relevance_N: r.
    epochs_N: e > 0; inf for those that have no way of their own to go.
    independence_N: c; 0 shares for ever, inf never.
    round_index, num_rounds: where in the run this is.
  """
  wanted_N = jnp.where(relevance_N >= RELATED, 1 / (1 + jnp.square(jnp.divide(independence_N, epochs_N))), 0.0)
  rounds_N = jnp.ceil(num_rounds * jnp.clip(wanted_N, LEAST, MOST) - 1e-3)
  for_ever_N = (independence_N == 0) | jnp.isinf(epochs_N)
  return ~jnp.isinf(independence_N) & (for_ever_N | (round_index < rounds_N))
