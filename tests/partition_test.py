"""Where nodes lie: padding, waves, and the rows that a wave takes and puts back, on up to 8 devices."""

import functools
import types

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from worldlm_jax import partition


@functools.cache
def mesh_of(num_devices):
  return partition.make_mesh(jax.devices()[:num_devices])


def test_a_mesh_has_all_devices_on_the_node_axis():
  assert dict(partition.make_mesh().shape) == {"node": 8, "fsdp": 1, "tensor": 1}
  assert dict(mesh_of(3).shape) == {"node": 3, "fsdp": 1, "tensor": 1}
  assert dict(partition.make_mesh(fsdp=2, tensor=2).shape) == {"node": 2, "fsdp": 2, "tensor": 2}


@hypothesis.given(st.integers(0, 97), st.integers(1, 8))
def test_padded_size_is_the_next_multiple_of_the_devices(num_nodes, num_devices):
  size = partition.padded_size(num_nodes, mesh_of(num_devices))
  assert size % num_devices == 0 and num_nodes <= size < num_nodes + num_devices


def test_ghosts_are_zeros_behind_the_nodes():
  array = np.arange(1, 16).reshape(5, 3)
  padded = partition.pad_nodes(array, mesh_of(4))
  assert padded.dtype == array.dtype
  np.testing.assert_array_equal(padded, np.concatenate([array, np.zeros((3, 3), int)]))
  np.testing.assert_array_equal(partition.pad_nodes(array, mesh_of(5)), array)
  assert partition.pad_nodes(np.array([True]), mesh_of(2)).tolist() == [True, False]


@hypothesis.given(st.integers(1, 13), st.integers(1, 17), st.integers(1, 8))
def test_waves_cover_every_row_exactly_once_as_new(share, size, num_devices):
  num_rows = share * num_devices
  seen = []
  for start, rows, new in partition.waves(num_rows, size, mesh_of(num_devices)):
    per_device = min(size, share)
    assert rows.shape == new.shape == (num_devices * per_device,), "all waves have one shape"
    expected = [share * device + start + i for device in range(num_devices) for i in range(per_device)]
    assert rows.tolist() == expected
    assert new.dtype == bool
    seen += rows[new].tolist()
  assert sorted(seen) == list(range(num_rows))


@pytest.mark.parametrize("num_devices", [1, 3, 8])
def test_a_wave_takes_its_rows_and_puts_them_back(num_devices):
  mesh, share, size = mesh_of(num_devices), 5, 2
  num_rows = share * num_devices
  tree = {"x": np.arange(num_rows * 3, dtype=np.float32).reshape(num_rows, 3), "n": np.arange(num_rows, dtype=np.int32)}
  placed = jax.device_put(tree, partition.node_sharding(mesh))
  take = jax.jit(functools.partial(partition.take_wave, size=size, mesh=mesh))
  put = jax.jit(functools.partial(partition.put_wave, mesh=mesh))
  counted = placed
  for start, rows, new in partition.waves(num_rows, size, mesh):
    wave = take(placed, np.int32(start))
    jax.tree.map(lambda found, whole, rows=rows: np.testing.assert_array_equal(found, whole[rows]), wave, tree)
    jax.tree.map(np.testing.assert_array_equal, put(placed, wave, np.int32(start)), tree)
    now = take(counted, np.int32(start))
    counted = put(counted, now | {"n": now["n"] + 1000 * new.astype(np.int32)}, np.int32(start))
    assert counted["x"].sharding.is_equivalent_to(partition.node_sharding(mesh), 2)
  jax.tree.map(np.testing.assert_array_equal, counted, tree | {"n": tree["n"] + 1000})


@pytest.mark.parametrize("num_devices", [1, 4])
def test_each_device_works_on_its_own_share(num_devices):
  mesh = mesh_of(num_devices)
  found = jax.jit(partition.per_device(lambda x: x - x.sum(keepdims=True), mesh))(np.arange(12))
  shares = np.arange(12).reshape(num_devices, -1)
  np.testing.assert_array_equal(found, (shares - shares.sum(axis=1, keepdims=True)).ravel())


def test_on_cpus_one_node_trains_at_a_time():
  assert partition.choose_nodes_at_once(97, {"x": np.ones(3)}, {"x": np.ones(3)}, mesh_of(8)) == 1


@pytest.mark.parametrize(("num_nodes", "expected"), [(97, 7), (5, 3), (1, 1)])
def test_elsewhere_as_many_nodes_train_at_once_as_fit_beside_the_state(num_nodes, expected):
  """Two devices with 80 bytes free each, 10 of which the state takes; a node of 1 byte needs 7."""
  device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 90, "bytes_in_use": 10})
  mesh = types.SimpleNamespace(devices=np.array([device, device], object).reshape(2, 1, 1), shape={"node": 2})
  params, state = {"x": np.ones(1, np.int8)}, {"x": np.ones(20, np.int8)}
  assert partition.choose_nodes_at_once(num_nodes, params, state, mesh) == expected


def test_put_spreads_the_rows_over_the_devices():
  mesh, rows = mesh_of(4), np.arange(24).reshape(8, 3)
  placed = partition.put({"a": rows, "b": None}, mesh)
  np.testing.assert_array_equal(placed["a"], rows)
  assert placed["a"].sharding == partition.node_sharding(mesh) and placed["b"] is None
  assert [shard.data.shape for shard in placed["a"].addressable_shards] == [(2, 3)] * 4


@pytest.mark.parametrize(("num_nodes", "own"), [
  (7, [1, 1, 1, 1, 0, 0, 0]), (3, [1, 1, 0]), (1, [1]), (8, [1] * 4 + [0] * 4),
])
def test_a_process_has_the_nodes_on_its_own_devices(num_nodes, own):
  devices = [types.SimpleNamespace(process_index=process) for process in (0, 0, 1, 1)]
  mesh = types.SimpleNamespace(shape={"node": 4}, devices=np.array(devices, object).reshape(4, 1, 1))
  assert partition.own_nodes(num_nodes, mesh).tolist() == [bool(i) for i in own]
  assert partition.own_nodes(num_nodes, mesh_of(4)).all()


@pytest.mark.parametrize("rows", [4, 3])
def test_per_shard_gives_each_device_its_part_where_that_divides(rows):
  mesh, seen = partition.make_mesh(fsdp=2, tensor=2), []

  def double(x):
    seen.append(x.shape)
    return 2 * x

  def node(x):
    spec = partition.split(partition.FSDP, x.shape[0]), partition.split(partition.TENSOR, 6, 2), None
    return partition.per_shard(double, (spec,), spec)(x)

  x = np.arange(4 * rows * 6 * 5, dtype=np.float32).reshape(4, rows, 6, 5)
  np.testing.assert_array_equal(jax.jit(partition.per_device(jax.vmap(node), mesh))(x), 2 * x)
  assert set(seen) == {(2 if rows == 4 else 3, 3, 5)}
  np.testing.assert_array_equal(node(x[0]), 2 * x[0])
  assert seen[-1] == (rows, 6, 5), "without a mesh, all of it"
