"""Example-level privacy: DP-SGD (M. Abadi et al., arXiv:1607.00133) within a node's training.

  g = (sum_i clip(g_i) + z C n) / B     g_i: gradient of example i's mean loss,  n: standard normal,
                                        B: how many examples there are on average

An example is a window: with packing=documents one of its document's, drawn anew each time, so that the document is the
unit. Which examples a step has is drawn for each by itself (`data/poisson.py`), so a step may have none.

Why not `jax_privacy.clipped_grad`, which computes the same: its wheel installs packages named `tests` and `docs`, and
it takes one clipping norm for all, where here nodes that train side by side have their own.

Guarantee, to the rounding of float32: without one example, the sum changes by a norm of at most C, whatever its
gradient was; one that is not finite counts as zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from worldlm_jax import trees
from worldlm_jax.privacy import release


class Examples(NamedTuple):
  """How one node's examples are protected; with a node axis `[N]` in front once stacked."""

  clip: Any  # float32: C; inf for none
  noise: Any  # float32: z
  batch: Any  # float32: B; 0 for a node that trains as usual
  key: Any  # of the noise of this training


def of(guards: release.Guard, private: release.Private) -> Examples:
  """What `local.train_nodes` needs of the nodes' guards, leaves `[N]`."""
  keys = jax.vmap(lambda guard, count: release.draw_key(guard, release.EXAMPLES, count))(guards, private.draws)
  return Examples(guards.example_clip, guards.example_noise, guards.example_batch, keys)


def clipped_gradients(
  loss_sum: Callable[[Any, jax.Array, jax.Array], jax.Array], params: trees.PyTree, windows_BxW: jax.Array,
  rows_B: jax.Array, examples: Examples,
) -> tuple[jax.Array, trees.PyTree]:
  """Summed loss, and the sum of the gradients of all windows, each clipped; side by side.

  Args:
    loss_sum: (params, windows `[1, W]`, bool `[1]`) -> the summed loss of the window's tokens.
    params: of the node.
    windows_BxW: int32; those that are padding alone have no gradient.
    rows_B: bool, which of them count.
    examples: of the node. One that trains as usual gets the plain sum of the tokens' gradients.
  """

  def one(window_W: jax.Array, counts: jax.Array) -> tuple[jax.Array, trees.PyTree]:
    loss, gradient = jax.value_and_grad(lambda p: loss_sum(p, window_W[None], counts[None]))(params)
    tokens = jnp.where(examples.batch > 0, jnp.maximum(jnp.sum(window_W[1:] >= 0), 1), 1)
    gradient = jax.tree.map(lambda g: g / tokens, gradient)
    clipped, _ = release.clip(gradient, examples.clip, jnp.bool_(False))
    return loss, clipped

  losses_B, gradients_B = jax.vmap(one)(windows_BxW, rows_B)
  return jnp.sum(losses_B), jax.tree.map(lambda g: jnp.sum(g, axis=0), gradients_B)


def noised_mean(gradients: trees.PyTree, num_tokens: jax.Array, examples: Examples, step: jax.Array) -> trees.PyTree:
  """The step's gradient from the sum that `clipped_gradients` gives; `step` counts within this training."""
  deviation = jnp.where(examples.noise > 0, examples.noise * examples.clip, 0.0)
  drawn = release.noise(jax.random.fold_in(examples.key, step), gradients, deviation)
  sum_ = jax.tree.map(lambda g, n: jnp.where(deviation > 0, g + n, g), gradients, drawn)
  number = jnp.where(examples.batch > 0, examples.batch, num_tokens)
  return optax.tree.scale(1 / number, sum_)
