"""Residual layers: what a federation cannot use is offered to the federations where it fits.

After the up-phase a federation sends up, for every layer index, the members' layers that its
attention could use least. Whoever stands above routes to each of its children the pooled layers of
other federations that are most similar to that child's own, and so on down the tree. A residual
layer carries its origin, so that rules can stop it and reports can show it.

Where the attention goes over updates, residual layers are updates too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from worldlm_jax import trees


class Residuals(NamedTuple):
  """R residual layers for each of M layer indices (with a node axis in front once stacked)."""

  layers: trees.PyTree  # leaves [R, M, ...]
  origin: jax.Array  # int32 [R, M]: the node whose layer it is, as its place in Federation.members
  round: jax.Array  # int32 [R, M]: the round that made it
  present: jax.Array  # bool [R, M]


def empty(key_layers: trees.PyTree, count: int) -> Residuals:
  """No residual layers at all, in the shapes of `count` of them; `key_layers` has leaves `[M, ...]`."""
  num_layers = jax.tree.leaves(key_layers)[0].shape[0]
  return Residuals(
    jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), key_layers),
    jnp.full((count, num_layers), -1, jnp.int32),
    jnp.full((count, num_layers), -1, jnp.int32),
    jnp.zeros((count, num_layers), bool),
  )


def select(
  layers: trees.PyTree, use_SxM: jax.Array, mask_SxM: jax.Array, origin_S: jax.Array, round_index: jax.Array, count: int
) -> Residuals:
  """The `count` least used of the S members' layers, for every layer index.

  Args:
    layers: the members' layers (or updates), leaves `[S, M, ...]`.
    use_SxM: how much the federation's attention could use each.
    mask_SxM: bool, which are there.
    origin_S: int32, the members' places in `Federation.members`.
    round_index: int32 scalar.
    count: R; places beyond the members that are there stay empty.
  """
  index_RxM, present_RxM = choose(-use_SxM, mask_SxM, count)
  return Residuals(
    _gather(layers, index_RxM), origin_S[index_RxM], jnp.full_like(index_RxM, round_index), present_RxM
  )


def route(pool: Residuals, eligible_PxM: jax.Array, scores_PxM: jax.Array, count: int) -> Residuals:
  """The `count` pooled layers with the highest score among the eligible, for every layer index.

  Args:
    pool: P residual layers, leaves `[P, M, ...]`.
    eligible_PxM: bool `[P, M or 1]`, which of them may go to this child.
    scores_PxM: their similarity to the child's own layers.
    count: R of the result; places for which nothing is eligible stay empty.
  """
  index_RxM, present_RxM = choose(scores_PxM, pool.present & eligible_PxM, count)
  return Residuals(
    _gather(pool.layers, index_RxM),
    jnp.take_along_axis(pool.origin, index_RxM, axis=0),
    jnp.take_along_axis(pool.round, index_RxM, axis=0),
    present_RxM,
  )


def choose(scores_SxM: jax.Array, mask_SxM: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """For every layer index the `count` rows with the highest score among those that are there, the best first.

  Returns int32 `[R, M]` rows, R being `count`, and bool `[R, M]`, which places are taken at all.
  """
  size = min(count, scores_SxM.shape[0])
  index_RxM = jax.lax.top_k(jnp.where(mask_SxM, scores_SxM, -jnp.inf).T, size)[1].T
  present_RxM = jnp.take_along_axis(mask_SxM, index_RxM, axis=0)
  empty = [(0, count - size), (0, 0)]
  return jnp.pad(index_RxM, empty), jnp.pad(present_RxM, empty)


def _gather(layers: trees.PyTree, index_RxM: jax.Array) -> trees.PyTree:
  """Picks, for every layer index by itself, rows of leaves `[S, M, ...]`: leaves `[R, M, ...]`."""
  column_M = jnp.arange(index_RxM.shape[1])
  return jax.tree.map(lambda leaf: leaf[index_RxM, column_M[None, :]], layers)
