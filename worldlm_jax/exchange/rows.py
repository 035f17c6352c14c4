"""Linear algebra on stacked rows of parameters that never copies them whole.

What attention over updates needs of its many large vectors are their inner products, and what it makes of them are
linear combinations. Both are sums over parameters, so they run over a part of all rows at a time, small enough for a
cache: one pass that reads everything for the products (`gram`), another that reads everything and writes the result
(`combine`).

Rows of different origin (a level's own, its parents', the pool's) are `Source`s, joined along the row axis X. Axes of
the tables: T tensors of a block, M layers. To be called within `links.on_devices`; what a source fetches may travel.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from worldlm_jax import links, partition, trees


class Source(NamedTuple):
  """Rows of key layers (or their updates), and where they come from."""

  layers: trees.PyTree  # the device's own, leaves [rows, M, ...]
  fetch: links.Fetch  # what all its nodes need


class Instead(NamedTuple):
  """Rows of another source that some nodes take in the place of their own."""

  source: Source
  place: jax.Array  # int32 [N]: which of its rows
  takes: jax.Array  # bool [N]: who does


def gram(sources: Sequence[Source]) -> list[jax.Array]:
  """The inner products of all rows: float32 `[M, X, X]` for each tensor."""
  stacks = list(zip(*(jax.tree.leaves(source.layers) for source in sources), strict=True))

  def one(stack: tuple[jax.Array, ...]) -> jax.Array:
    count = _num_pieces(stack)

    def layer(m: jax.Array) -> jax.Array:
      def add(i: Any, total: jax.Array) -> jax.Array:
        piece = _piece(stack, sources, m, i, count)
        return total + jnp.matmul(piece, piece.T, precision=jax.lax.Precision.HIGHEST)

      size = jax.eval_shape(lambda: _piece(stack, sources, 0, 0, count)).shape[0]
      return jax.lax.fori_loop(0, count, add, jnp.zeros((size, size), jnp.float32))

    return jax.lax.map(layer, jnp.arange(stack[0].shape[1]))

  return [one(stack) for stack in stacks]


def layered(tree: trees.PyTree) -> trees.PyTree:
  """A model, or a part of one, with a layer axis in every leaf: `[rows, M, ...]`, M being 1 for what is no block."""
  return jax.tree.map(lambda leaf: leaf if leaf.ndim > 3 else leaf[:, None], tree)


def total(tables: Sequence[jax.Array]) -> jax.Array:
  """The inner products over all layers of all tensors: `[X, X]` from what `gram` gives."""
  return sum((jnp.sum(table, axis=0) for table in tables), jnp.float32(0))


def combine(
  base: trees.PyTree, coefficients_TxMxNxX: Iterable[jax.Array], sources: Sequence[Source], counts_X: jax.Array,
  instead: Instead | None = None,
) -> trees.PyTree:
  """`base_n + sum_x c_nx row_x` in every tensor and layer: leaves `[N, M, ...]`, in the place of `base`.

  Rows that do not count (bool `[X]`) add nothing, whatever they hold. Nodes that take something instead get just that.
  """
  leaves, structure = jax.tree.flatten(base)
  others = leaves if instead is None else jax.tree.leaves(instead.source.layers)
  stacks = list(zip(*(jax.tree.leaves(source.layers) for source in sources), strict=True))

  def one(out: jax.Array, stack: tuple[jax.Array, ...], c_MxNxX: jax.Array, other: jax.Array) -> jax.Array:
    count = _num_pieces((out, *stack))
    shape = out.shape

    def write(j: jax.Array, out: jax.Array) -> jax.Array:
      m, i = j // count, j % count
      piece = jnp.where(counts_X[:, None], _piece(stack, sources, m, i, count), 0.0)
      added = jnp.matmul(c_MxNxX[m], piece, precision=jax.lax.Precision.HIGHEST)
      size = 1 if count == 1 else piece.shape[1]
      mixed = jax.lax.dynamic_slice_in_dim(out, j * size, size, 1)
      mixed += added.reshape(mixed.shape)
      if instead is not None:
        taken = instead.source.fetch(_cut(other, m, i, count))[instead.place]
        mixed = trees.where(instead.takes, taken.reshape(mixed.shape), mixed)
      return jax.lax.dynamic_update_slice_in_dim(out, mixed, j * size, 1)

    # Flat throughout: where its shape changes within the loop, all of it is copied for every piece.
    begin = out if count == 1 else out.reshape(len(out), -1)
    return jax.lax.fori_loop(0, shape[1] * count, write, begin).reshape(shape)

  found = [one(*parts) for parts in zip(leaves, stacks, coefficients_TxMxNxX, others, strict=True)]
  return jax.tree.unflatten(structure, found)


def _piece(stack: tuple[jax.Array, ...], sources: Sequence[Source], m: Any, i: Any, count: int) -> jax.Array:
  """The i-th piece of layer m of all rows: float32 `[X, C]`."""
  pieces = [source.fetch(_cut(leaf, m, i, count)) for leaf, source in zip(stack, sources, strict=True)]
  flat = [piece.reshape(piece.shape[0], -1).astype(jnp.float32) for piece in pieces]
  return jnp.concatenate(flat) if len(flat) > 1 else flat[0]


def _cut(leaf: jax.Array, m: Any, i: Any, count: int) -> jax.Array:
  """The i-th of `count` pieces of layer m, `[rows, C]`; a layer in one piece as it is, `[rows, ...]`."""
  if count == 1:
    return jax.lax.dynamic_index_in_dim(leaf, m, 1, keepdims=False)
  size = leaf[0, 0].size // count
  return jax.lax.dynamic_slice(leaf.reshape(len(leaf), -1), (0, (m * count + i) * size), (len(leaf), size))


def _num_pieces(stack: tuple[jax.Array, ...]) -> int:
  """Into how many pieces a layer of all these rows is cut."""
  return partition.num_pieces(stack[0][0, 0].size, sum(leaf.shape[0] * leaf.dtype.itemsize for leaf in stack))
