"""Where nodes lie: padding, waves, and the rows that a wave takes and puts back, on up to 8 devices."""

import functools
import types

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from worldlm_jax import checks, config, partition


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


@pytest.mark.parametrize(("num_devices", "num_home"), [(1, 1), (3, 3), (8, 8), (8, 2), (3, 1)])
def test_a_wave_takes_its_rows_and_puts_them_back(num_devices, num_home):
  """Also where the rows lie on fewer devices than the wave is for."""
  training, mesh, share, size = mesh_of(num_devices), mesh_of(num_home), 5, 2
  num_rows = share * num_devices
  tree = {"x": np.arange(num_rows * 3, dtype=np.float32).reshape(num_rows, 3), "n": np.arange(num_rows, dtype=np.int32)}
  placed = jax.device_put(tree, partition.node_sharding(mesh))
  take = jax.jit(functools.partial(partition.take_wave, size=size, lanes=num_devices, mesh=mesh))
  put = jax.jit(functools.partial(partition.put_wave, lanes=num_devices, mesh=mesh))
  counted = placed
  for start, rows, new in partition.waves(num_rows, size, training):
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
  assert partition.choose_nodes_at_once(97, {"x": np.ones(3)}, {"x": np.ones(3)}, mesh_of(8), mesh_of(8)) == 1


@pytest.mark.parametrize(("num_nodes", "at_home", "on_host"), [(97, 7, 5), (5, 3, 3), (1, 1, 1)])
def test_elsewhere_as_many_nodes_train_at_once_as_fit_beside_the_state(num_nodes, at_home, on_host):
  """Two devices with 80 bytes free each, 10 of which the state takes; a node of 1 byte needs 7.

  Where the state is on the host, it takes none of them, but a node needs 11, since another wave is on its way.
  """
  device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 90, "bytes_in_use": 10})
  mesh = types.SimpleNamespace(devices=np.array([device, device], object).reshape(2, 1, 1), shape={"node": 2}, size=2)
  params, state = {"x": np.ones(1, np.int8)}, {"x": np.ones(20, np.int8)}
  assert partition.choose_nodes_at_once(num_nodes, params, state, mesh, mesh) == at_home
  assert partition.choose_nodes_at_once(num_nodes, params, state, mesh, mesh_of(1)) == on_host


def gpus(count, memory=100):
  return [types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": memory}) for _ in range(count)]


@pytest.mark.parametrize(("given", "num_nodes", "bytes_per_node", "expected"), [
  ({}, 100, 1, (8, 1, 1)),  # as many nodes side by side as there are devices
  ({}, 4, 1, (4, 2, 1)),  # no more places than nodes
  ({}, 3, 1, (2, 4, 1)),  # a divisor of the devices
  ({}, 100, 200, (2, 4, 1)),  # three quarters of a device's memory are for a node
  ({}, 1, 1, (1, 8, 1)),
  ({"tensor": 2}, 100, 1, (4, 1, 2)),
  ({"fsdp": 2}, 100, 1, (4, 2, 1)),
  ({"node": 2}, 100, 1, (2, 4, 1)),
  ({"node": 2, "fsdp": 2}, 100, 1, (2, 2, 2)),
  ({"node": 2, "fsdp": 4, "tensor": 1}, 100, 1, (2, 4, 1)),
])
def test_what_a_config_leaves_open_of_a_mesh_is_chosen(monkeypatch, given, num_nodes, bytes_per_node, expected):
  def sizes(devices, fsdp, tensor):
    return len(devices) // (fsdp * tensor), fsdp, tensor

  monkeypatch.setattr(partition, "make_mesh", sizes)
  assert partition.choose_mesh(config.MeshConfig(**given), num_nodes, bytes_per_node, gpus(8)) == expected


@pytest.mark.parametrize("given", [{"node": 3}, {"node": 2, "fsdp": 2, "tensor": 1}, {"fsdp": 16}])
def test_a_mesh_of_another_number_of_devices_is_refused(given):
  with pytest.raises(checks.InputError, match=r"config\.mesh='.*'.*number of devices, 8"):
    partition.choose_mesh(config.MeshConfig(**given), 4, 1, gpus(8))


def test_nodes_wait_on_the_host_where_they_would_take_half_of_the_memory():
  mesh = types.SimpleNamespace(devices=np.array(gpus(2), object).reshape(2, 1, 1), size=2)
  assert partition.choose_home("auto", 100, mesh) is mesh and partition.choose_home("device", 1000, mesh) is mesh
  for device in mesh.devices.flat:
    device.process_index = 0
  for waiting, size in (("auto", 101), ("host", 1)):
    home = partition.choose_home(waiting, size, mesh)
    assert home.devices.ravel().tolist() == jax.devices("cpu")[:1]


def test_nodes_of_several_processes_cannot_wait_on_one_host():
  devices = [types.SimpleNamespace(process_index=process) for process in (0, 1)]
  with pytest.raises(checks.InputError, match=r"config\.waiting='host'.*another config.mesh"):
    partition.host_mesh(types.SimpleNamespace(devices=np.array(devices, object).reshape(1, 2, 1)))


@pytest.mark.parametrize("processes", [1, 2])
def test_what_moves_to_another_mesh_stays_the_same(monkeypatch, processes):
  """With two processes, as far as one can play both: its rows are all there."""
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  rows = {"gate": {"kernel": np.arange(8 * 3 * 4 * 2, dtype=np.float32).reshape(8, 3, 4, 2)}, "n": np.arange(8)}
  source, target = partition.make_mesh(jax.devices()[:4], fsdp=2), partition.make_mesh(jax.devices()[7:])
  there = partition.move(jax.device_put(rows, partition.shardings(rows, source)), target)
  jax.tree.map(np.testing.assert_array_equal, there, rows)
  assert there["n"].sharding.device_set == {jax.devices()[7]}


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
