"""Checkpoints of a whole federation with Orbax: asynchronous, strict, checked for damage.

A checkpoint holds the state of every node, each process writing and reading its own shards, and a JSON record of where
the run stands. It can be restored onto another number of devices or processes and another mesh: ghosts are cut off or
added at the end of the node axis. The record has a checksum of the arrays without ghosts and one of itself, since Orbax
does not notice a flipped bit in either. Once the checkpoint is complete, the sizes of its files are noted beside it, so
that missing and cut files are found before Orbax stumbles over them.
"""

import contextlib
import functools
import json
import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from worldlm_jax import checks, distributed, metrics, trees
from worldlm_jax.config import CheckpointConfig
from worldlm_jax.federation import Federation
from worldlm_jax.state import State

SIZES = "sizes.json"
SMALL = 2**20  # bytes of an array: a host has so many summed up before a program for it is compiled
A_CENTURY = 100 * 365 * 86_400  # in seconds


class Restored(NamedTuple):
  """What a checkpoint gives back."""

  state: State
  record: dict[str, Any]


class Checkpoints:
  """The checkpoints under `folder`, numbered by the place in the run at which they were made.

  Kept are the last `keep_last` and the `keep_best` with the lowest loss among those that have one.
  """

  def __init__(self, folder: Path, config: CheckpointConfig, federation: Federation):
    self.folder = folder
    self._sizes = [len(level) for level in federation.levels]
    best = preservation_policy.BestN(
      get_metric_fn=lambda scores: scores["loss_nats"], reverse=True, n=config.keep_best,
      keep_checkpoints_without_metrics=False,
    )
    policy = preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(config.keep_last), best])
    # Whatever Orbax waits for with a limit, it holds against a clock that may be put forward.
    patient = ocp.AsyncOptions(timeout_secs=A_CENTURY, create_directories_asynchronously=False)
    self._manager = ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(
      preservation_policy=policy, cleanup_tmp_directories=True, async_options=patient
    ))

  def has(self, number: int) -> bool:
    """Whether there is a checkpoint of this number."""
    return number in self._manager.all_steps()

  def save(self, number: int, state: State, record: dict[str, Any], loss_nats: float | None) -> None:
    """Begins to save; returns once the arrays are copied. Failures surface here or in `wait`. Collective."""
    self.wait()
    record = record | {"checksum": self._checksum(state), "structure": self._structure(state)}
    record |= {"record_checksum": _record_checksum(record)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(list(state)), record=ocp.args.JsonSave(record))
    self._explained(lambda: self._manager.save(
      number, args=items, metrics=None if loss_nats is None else {"loss_nats": loss_nats}, force=True
    ))

  def wait(self) -> None:
    """Returns when everything is on disk."""
    self._explained(self._manager.wait_until_finished)
    for number in self._manager.all_steps() if distributed.is_lead() else ():
      note = self.folder / str(number) / SIZES
      if not note.exists():
        metrics.write_json(note, _sizes(note.parent))

  def close(self) -> None:
    """Ends the manager's threads. What went wrong before has been raised by `save` or `wait`."""
    with contextlib.suppress(Exception):
      self._manager.close()

  def restore_newest(self, abstract: State, say: Callable[[str], None]) -> Restored | None:
    """The newest intact checkpoint, or None where there is none at all.

    Damaged ones are reported through `say` and moved to `damaged/` beside the checkpoints' folder.

    Args:
      abstract: shapes, dtypes and shardings of the state, ghosts included.
      say: takes one line of text.

    Raises:
      ValueError: all checkpoints are damaged, or one holds another kind of state (it is left alone).
    """
    numbers = sorted(distributed.gather(list(self._manager.all_steps()))[0], reverse=True)
    for number in numbers:
      found, failures = None, []
      try:
        found = self._restore(number, abstract)
      except _AnotherStructure as error:
        checks.fail("checkpoint", str(self.folder / str(number)), f"the arrays of this version's state ({error})",
                    "resume with the version that wrote it (config.json names it), or start afresh with --overwrite")
      except (MemoryError, PermissionError):
        raise  # not the checkpoint's fault
      except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
          raise
        failures = [(str(error).splitlines() or [type(error).__name__])[0][:160]]
      failures = [reason for said in distributed.gather(failures) for reason in said]
      if found is not None and not failures and self._checksum(found.state) != found.record.pop("checksum", None):
        failures = ["the arrays do not have the checksum they were saved with"]
      if found is not None and not failures:
        return found
      target = self._set_aside(number)
      say(f"checkpoint {number} is damaged ({failures[0]}); moved to {target}, falling back to the one before it")
    checks.require(not numbers, "checkpoints", str(self.folder), "at least one that is intact",
                   "start afresh with --overwrite")
    return None

  def _restore(self, number: int, abstract: State) -> Restored:
    folder = self.folder / str(number)
    if (note := folder / SIZES).exists() and json.loads(note.read_text()) != _sizes(folder):
      raise ValueError("files are missing or cut short")
    record = dict(self._manager.restore(number, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record)
    if record.pop("record_checksum") != _record_checksum(record):
      raise ValueError("the record does not have the checksum it was saved with")
    saved, wanted = record.pop("structure"), self._structure(abstract)
    if saved != wanted:
      raise _AnotherStructure("; ".join(checks.differences(saved, wanted)[:3]))
    # Not strict: the node axis is cut or filled up with zeros to the number of rows that this mesh wants.
    arrays = ocp.args.StandardRestore(list(abstract), strict=False)
    found = self._manager.restore(number, args=ocp.args.Composite(state=arrays))
    return Restored(tuple(found.state), record)

  def _set_aside(self, number: int) -> Path:
    """Moves a checkpoint to `damaged/`. Collective."""
    damaged = self.folder.parent / "damaged"
    with distributed.agreed():
      target = damaged / f"{number}.{len(list(damaged.glob(f'{number}.*')))}"
      if distributed.is_lead():
        damaged.mkdir(exist_ok=True)
        shutil.move(self.folder / str(number), target)
    self._manager.reload()
    return target

  def _structure(self, state: State) -> dict[str, str]:
    """The shape, without ghosts, and the type of every array, by its place in the state."""
    leaves = [
      jax.tree.map(lambda leaf, n=n: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype), level)
      for n, level in zip(self._sizes, state, strict=True)
    ]
    return {
      jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
      for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)
    }

  def _checksum(self, state: State) -> str:
    """One number for each array, without ghosts; see `_sum_of_bits`. Waits for the devices; collective."""
    found = [
      _shard_checksums(leaf, n) for n, level in zip(self._sizes, state, strict=True) for leaf in jax.tree.leaves(level)
    ]
    sums = [sum(value.item() for value in of_array) for of_array in jax.device_get(found)]
    total = np.array(distributed.gather(sums), np.uint64).sum(axis=0) % 2**32
    return np.asarray(total, "<u4").tobytes().hex()

  def _explained(self, action: Callable[[], Any]) -> None:
    try:
      action()
    except Exception as error:
      if metrics.out_of_space(error):
        raise metrics.no_space_error(self.folder) from error
      raise


class Stored:
  """A finished checkpoint, read in part: without the devices it was made on, and without changing anything.

  A run may go on meanwhile. What is read is not held against the checksum, which is one of all arrays.

  Raises:
    ValueError: files are missing or cut short.
  """

  def __init__(self, folder: Path):
    self.folder = folder.absolute()
    if (note := folder / SIZES).exists() and json.loads(note.read_text()) != _sizes(folder):
      raise ValueError("files are missing or cut short")
    json_handler = ocp.JsonCheckpointHandler()
    self.record = dict(ocp.Checkpointer(json_handler).restore(self.folder / "record", args=ocp.args.JsonRestore()))
    self.structure: dict[str, str] = self.record.pop("structure")  # as in `Checkpoints._structure`

  def rows(self, level: int, field: str, abstract: trees.PyTree, rows: Sequence[int]) -> trees.PyTree:
    """Of one field of a level's state, such as "params", the rows of some nodes: numpy, leaves `[rows, ...]`.

    Arrays are read one by one, so that no more than one of them is in memory for all nodes of the level.

    Args:
      level: of the tree.
      field: of `state.LevelState`.
      abstract: the field's tree for one node, of dicts alone; its leaves only say where arrays are.
      rows: which nodes of the level.
    """
    num_levels = 1 + max(int(name[1 : name.index("]")]) for name in self.structure)
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    def read(path: tuple, _: Any) -> np.ndarray:
      item: Any = 0
      for key in reversed(path):
        item = {key.key: item}
      levels = [{field: item} if number == level else None for number in range(num_levels)]
      wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), levels)
      found = checkpointer.restore(
        self.folder / "state", args=ocp.args.PyTreeRestore(levels, restore_args=wanted, partial_restore=True)
      )
      return np.asarray(jax.tree.leaves(found)[0])[list(rows)]

    return jax.tree_util.tree_map_with_path(read, abstract)


def stored(folder: Path) -> list[Path]:
  """The folders of the finished checkpoints under `folder`, the newest first."""
  found = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
  return sorted(found, key=lambda path: int(path.name), reverse=True)


class _AnotherStructure(Exception):
  """The checkpoint is intact, but of a state with other arrays."""


def _record_checksum(record: dict[str, Any]) -> str:
  """Of plain JSON values: the same when they have been written and read again, in whatever order."""
  return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def _sizes(folder: Path) -> dict[str, int]:
  """The size of every file under a checkpoint's folder but the note of sizes, also one that was never finished."""
  files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(SIZES))
  return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _shard_checksums(array: jax.Array, rows: int) -> list[Any]:
  """`_sum_of_bits` of those shards of an array that this process has the first copy of, one element each."""
  shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
  if array.nbytes <= SMALL:
    begins = [[place.start or 0 for place in shard.index] for shard in shards]
    return [_sum_of_bits(np, np.asarray(shard.data), begin, array.shape, rows)
            for shard, begin in zip(shards, begins, strict=True)]
  devices = {shard.device for shard in shards}
  found = _compiled_checksum(array.sharding)(array, np.int32(rows))
  return [shard.data for shard in found.addressable_shards if shard.device in devices]


@functools.cache
def _compiled_checksum(sharding: jax.sharding.NamedSharding) -> Callable[[jax.Array, Any], jax.Array]:
  """Takes an array and how many of its rows count; gives `_sum_of_bits` of each device's shard, uint32 `[devices]`."""
  mesh = sharding.mesh

  def checksum(shard: jax.Array, rows: Any) -> jax.Array:
    spread = [(axes,) if isinstance(axes, str) else axes or () for axes in sharding.spec]
    spread += [()] * (shard.ndim - len(spread))
    shape = [size * math.prod(mesh.shape[a] for a in axes) for size, axes in zip(shard.shape, spread, strict=True)]
    begins = [jax.lax.axis_index(axes) * size if axes else 0 for size, axes in zip(shard.shape, spread, strict=True)]
    return _sum_of_bits(jnp, shard, begins, shape, rows)[None]

  every = jax.sharding.PartitionSpec(tuple(mesh.axis_names))
  nothing = jax.sharding.PartitionSpec()
  return jax.jit(jax.shard_map(checksum, mesh=mesh, in_specs=(sharding.spec, nothing), out_specs=every,
                               check_vma=False))


def _sum_of_bits(xp: Any, shard: Any, begins: Sequence[Any], shape: Sequence[int], rows: Any) -> Any:
  """What a shard adds to sum_i bits_i * (2 i + 1) modulo 2^32 over the first rows of its array: uint32 scalar.

  `i` counts through the whole array in row-major order: any single changed element changes the sum, and it does not
  depend on how the array is cut into shards.

  Args:
    xp: numpy or jax.numpy.
    shard: an array of it.
    begins: where the shard begins in the whole array, by axis.
    shape: of the whole array.
    rows: how many of the whole array's rows count.
  """
  bits = shard.view(xp.uint32) if shard.dtype.itemsize == 4 else shard.astype(xp.uint32)
  indices = [
    xp.expand_dims(begin + xp.arange(size), [other for other in range(shard.ndim) if other != axis])
    for axis, (begin, size) in enumerate(zip(begins, shard.shape, strict=True))
  ]
  place = xp.zeros_like(bits)
  for axis, index in enumerate(indices):
    place += index.astype(xp.uint32) * xp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
  return xp.sum(xp.where(indices[0] < rows, bits * (2 * place + 1), 0), dtype=xp.uint32)
