"""A checkpoint restored onto other meshes: the same rows, whatever number of ghosts follows them."""

import json
import shutil
from collections.abc import Callable
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
    # Too large to lie within the index of a checkpoint's files, which has checksums of its own; not to be compressed.
    "bits": draw.integers(-2**31, 2**31, (num_nodes, 601)).astype(np.int32),
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


@pytest.mark.parametrize("small", [0, checkpoint.SMALL], ids=["on the devices", "by the host"])
def test_the_checksum_is_that_of_the_rows_alone_and_changes_with_any_of_them(
  tmp_path: Path, tree: federation.Federation, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  checkpoints = _checkpoints(tmp_path / "checkpoints", tree)
  first = checkpoints._checksum(_state(MESHES[0]))
  monkeypatch.setattr(checkpoint, "SMALL", small)
  assert all(checkpoints._checksum(_state(shape)) == first for shape in MESHES)
  for name in _arrays(1):
    root, leaves = _state((2, 2, 2))
    for row, same in ((LEAVES - 1, False), (LEAVES, True)):  # the last of the nodes, and a ghost
      changed = np.asarray(leaves[name]).copy()
      changed[row] = ~changed[row] if changed.dtype == bool else -changed[row] - 1
      other = leaves | {name: jax.device_put(changed, leaves[name].sharding)}
      assert (checkpoints._checksum((root, other)) == first) is same, (name, row)
  checkpoints.close()


def _flip_bits(folder: Path) -> None:
  """In every copy of some numbers that the files hold as they are, which nothing but our checksum notices.

  Not anywhere in some file: parts of each process's own files are not needed any more.
  """
  number, found = _arrays(LEAVES)["bits"][LEAVES - 1, 300:304].tobytes(), 0
  for file in folder.rglob("d/*"):
    content = file.read_bytes()
    found += content.count(number)
    file.write_bytes(content.replace(number, number[:-2] + bytes([number[-2] ^ 8]) + number[-1:]))
  assert found


def _change_the_record(folder: Path) -> None:
  (file,) = folder.glob("record/metadata")
  content = file.read_text()
  assert '"round": 2' in content
  file.write_text(content.replace('"round": 2', '"round": 3'))


def _largest(folder: Path) -> Path:
  return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _cut_short(folder: Path) -> None:
  victim = _largest(folder)
  victim.write_bytes(victim.read_bytes()[:-1])


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory, tree: federation.Federation) -> Path:
  """The folder of two checkpoints, 1 and 2, of the same state."""
  checkpoints = _checkpoints(tmp_path_factory.mktemp("saved") / "checkpoints", tree)
  for number in (1, 2):
    checkpoints.save(number, _state((2, 2, 2)), {"round": number}, None)
  checkpoints.wait()
  checkpoints.close()
  return checkpoints.folder


# Where a read fails, Orbax leaves others behind whose event loop is gone when they end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("damage", "reason"), [
  (_flip_bits, "the arrays do not have the checksum they were saved with"),
  (_change_the_record, "the record does not have the checksum it was saved with"),
  (_cut_short, "files are missing or cut short"),
  (lambda folder: _largest(folder).unlink(), "files are missing or cut short"),
  (lambda folder: (folder / "record" / "metadata").write_text('{"round":'), "files are missing or cut short"),
], ids=["flipped bits", "changed record", "cut short", "missing", "half a record"])
def test_what_is_damaged_is_set_aside_for_the_one_before(
  tmp_path: Path, tree: federation.Federation, two_saved: Path, damage: Callable[[Path], None], reason: str
) -> None:
  shutil.copytree(two_saved, tmp_path / "checkpoints")
  damage(tmp_path / "checkpoints" / "2")
  checkpoints, said = _checkpoints(tmp_path / "checkpoints", tree), []
  found = checkpoints.restore_newest(_abstract((3, 2, 1)), said.append)
  checkpoints.close()
  assert found is not None and found.record == {"round": 1}
  np.testing.assert_array_equal(np.asarray(found.state[1]["norm"])[:LEAVES], _arrays(LEAVES)["norm"])
  target = tmp_path / "damaged" / "2.0"
  assert said == [f"checkpoint 2 is damaged ({reason}); moved to {target}, falling back to the one before it"]
  assert target.is_dir()


def test_the_checksum_of_the_record_is_that_of_its_values_in_any_order(two_saved: Path) -> None:
  record = json.loads((two_saved / "2" / "record" / "metadata").read_text())
  expected = record.pop("record_checksum")
  assert checkpoint._record_checksum(record) == expected
  assert checkpoint._record_checksum(dict(reversed(record.items()))) == expected
  for change in ({"round": 3}, {"round": 2.0}, {"checksum": "0"}, {"structure": {}}, {"other": 1}):
    assert checkpoint._record_checksum(record | change) != expected


def test_other_arrays_are_refused_and_left_alone(
  tmp_path: Path, tree: federation.Federation, two_saved: Path
) -> None:
  shutil.copytree(two_saved, tmp_path / "checkpoints")
  checkpoints = _checkpoints(tmp_path / "checkpoints", tree)
  root, leaves = _abstract((3, 2, 1))
  leaves["norm"] = jax.ShapeDtypeStruct((6, 13), np.float32, sharding=leaves["norm"].sharding)
  with pytest.raises(ValueError, match=r"arrays of this version's state \(.*norm.*float32\[5, 11\].*float32\[5, 13\]"):
    checkpoints.restore_newest((root, leaves), pytest.fail)
  assert (tmp_path / "checkpoints" / "2").is_dir()
  checkpoints.close()
