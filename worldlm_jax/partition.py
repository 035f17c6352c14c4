"""Devices: the mesh, and what lies where. The only module that knows of either.

A mesh has three axes. The nodes of a level are stacked on axis 0, which is spread over `node`; a level whose size does
not divide evenly is filled up with ghosts, nodes that take no part in anything and sit on devices that would have
nothing to do otherwise. Each node's matrices, moments and updates are spread over `fsdp` and `tensor` by `MATRICES`,
its batches over `fsdp`. Without an accelerator there is one CPU device, and none of this changes anything.

Inside `per_device` a function sees its own share of axis 0; over `fsdp` and `tensor` the compiler splits the work, as
the shardings of its arguments and `constrain` tell it to.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from worldlm_jax import checks, trees
from worldlm_jax.config import MeshConfig

NODE, FSDP, TENSOR = "node", "fsdp", "tensor"

# How the last two axes of a matrix are spread, by its name. Whatever else a node has is small and lies whole on all of
# the node's devices. The embedding and the head are gathered for use, whatever the size of the vocabulary.
MATRICES = {
  "query": (FSDP, TENSOR), "key": (FSDP, TENSOR), "value": (FSDP, TENSOR), "attention_out": (TENSOR, FSDP),
  "gate": (FSDP, TENSOR), "up": (FSDP, TENSOR), "down": (TENSOR, FSDP),
  "embedding": (None, (FSDP, TENSOR)), "head": ((FSDP, TENSOR), None),
}


def make_mesh(devices: Sequence[jax.Device] | None = None, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """A mesh of all devices (or those given), as many of them on `node` as the other axes leave."""
  grid = np.asarray(devices if devices is not None else jax.devices()).reshape(-1, fsdp, tensor)
  return Mesh(grid, (NODE, FSDP, TENSOR))


def choose_mesh(config: MeshConfig, num_nodes: int, bytes_per_node: float, devices: Sequence[jax.Device]) -> Mesh:
  """The mesh that a config asks for; what it leaves open is chosen.

  Args:
    config: sizes of the axes; 0 leaves one open.
    num_nodes: of the widest level. No more devices are put on the node axis.
    bytes_per_node: what training one node takes. A node is spread over as many devices as it needs to fit.
    devices: all of them.

  Raises:
    checks.InputError: the sizes that are given do not make up the number of devices.
  """
  given = {NODE: config.node, FSDP: config.fsdp, TENSOR: config.tensor}
  count, fixed = len(devices), math.prod(size for size in given.values() if size)
  fits = count % fixed == 0 and (0 in given.values() or count == fixed)
  checks.require(fits, "config.mesh", " x ".join(f"{name}={size}" for name, size in given.items() if size),
                 f"sizes whose product {'divides' if 0 in given.values() else 'is'} the number of devices, {count}",
                 "set one of them to 0 to have it chosen")
  tensor = given[TENSOR] or 1
  if given[NODE] and given[FSDP] and not given[TENSOR]:
    tensor = count // fixed
  elif given[NODE]:
    given[FSDP] = count // (given[NODE] * tensor)
  if not given[FSDP]:
    memory = memory_of(devices[0])
    groups = [size for size in range(1, count // tensor + 1) if count // tensor % size == 0]  # of devices per node
    roomy = [size for size in groups if bytes_per_node <= 0.75 * memory * size * tensor] or groups[-1:]
    given[FSDP] = next((size for size in roomy if count // tensor // size <= num_nodes), groups[-1])
  return make_mesh(devices, given[FSDP], tensor)


def memory_of(device: jax.Device) -> float:
  """The bytes of a device's memory; inf where that is not known or, on CPUs, not its own."""
  stats = None if device.platform == "cpu" else device.memory_stats()
  return float(stats["bytes_limit"]) if stats else math.inf


def padded_size(num_nodes: int, mesh: Mesh) -> int:
  """`num_nodes` rounded up to a multiple of the mesh's node axis."""
  size = mesh.shape[NODE]
  return -(-num_nodes // size) * size


def node_sharding(mesh: Mesh) -> NamedSharding:
  """Axis 0 spread over the nodes' devices."""
  return NamedSharding(mesh, PartitionSpec(NODE))


def shardings(tree: trees.PyTree, mesh: Mesh) -> trees.PyTree:
  """How a tree of stacked nodes lies on the mesh: a sharding for each (abstract) leaf `[N, ...]`.

  A matrix's axis that `fsdp` or `tensor` does not divide is not spread over it.
  """

  def spread(path: tuple, leaf: Any) -> NamedSharding:
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    rule = next((MATRICES[name] for name in reversed(names) if name in MATRICES), None)
    if rule is None or leaf.ndim < 3:
      return node_sharding(mesh)
    axes = [axis if size % _size(mesh, axis) == 0 else None for axis, size in zip(rule, leaf.shape[-2:], strict=True)]
    return NamedSharding(mesh, PartitionSpec(NODE, *[None] * (leaf.ndim - 3), *axes))

  return jax.tree_util.tree_map_with_path(spread, tree)


def is_spread() -> bool:
  """Within `per_device`: whether each node is spread over several devices."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.size > mesh.shape.get(NODE, mesh.size)


def bytes_per_device(tree: trees.PyTree) -> int:
  """How much of a tree each device holds; leaves may be abstract, but have a sharding."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )


def describe(mesh: Mesh) -> str:
  """A mesh in words, such as "8 devices (node=4 fsdp=2)"."""
  sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
  return f"{mesh.size} devices ({sizes})" if mesh.size > 1 else "1 device"


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
  """Within `per_device`: says how `x`, of one node, is spread over the mesh's other axes, where it is."""
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes)) if is_spread() else x


def num_pieces(length: int, bytes_per_place: int) -> int:
  """Into how many equal pieces many long rows are cut, to be worked on one after the other: a divisor of `length`.

  On CPUs a piece of all rows stays in their caches. Rows that are spread over devices are not cut.
  """
  if is_spread():
    return 1
  most = max(1, piece_bytes() // bytes_per_place)
  return next(count for count in range(-(-length // most), length + 1) if length % count == 0)


def piece_bytes() -> int:
  """How much of many long rows is worked on at a time."""
  return 2**18 if jax.default_backend() == "cpu" else 2**28


def split(axis: str, *sizes: int) -> str | None:
  """The axis, where it divides arrays' axes of these sizes inside `per_device`; None where it does not."""
  devices = jax.sharding.get_abstract_mesh().shape.get(axis, 1)
  return axis if all(size % devices == 0 for size in sizes) else None


def per_shard(function: Callable[..., Any], in_specs: Sequence[Sequence[Any]], out_spec: Sequence[Any]) -> Any:
  """Runs `function`, of one node inside `per_device`, on each device's own part of the arrays, for kernels that the
  compiler cannot split.

  The specs name an axis of the mesh, or None, for each axis of an array: how it lies on the node's devices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return function
  specs = tuple(PartitionSpec(*spec) for spec in in_specs)
  return jax.shard_map(function, in_specs=specs, out_specs=PartitionSpec(*out_spec),
                       axis_names={FSDP, TENSOR}, check_vma=False)


def _size(mesh: Mesh, axis: Any) -> int:
  names = (axis,) if isinstance(axis, str) else axis or ()
  return math.prod(mesh.shape[name] for name in names)


def pad_nodes(array: np.ndarray, mesh: Mesh) -> np.ndarray:
  """Fills axis 0 up to `padded_size` with zeros: the ghosts."""
  ghosts = padded_size(array.shape[0], mesh) - array.shape[0]
  return np.pad(array, [(0, ghosts)] + [(0, 0)] * (array.ndim - 1))


def own_nodes(num_nodes: int, mesh: Mesh) -> np.ndarray:
  """Which nodes of a level lie on devices of this process: bool `[num_nodes]`; all of them in a single process."""
  share = padded_size(num_nodes, mesh) // mesh.shape[NODE]
  own = [any(d.process_index == jax.process_index() for d in group.flat) for group in mesh.devices]
  return np.repeat(own, share)[:num_nodes]


def put(tree: trees.PyTree, mesh: Mesh) -> trees.PyTree:
  """Spreads axis 0 of the arrays over the nodes' devices. Each process's rows of its own nodes are taken."""
  sharding = node_sharding(mesh)
  return jax.tree.map(lambda array: jax.make_array_from_callback(array.shape, sharding, lambda i: array[i]), tree)


def per_device(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """Runs `function` on each device's own share of axis 0, without any communication."""
  if mesh.size == 1:  # what is compiled for a mesh is up to a tenth slower on a CPU, also if it is of one device
    return function
  spec = PartitionSpec(NODE)
  return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={NODE}, check_vma=False)


def on_rows(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """Runs `function(whole, *arrays)` on each device's own share of axis 0 of the arrays; `whole` lies on all of them."""

  def run(whole: trees.PyTree, *arrays: Any) -> Any:
    specs = (PartitionSpec(), *(PartitionSpec(NODE) for _ in arrays))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(NODE), axis_names={NODE},
                         check_vma=False)(whole, *arrays)

  return run


def replicate(tree: trees.PyTree, mesh: Mesh) -> trees.PyTree:
  """The arrays, whole on every device."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def take_wave(tree: trees.PyTree, start: jax.Array, size: int, lanes: int, mesh: Mesh) -> trees.PyTree:
  """A wave: of each of the `lanes` equal shares of axis 0, the `size` rows from `start` on.

  Leaves `[lanes * size, ...]`. There are as many lanes as the mesh that trains has places for nodes; `mesh`, on which
  the tree lies, has as many or, where it is the host's, fewer.
  """

  def take(tree: trees.PyTree) -> trees.PyTree:
    return jax.tree.map(lambda leaf: _joined(jax.lax.dynamic_slice_in_dim(_lanes(leaf), start, size, 1)), tree)

  def _lanes(leaf: jax.Array) -> jax.Array:
    return leaf.reshape(lanes // mesh.shape[NODE], -1, *leaf.shape[1:])

  return per_device(take, mesh)(tree)


def put_wave(tree: trees.PyTree, wave: trees.PyTree, start: jax.Array, lanes: int, mesh: Mesh) -> trees.PyTree:
  """The inverse of `take_wave`: `tree` with those rows replaced by `wave`."""
  own = lanes // mesh.shape[NODE]

  def put(leaf: jax.Array, rows: jax.Array) -> jax.Array:
    leaf, rows = (x.reshape(own, -1, *x.shape[1:]) for x in (leaf, rows))
    return _joined(jax.lax.dynamic_update_slice_in_dim(leaf, rows, start, 1))

  return per_device(lambda tree, wave: jax.tree.map(put, tree, wave), mesh)(tree, wave)


def _joined(leaf: jax.Array) -> jax.Array:
  return leaf.reshape(-1, *leaf.shape[2:])


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


def host_mesh(mesh: Mesh) -> Mesh:
  """The mesh on which the nodes of `mesh` wait in the host's memory: a CPU device of each process.

  Raises:
    checks.InputError: a node is spread over several processes.
  """
  processes = [sorted({device.process_index for device in group.flat}) for group in mesh.devices]
  order = list(dict.fromkeys(process for group in processes for process in group))
  even = len(mesh.devices) % len(order) == 0 and max(len(group) for group in processes) == 1
  checks.require(even, "config.waiting", "host", "a mesh on which each process has as many nodes as the others",
                 "choose another config.mesh, or config.waiting=device")
  first = {device.process_index: device for device in reversed(jax.devices("cpu"))}
  return make_mesh([first[process] for process in order])


def choose_home(waiting: str, state_bytes: float, mesh: Mesh) -> Mesh:
  """Where the nodes' state lies while they wait: `mesh` itself, or the host if it says so or the state is too large.

  Up to half of the devices' memory is for waiting nodes; the rest is for those that train.
  """
  room = 0.5 * memory_of(mesh.devices.flat[0]) * mesh.size
  return host_mesh(mesh) if waiting == "host" or (waiting == "auto" and state_bytes > room) else mesh


def move(tree: trees.PyTree, mesh: Mesh) -> trees.PyTree:
  """The same stacked nodes on another mesh; copies run while the devices go on computing."""

  def through_host(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    shards = leaf.addressable_shards
    first = min(shard.index[0].start or 0 for shard in shards)
    last = max(leaf.shape[0] if shard.index[0].stop is None else shard.index[0].stop for shard in shards)
    rows = np.empty((last - first, *leaf.shape[1:]), leaf.dtype)

    def within(index: Any) -> tuple:
      start, stop, _ = index[0].indices(leaf.shape[0])
      return (slice(start - first, stop - first), *index[1:])

    for shard in shards:
      rows[within(shard.index)] = np.asarray(shard.data)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: rows[within(index)])

  if jax.process_count() == 1:
    return jax.device_put(tree, shardings(tree, mesh))
  return jax.tree.map(through_host, tree, shardings(tree, mesh))


def choose_nodes_at_once(num_nodes: int, params: trees.PyTree, state: trees.PyTree, mesh: Mesh, home: Mesh) -> int:
  """How many of a device's nodes train side by side when the config leaves it open.

  On CPUs one, since a single node already fills the cores. Elsewhere as many as fit into three
  quarters of what the device has free beside its share of the waiting state, at 7 times the parameters' bytes
  each: parameters and moments, gradients, their update, and as much again for activations; 4 more where another wave
  is on its way to or from the host meanwhile.
  """
  device = mesh.devices.flat[0]
  share = padded_size(num_nodes, mesh) // mesh.shape[NODE]
  stats = None if device.platform == "cpu" else device.memory_stats()
  if not stats:
    return 1
  waits_here = home is mesh
  free = stats["bytes_limit"] - stats["bytes_in_use"] - waits_here * trees.num_bytes(state) / mesh.size
  per_device = mesh.size // mesh.shape[NODE]
  return int(np.clip(0.75 * free / ((7 if waits_here else 11) * trees.num_bytes(params) / per_device), 1, share))
