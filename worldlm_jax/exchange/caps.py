"""The largest weight that one member may have in a federation's mean.

  share_c <- min(cap, f share_c),   f >= 1 such that all shares, the federation's own among them, add up as before

so that the excess falls to the others in proportion. Where all members are at the cap, what is left counts as no
change: the cap holds whoever is missing. The federation's own training is no member and has no cap.
"""

import jax
import jax.numpy as jnp


def capped(shares_SxX: jax.Array, own_X: jax.Array, cap_X: jax.Array) -> jax.Array:
  """Shares of S members in each of X means, none above its cap: float32 `[S, X]`.

  Args:
    shares_SxX: float32 >= 0, zero for whoever takes no part.
    own_X: float32 >= 0, the federation's own share.
    cap_X: float32 > 0; 1 is no cap.
  """
  cap_1xX = cap_X[None]
  total_X = jnp.sum(shares_SxX, axis=0) + own_X

  def fill(_: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    found_SxX, full_SxX = state
    full_SxX = full_SxX | (found_SxX > cap_1xX)
    fixed_X = jnp.sum(full_SxX, axis=0) * cap_X
    free_X = jnp.sum(jnp.where(full_SxX, 0.0, shares_SxX), axis=0) + own_X
    factor_X = jnp.where(free_X > 0, jnp.maximum(total_X - fixed_X, 0.0) / jnp.where(free_X > 0, free_X, 1.0), 1.0)
    factor_X = jnp.where(jnp.any(full_SxX, axis=0), factor_X, 1.0)  # where nobody is above, nothing is rounded
    return jnp.where(full_SxX, cap_1xX, factor_X[None] * shares_SxX), full_SxX

  start = shares_SxX, jnp.zeros(shares_SxX.shape, bool)
  # Each step that is not the last one fills somebody up.
  return jnp.minimum(jax.lax.fori_loop(0, len(shares_SxX), fill, start)[0], cap_1xX)
