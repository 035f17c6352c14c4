"""How the rows of stacked nodes travel between the devices of the mesh's node axis: the collectives of the exchange.

Three ways, each of which moves what the algorithm needs and nothing else:

  sums         of what members hold, at their federations   one all-reduce of a row for each federation
  broadcast    of what federations hold, to everybody       the same, everybody but the holder adding zeros
  neighbours   siblings that lie on other devices           permutations between devices that share a group of siblings

On a single device all three are plain indexing. Stacked layers travel one after the other, so that what is under way
is a layer and not a model. Rows are those of a level: N with its ghosts, of which the first `num_real` are nodes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from worldlm_jax import partition, trees
from worldlm_jax.partition import NODE

Fetch = Callable[[jax.Array], jax.Array]  # within `on_devices`: a device's own rows -> the rows that it needs


class Neighbours(NamedTuple):
  """Whose rows a device needs beside its own, so that all its nodes see their siblings."""

  permutations: tuple[tuple[tuple[int, int], ...], ...]  # (from, to) pairs of places on the node axis
  siblings: np.ndarray  # int32 [N, S]: the siblings' places among the rows that `fetch` gives on the node's device

  def fetch(self, rows: jax.Array) -> jax.Array:
    """A device's own rows, then those of its neighbours: `[share, ...]` -> `[(1 + permutations) share, ...]`."""
    blocks = [rows, *(jax.lax.ppermute(rows, NODE, pairs) for pairs in self.permutations)]
    return jnp.concatenate(blocks) if len(blocks) > 1 else rows

  @property
  def num_blocks(self) -> int:
    """How many times a device's own number of rows `fetch` gives."""
    return 1 + len(self.permutations)


NOBODY = Neighbours((), np.zeros((0, 0), np.int32))  # of those who look at no sibling


def neighbours(siblings_NxS: np.ndarray, mask_NxS: np.ndarray, mesh: Mesh) -> Neighbours:
  """The neighbours of a level whose nodes' siblings are at `siblings_NxS`, where the mask holds."""
  count = mesh.shape[NODE]
  share = len(siblings_NxS) // count
  device_N = np.arange(len(siblings_NxS)) // share
  shift_NxS = np.where(mask_NxS, (siblings_NxS // share - device_N[:, None]) % count, 0)
  shifts = [0, *sorted(set(shift_NxS.ravel().tolist()) - {0})]
  permutations = tuple(
    tuple(((to + shift) % count, to) for to in sorted(set(device_N[np.any(shift_NxS == shift, axis=1)].tolist())))
    for shift in shifts[1:]
  )
  places = np.searchsorted(shifts, shift_NxS) * share + siblings_NxS % share
  return Neighbours(permutations, places.astype(np.int32))


def broadcast(num_real: int, share: int) -> Fetch:
  """A fetch that gives every device the first `num_real` rows of all: `[share, ...]` -> `[num_real, ...]`."""

  def fetch(rows: jax.Array) -> jax.Array:
    if jax.lax.axis_size(NODE) == 1:
      return rows[:num_real]
    places = jax.lax.axis_index(NODE) * share + jnp.arange(share)
    own = jnp.zeros((num_real, *rows.shape[1:]), rows.dtype).at[places].set(rows, mode="drop")
    return jax.lax.psum(own, NODE)

  return fetch


def on_devices(
  function: Callable[..., Any], mesh: Mesh, num_everywhere: int = 0, result_everywhere: bool = False
) -> Callable[..., Any]:
  """Runs `function` on each device's own rows of its arguments; the last `num_everywhere` arguments it sees whole."""

  def call(*args: Any) -> Any:
    rows, whole = PartitionSpec(NODE), PartitionSpec()
    specs = (rows,) * (len(args) - num_everywhere) + (whole,) * num_everywhere
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=whole if result_everywhere else rows,
                           axis_names={NODE}, check_vma=False)
    return mapped(*args)

  return call


def take_parents(tree_P: trees.PyTree, parent_C: np.ndarray | jax.Array, num_real: int, mesh: Mesh) -> trees.PyTree:
  """The parent's row for each of the nodes below: leaves `[P, ...]` -> `[C, ...]`."""
  if mesh.shape[NODE] == 1:
    return trees.take(tree_P, jnp.asarray(parent_C))
  num_rows = jax.tree.leaves(tree_P)[0].shape[0]
  fetch = broadcast(num_real, num_rows // mesh.shape[NODE])

  def take(tree: trees.PyTree, parent: jax.Array) -> trees.PyTree:
    return jax.tree.map(lambda leaf: by_layer(lambda rows, _: fetch(rows)[parent], leaf, leaf.ndim > 3), tree)

  return on_devices(take, mesh)(tree_P, jnp.asarray(parent_C))


def sum_members(
  tree_C: trees.PyTree, coefficients: jax.Array, num_padded: int, mesh: Mesh
) -> trees.PyTree:
  """Weighted sums of members at their federations: leaves `[C, ...]` -> `[num_padded, ...]`.

  Args:
    tree_C: the members, ghosts included.
    coefficients: float32 `[C, Q]`, Q sums at the federations that there are, as many at each, side by side; or
      `[C, M, Q]` for stacked layers, leaves `[C, M, ...]`, each with its own. Zeros add nothing, whatever is there.
    num_padded: rows of the result, those of ghosts included, which are zero.
    mesh: the devices.
  """

  def total(tree: trees.PyTree, coefficients: jax.Array) -> trees.PyTree:
    def one(rows: jax.Array, m: Any) -> jax.Array:
      c_CxQ = coefficients if coefficients.ndim == 2 else coefficients[:, m]
      sums = _weighted_sums(c_CxQ, rows)
      return own_rows(jax.lax.psum(sums, NODE) if mesh.shape[NODE] > 1 else sums, num_padded // mesh.shape[NODE])

    return jax.tree.map(lambda leaf: by_layer(one, leaf, leaf.ndim > 3 or coefficients.ndim > 2), tree)

  return on_devices(total, mesh)(tree_C, coefficients)


def _weighted_sums(c_CxQ: jax.Array, rows: jax.Array) -> jax.Array:
  """`sum_c c_cq row_c`, piece by piece: `[C, ...]` -> `[Q, ...]`. Rows with zeros alone add nothing."""
  if partition.is_spread():  # a change of shape would gather what lies on several devices
    counts = jnp.any(c_CxQ != 0, axis=1).reshape(-1, *[1] * (rows.ndim - 1))
    return jnp.tensordot(c_CxQ.T, jnp.where(counts, rows, 0.0), 1, precision=jax.lax.Precision.HIGHEST)
  counts_Cx1, flat_CxL = jnp.any(c_CxQ != 0, axis=1)[:, None], rows.reshape(len(rows), -1)
  num_sums, length = c_CxQ.shape[1], flat_CxL.shape[1]
  count = partition.num_pieces(length, (len(rows) + num_sums) * rows.dtype.itemsize)
  size = length // count

  def piece(i: Any) -> jax.Array:
    part = jax.lax.dynamic_slice_in_dim(flat_CxL, i * size, size, 1)
    return jnp.matmul(c_CxQ.T, jnp.where(counts_Cx1, part, 0.0), precision=jax.lax.Precision.HIGHEST)

  def write(i: jax.Array, out: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(out, piece(i), i * size, 1)

  out = piece(0) if count == 1 else jax.lax.fori_loop(0, count, write, jnp.zeros((num_sums, length), jnp.float32))
  return out.reshape(num_sums, *rows.shape[1:])


def own_rows(rows: jax.Array, share: int) -> jax.Array:
  """Within `on_devices`: of the rows of all real nodes a device's own, ghosts zero: `[n, ...]` -> `[share, ...]`."""
  missing = share * jax.lax.axis_size(NODE) - len(rows)
  padded = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
  return jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(NODE) * share, share)


def by_layer(function: Callable[[jax.Array, Any], jax.Array], leaf: jax.Array, is_stack: bool) -> jax.Array:
  """Applies a function of rows to stacked layers `[rows, M, ...]` one after the other, to anything else at once."""
  if not is_stack:
    return function(leaf, None)

  def layer(m: Any) -> jax.Array:
    return function(jax.lax.dynamic_index_in_dim(leaf, m, 1, keepdims=False), m)

  def write(m: jax.Array, out: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(out, layer(m), m, 1)

  found = jax.eval_shape(layer, 0)
  out = jnp.zeros((found.shape[0], leaf.shape[1], *found.shape[1:]), found.dtype)
  return jax.lax.fori_loop(0, leaf.shape[1], write, out)
