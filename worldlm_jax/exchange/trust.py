"""Trust: how far a node follows its own training in the model that it uses.

  used_q = P + trust_q (T_q - P),   P: its parent's model,  T_q: what the node's training made

With little text, training overshoots: the best model for unseen text lies somewhere on the way (for fine-tuning,
Wortsman et al., arXiv:2109.01903). Of `TRUSTS` a node takes the one with the least loss on its own validation batch.
What it sends, and what it goes on training, is T_q itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from worldlm_jax import trees

TRUSTS = (1.0, 0.75, 0.5, 0.25, 0.0)  # among equals the first


def used(own: trees.PyTree, parents: trees.PyTree, trust: jax.Array) -> trees.PyTree:
  """The models in use; the axes of `trust` are the leading ones of every leaf. At a trust of 1 exactly `own`."""

  def mix(own: jax.Array, parents: jax.Array) -> jax.Array:
    return parents + trust.reshape(trust.shape + (1,) * (own.ndim - trust.ndim)) * (own - parents)

  return trees.where(trust == 1, own, jax.tree.map(mix, own, parents))


def validated(loss: Callable[[trees.PyTree], jax.Array], own: trees.PyTree, parents: trees.PyTree) -> jax.Array:
  """The trust of one node with the least `loss` of the model in use: float32 scalar."""
  trusts = jnp.array(TRUSTS, jnp.float32)
  losses = jax.lax.map(lambda trust: loss(used(own, parents, trust)), trusts)
  return trusts[jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))]
