"""Devices: the mesh, and what lies where. The only module that knows of either.

The nodes of a level are stacked on axis 0, which is spread over the mesh axis `node`; a level whose
size does not divide evenly is filled up with ghosts, nodes that take no part in anything. They sit on
devices that would have nothing to do otherwise. Without an accelerator there is one CPU device, and
none of this changes anything.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from worldlm_jax import trees

NODE = "node"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with all devices (or those given) on the axis `node`."""
  return Mesh(np.asarray(devices if devices is not None else jax.devices()), (NODE,))


def padded_size(num_nodes: int, mesh: Mesh) -> int:
  """`num_nodes` rounded up to a multiple of the devices on the node axis."""
  size = mesh.shape[NODE]
  return -(-num_nodes // size) * size


def node_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 spread over the nodes' devices."""
  return NamedSharding(mesh, PartitionSpec(NODE))


def pad_nodes(array: np.ndarray, mesh: Mesh) -> np.ndarray:
  """Fills axis 0 up to `padded_size` with zeros: the ghosts."""
  ghosts = padded_size(array.shape[0], mesh) - array.shape[0]
  return np.pad(array, [(0, ghosts)] + [(0, 0)] * (array.ndim - 1))


def own_nodes(num_nodes: int, mesh: Mesh) -> np.ndarray:
  """Which nodes of a level lie on devices of this process: bool `[num_nodes]`; all of them in a single process."""
  share = padded_size(num_nodes, mesh) // mesh.shape[NODE]
  own = [device.process_index == jax.process_index() for device in mesh.devices.flat]
  return np.repeat(own, share)[:num_nodes]


def put(tree: trees.PyTree, mesh: Mesh) -> trees.PyTree:
  """Spreads axis 0 of the arrays over the nodes' devices. Each process's rows of its own nodes are taken."""
  sharding = node_sharding(mesh)
  return jax.tree.map(lambda array: jax.make_array_from_callback(array.shape, sharding, lambda i: array[i]), tree)


def per_device(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """Runs `function` on each device's own share of axis 0, without any communication."""
  spec = PartitionSpec(NODE)
  return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def take_wave(tree: trees.PyTree, start: jax.Array, size: int, mesh: Mesh) -> trees.PyTree:
  """Of every device's own share of axis 0, the `size` rows from `start` on: leaves `[devices * size, ...]`."""

  def take(tree: trees.PyTree) -> trees.PyTree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), tree)

  return per_device(take, mesh)(tree)


def put_wave(tree: trees.PyTree, wave: trees.PyTree, start: jax.Array, mesh: Mesh) -> trees.PyTree:
  """The inverse of `take_wave`: `tree` with those rows replaced by `wave`."""

  def put(tree: trees.PyTree, wave: trees.PyTree) -> trees.PyTree:
    return jax.tree.map(lambda leaf, rows: jax.lax.dynamic_update_slice_in_dim(leaf, rows, start, 0), tree, wave)

  return per_device(put, mesh)(tree, wave)


def waves(num_rows: int, size: int, mesh: Mesh) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """Cuts `num_rows` padded rows into waves of at most `size` rows per device.

  Yields for each wave its start within a device's share, the rows it holds, and which of them are new:
  where `size` does not divide the share, the last wave overlaps the one before it.
  """
  share = num_rows // mesh.shape[NODE]
  size = min(size, share)
  for begin in range(0, share, size):
    start = min(begin, share - size)
    within = np.arange(start, start + size)
    rows = (share * np.arange(mesh.shape[NODE])[:, None] + within[None, :]).ravel()
    yield start, rows, np.tile(within >= begin, mesh.shape[NODE])


def choose_nodes_at_once(num_nodes: int, params: trees.PyTree, state: trees.PyTree, mesh: Mesh) -> int:
  """How many of a device's nodes train side by side when the config leaves it open.

  On CPUs one, since a single node already fills the cores. Elsewhere as many as fit into three
  quarters of what the device has free beside its share of the state, at 7 times the parameters' bytes
  each: parameters and moments, gradients, their update, and as much again for activations.
  """
  device = mesh.devices.flat[0]
  share = padded_size(num_nodes, mesh) // mesh.shape[NODE]
  stats = None if device.platform == "cpu" else device.memory_stats()
  if not stats:
    return 1
  free = stats["bytes_limit"] - stats["bytes_in_use"] - trees.num_bytes(state) / mesh.shape[NODE]
  return int(np.clip(0.75 * free / (7 * trees.num_bytes(params)), 1, share))
