"""Arithmetic and selection on pytrees of parameters."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def take(tree: PyTree, index: Any) -> PyTree:
  """Indexes the leading axis of every leaf."""
  return jax.tree.map(lambda leaf: leaf[index], tree)


def concatenate(trees: Sequence[PyTree]) -> PyTree:
  """Joins trees along the leading axis of every leaf."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def where(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
  """Selects by `condition`, whose axes are the leading axes of every leaf."""

  def select(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b)

  return jax.tree.map(select, yes, no)


def add(a: PyTree, b: PyTree) -> PyTree:
  """`a + b`, leaf by leaf."""
  return jax.tree.map(jnp.add, a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
  """`a - b`, leaf by leaf."""
  return jax.tree.map(jnp.subtract, a, b)


def zeros_like(tree: PyTree) -> PyTree:
  """Zeros of the same shapes and dtypes."""
  return jax.tree.map(jnp.zeros_like, tree)


def norms(tree: PyTree) -> jax.Array:
  """The Euclidean norm of each row of leaves `[N, ...]`: float32 `[N]`."""
  rows = [jnp.float32(leaf.reshape(len(leaf), -1)) for leaf in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(jnp.sum(jnp.square(row), axis=1) for row in rows))


def num_parameters(tree: PyTree) -> int:
  """The number of scalars in the tree; leaves may be abstract."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def num_bytes(tree: PyTree) -> int:
  """The number of bytes of the tree's leaves; leaves may be abstract."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
