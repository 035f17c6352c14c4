"""Checkpoints of a whole federation with Orbax: asynchronous, strict, checked for damage.

A checkpoint holds the state of every node (ghosts left out, so that it can be restored onto another
number of devices) and a JSON record of where the run stands, with a checksum of the arrays: Orbax does
not notice a flipped bit. Once it is complete, the sizes of its files are noted beside it, so that
missing and cut files are found before Orbax stumbles over them.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from worldlm_jax import checks, config as config_lib, metrics, partition
from worldlm_jax.config import CheckpointConfig
from worldlm_jax.federation import Federation
from worldlm_jax.state import State

SIZES = "sizes.json"


class Restored(NamedTuple):
  """What a checkpoint gives back."""

  state: State
  record: dict[str, Any]


class Checkpoints:
  """The checkpoints under `folder`, numbered by the place in the run at which they were made.

  Kept are the last `keep_last` and the `keep_best` with the lowest loss among those that have one.
  """

  def __init__(self, folder: Path, config: CheckpointConfig, federation: Federation, mesh: jax.sharding.Mesh):
    self.folder, self._mesh = folder, mesh
    self._sizes = [len(level) for level in federation.levels]
    best = preservation_policy.BestN(
      get_metric_fn=lambda scores: scores["loss_nats"], reverse=True, n=config.keep_best,
      keep_checkpoints_without_metrics=False,
    )
    policy = preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(config.keep_last), best])
    self._manager = ocp.CheckpointManager(
      folder.absolute(), options=ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
    )

  def has(self, number: int) -> bool:
    """Whether there is a checkpoint of this number."""
    return number in self._manager.all_steps()

  def save(self, number: int, state: State, record: dict[str, Any], loss_nats: float | None) -> None:
    """Begins to save; returns once the arrays are copied. Failures surface here or in `wait`."""
    self.wait()
    arrays = self._without_ghosts(state)
    record = record | {"checksum": _checksum(arrays), "structure": _structure(arrays)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record))
    self._explained(lambda: self._manager.save(
      number, args=items, metrics=None if loss_nats is None else {"loss_nats": loss_nats}, force=True
    ))

  def wait(self) -> None:
    """Returns when everything is on disk."""
    self._explained(self._manager.wait_until_finished)
    for number in self._manager.all_steps():
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
    numbers = sorted(self._manager.all_steps(), reverse=True)
    for number in numbers:
      try:
        return self._restore(number, abstract)
      except _AnotherStructure as error:
        checks.fail("checkpoint", str(self.folder / str(number)), f"the arrays of this version's state ({error})",
                    "resume with the version that wrote it (config.json names it), or start afresh with --overwrite")
      except (MemoryError, PermissionError):
        raise  # not the checkpoint's fault
      except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
          raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        damaged = self.folder.parent / "damaged"
        damaged.mkdir(exist_ok=True)
        target = damaged / f"{number}.{len(list(damaged.glob(f'{number}.*')))}"
        shutil.move(self.folder / str(number), target)
        self._manager.reload()
        say(f"checkpoint {number} is damaged ({reason}); moved to {target}, falling back to the one before it")
    checks.require(not numbers, "checkpoints", str(self.folder), "at least one that is intact",
                   "start afresh with --overwrite")
    return None

  def _restore(self, number: int, abstract: State) -> Restored:
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    arrays = [
      jax.tree.map(lambda leaf, n=n: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype, sharding=host), level)
      for n, level in zip(self._sizes, abstract, strict=True)
    ]
    folder = self.folder / str(number)
    if (note := folder / SIZES).exists() and json.loads(note.read_text()) != _sizes(folder):
      raise ValueError("files are missing or cut short")
    record = dict(self._manager.restore(number, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record)
    saved, wanted = record.pop("structure"), _structure(arrays)
    if saved != wanted:
      raise _AnotherStructure("; ".join(config_lib.differences(saved, wanted)[:3]))
    found = self._manager.restore(number, args=ocp.args.Composite(state=ocp.args.StandardRestore(arrays)))
    if _checksum(found.state) != record.pop("checksum"):
      raise ValueError("the arrays do not have the checksum they were saved with")
    nodes = partition.node_sharding(self._mesh)
    state = jax.tree.map(
      lambda leaf: jax.device_put(partition.pad_nodes(np.asarray(leaf), self._mesh), nodes), list(found.state)
    )
    return Restored(tuple(state), record)

  def _without_ghosts(self, state: State) -> list[Any]:
    return [jax.tree.map(lambda leaf, n=n: leaf[:n], level) for n, level in zip(self._sizes, state, strict=True)]

  def _explained(self, action: Callable[[], Any]) -> None:
    try:
      action()
    except Exception as error:
      if metrics.out_of_space(error):
        raise metrics.no_space_error(self.folder) from error
      raise


class _AnotherStructure(Exception):
  """The checkpoint is intact, but of a state with other arrays."""


def _sizes(folder: Path) -> dict[str, int]:
  """The size of every file under a checkpoint's folder but the note of sizes, also one that was never finished."""
  files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(SIZES))
  return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _structure(arrays: Any) -> dict[str, str]:
  """The shape and type of every array, by its place in the state."""
  leaves = jax.tree_util.tree_leaves_with_path(arrays)
  return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


@jax.jit
def _leaf_checksums(leaves: list[jax.Array]) -> list[jax.Array]:
  """Of each array, sum_i bits_i * (2 i + 1) modulo 2^32: any single changed element changes it."""

  def one(leaf: jax.Array) -> jax.Array:
    flat = leaf.ravel()
    bits = jax.lax.bitcast_convert_type(flat, jnp.uint32) if flat.dtype.itemsize == 4 else flat.astype(jnp.uint32)
    return jnp.sum(bits * (2 * jnp.arange(flat.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

  return [one(leaf) for leaf in leaves]


def _checksum(arrays: Any) -> str:
  sums = jax.device_get(_leaf_checksums(jax.tree.leaves(arrays)))
  return np.asarray(sums, "<u4").tobytes().hex()
