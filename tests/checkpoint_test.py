"""A checkpoint restored onto other meshes: the same rows, whatever number of ghosts follows them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from worldlm_jax import checkpoint, config, federation, partition

LEAVES = 5
MESHES = ((1, 1, 1), (8, 1, 1), (3, 2, 1), (2, 2, 2), (1, 1, 4))


@pytest.fixture(scope="module")
def tree() -> federation.Federation:
  leaves = [config.Node(f"n{i}", config.Files("unread")) for i in range(LEAVES)]
  return federation.resolve(config.Config(federation=config.FederationConfig(root=config.Node("world", None, leaves))))


def _arrays(num_nodes: int) -> dict[str, np.ndarray]:
  """Without ghosts; prime sizes are not spread over fsdp and tensor, even ones are."""
  draw = np.random.default_rng(num_nodes)
  return {
    "query": draw.normal(size=(num_nodes, 3, 4, 8)).astype(np.float32),
    "down": draw.normal(size=(num_nodes, 7, 5)).astype(np.float32),
    "norm": draw.normal(size=(num_nodes, 11)).astype(np.float32),
    "count": draw.integers(-9, 9, num_nodes).astype(np.int32), "flag": draw.integers(0, 2, num_nodes).astype(bool),
  }


def _mesh(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
  return partition.make_mesh(jax.devices()[: int(np.prod(shape))], *shape[1:])


def _state(shape: tuple[int, int, int]) -> tuple[Any, ...]:
  """On a mesh; ghosts hold something else than zeros, as they do after training."""
  mesh = _mesh(shape)

  def padded(array: np.ndarray) -> np.ndarray:
    ghosts = partition.padded_size(len(array), mesh) - len(array)
    return np.concatenate([array, np.full((ghosts, *array.shape[1:]), 77).astype(array.dtype)])

  levels = [{name: padded(array) for name, array in _arrays(n).items()} for n in (1, LEAVES)]
  return tuple(jax.device_put(level, partition.shardings(level, mesh)) for level in levels)


def _abstract(shape: tuple[int, int, int]) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _state(shape))


def _checkpoints(folder: Path, tree: federation.Federation) -> checkpoint.Checkpoints:
  return checkpoint.Checkpoints(folder, config.CheckpointConfig(keep_last=9), tree)


@pytest.mark.parametrize("saved", [(8, 1, 1), (2, 2, 2), (1, 1, 1)])
def test_any_mesh_restores_what_any_other_has_saved(
  tmp_path: Path, tree: federation.Federation, saved: tuple[int, int, int]
) -> None:
  checkpoints = _checkpoints(tmp_path / "checkpoints", tree)
  checkpoints.save(7, _state(saved), {"round": 3}, None)
  checkpoints.wait()
  for shape in MESHES:
    found = checkpoints.restore_newest(_abstract(shape), pytest.fail)
    assert found is not None and found.record == {"round": 3}
    for number, (level, wanted) in enumerate(zip(found.state, _abstract(shape), strict=True)):
      n = (1, LEAVES)[number]
      for name, array in _arrays(n).items():
        assert level[name].shape == wanted[name].shape and level[name].sharding == wanted[name].sharding
        np.testing.assert_array_equal(np.asarray(level[name])[:n], array, err_msg=f"{shape} {name}")
  checkpoints.close()


def test_the_checksum_is_that_of_the_rows_alone_and_changes_with_any_of_them(
  tmp_path: Path, tree: federation.Federation
) -> None:
  checkpoints = _checkpoints(tmp_path / "checkpoints", tree)
  first = checkpoints._checksum(_state(MESHES[0]))
  assert all(checkpoints._checksum(_state(shape)) == first for shape in MESHES)
  for name in _arrays(1):
    root, leaves = _state((2, 2, 2))
    for row, same in ((LEAVES - 1, False), (LEAVES, True)):  # the last of the nodes, and a ghost
      changed = np.asarray(leaves[name]).copy()
      changed[row] = ~changed[row] if changed.dtype == bool else -changed[row] - 1
      other = leaves | {name: jax.device_put(changed, leaves[name].sharding)}
      assert (checkpoints._checksum((root, other)) == first) is same, (name, row)
  checkpoints.close()


# Where a read fails, Orbax leaves others behind whose event loop is gone when they end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_falls_back_and_other_arrays_are_refused(tmp_path: Path, tree: federation.Federation) -> None:
  checkpoints, said = _checkpoints(tmp_path / "checkpoints", tree), []
  checkpoints.save(1, _state((2, 2, 2)), {"round": 1}, None)
  checkpoints.save(2, _state((2, 2, 2)), {"round": 2}, None)
  checkpoints.wait()
  victim = max((tmp_path / "checkpoints" / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
  content = bytearray(victim.read_bytes())
  content[len(content) // 2] ^= 8
  victim.write_bytes(content)
  found = checkpoints.restore_newest(_abstract((3, 2, 1)), said.append)
  assert found is not None and found.record == {"round": 1}
  assert len(said) == 1 and said[0].startswith("checkpoint 2 is damaged (")
  assert (tmp_path / "damaged" / "2.0").is_dir()
  root, leaves = _abstract((3, 2, 1))
  leaves["norm"] = jax.ShapeDtypeStruct((6, 13), np.float32, sharding=leaves["norm"].sharding)
  with pytest.raises(ValueError, match=r"arrays of this version's state \(.*norm.*float32\[5, 11\].*float32\[5, 13\]"):
    checkpoints.restore_newest((root, leaves), pytest.fail)
  checkpoints.close()
