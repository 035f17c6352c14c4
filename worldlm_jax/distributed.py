"""Several processes that train one federation: how they meet, and what they tell each other besides their shards.

Every process runs the same program over one mesh and reads the texts of its own nodes alone. What all need to know of
all nodes travels as JSON or as small arrays; decisions that must be the same everywhere are taken on values that all
have. In a single process all of this does nothing.
"""

import contextlib
import functools
import io
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from worldlm_jax import checks

SECONDS_TO_SHOW = 20.0  # that a network file system may take until a new file is seen everywhere


def connect(automatic: bool, coordinator: str, num_processes: int, process_id: int) -> None:
  """Joins the other processes. To be called before anything touches a device; does nothing without any of its flags.

  Args:
    automatic: the cluster is found by JAX itself: a TPU pod, Slurm, Open MPI, Kubernetes.
    coordinator: otherwise HOST:PORT of process 0, where it can be reached by all.
    num_processes: with a coordinator, how many there are.
    process_id: with a coordinator, which one this is, from 0.

  Raises:
    checks.InputError: the flags do not go together, no cluster is found, or the others cannot be reached.
  """
  both = "one of --distributed and --coordinator"
  if not coordinator:
    for name, value, unset in (("--num_processes", num_processes, 0), ("--process_id", process_id, -1)):
      checks.require(value == unset, name, value, "to come with --coordinator=HOST:PORT",
                     "name process 0's host and a free port there, or use --distributed alone")
    if not automatic:
      return
  else:
    checks.require(not automatic, "--distributed", automatic, both, "leave one of them out")
    checks.require(re.fullmatch(r".+:\d{1,5}", coordinator) is not None, "--coordinator", coordinator, "HOST:PORT",
                   "process 0 listens there")
    checks.require(num_processes >= 1, "--num_processes", num_processes, "how many processes there are, at least 1")
    checks.require(0 <= process_id < num_processes, "--process_id", process_id,
                   f"which process this is, from 0 to {num_processes - 1}", "give each process a number of its own")
  jax.config.update("jax_cpu_collectives_implementation", "gloo")  # concerns CPU devices alone
  jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
  given: dict[str, Any] = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
  try:
    jax.distributed.initialize(**given if coordinator else {})
  except (ValueError, RuntimeError) as error:  # the latter also where a process does not come in time
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if coordinator:
      checks.fail("--coordinator", coordinator, f"{num_processes} processes that find each other there ({reason})",
                  "start all of them, with the same address and numbers from 0")
    checks.fail("--distributed", automatic, f"a cluster that JAX can find ({reason})",
                "use --coordinator=HOST:PORT --num_processes=N --process_id=I")


def leave(code: int) -> int:
  """Ends this process with an error if there are others, else returns `code`.

  It does not say goodbye: those who wait for it, in vain, would only be told after minutes. As it is, JAX ends them.
  """
  if jax.process_count() > 1:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


def is_lead() -> bool:
  """Whether this process is the one that speaks and writes for all."""
  return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
  """What each process says, in their order. Collective; plain JSON values, which may be nan or infinite."""
  return [json.loads(content) for content in _gather_bytes(json.dumps(value).encode())]


def gather_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays of all processes by name; of those with the same name the first process's. Collective."""
  if jax.process_count() == 1:
    return dict(arrays)
  file = io.BytesIO()
  np.savez(file, *arrays.values())
  found: dict[str, np.ndarray] = {}
  for names, content in zip(gather(list(arrays)), _gather_bytes(file.getvalue()), strict=True):
    there = np.load(io.BytesIO(content))
    found = {name: there[f"arr_{i}"] for i, name in enumerate(names)} | found
  return found


@contextlib.contextmanager
def agreed() -> Iterator[None]:
  """What fails in one process fails in all, at the end of the block: nobody waits for one that is gone. Collective.

  The block must not contain anything collective of its own.

  Raises:
    What the block raised. Elsewhere `checks.InputError`, if that is what another process met, or an OSError.
  """
  own: Exception | None = None
  try:
    yield
  except Exception as error:
    own = error
  if jax.process_count() > 1:
    said = gather(None if own is None else [isinstance(own, checks.InputError), str(own)])
    others = [(i, *told) for i, told in enumerate(said) if told is not None]
    if others and own is None:
      process, is_input, message = others[0]
      raise (checks.InputError if is_input else OSError)(f"process {process}: {message}")
  if own is not None:
    raise own


def check_shared(folder: Path) -> None:
  """Raises `InputError` in all processes unless all of them see the same `folder`, which exists. Collective."""
  if jax.process_count() == 1:
    return
  token = gather(secrets.token_hex(8))[0]
  mark = folder / f".shared-{token}"
  with agreed():
    if is_lead():
      mark.touch()
  end = time.monotonic() + SECONDS_TO_SHOW
  while not (seen := mark.exists()) and time.monotonic() < end:
    time.sleep(0.1)
  blind = [i for i, sees in enumerate(gather(seen)) if not sees]
  if is_lead():
    mark.unlink()
  checks.require(not blind, "--workdir", str(folder),
                 f"a folder that all processes share (what process 0 writes there is not seen by {blind})",
                 "put it on a file system that all machines mount")


def snapshot(tree: Any, mesh: Mesh) -> Any:
  """Copies of arrays, whole on every device and on their way to the host; `jax.device_get` then waits for them.

  The originals may be donated afterwards. Returns at once; collective.
  """
  copies = _copier(mesh)(tree)
  for leaf in jax.tree.leaves(copies):
    leaf.copy_to_host_async()
  return copies


def any_says(mine: bool, mesh: Mesh) -> Any:
  """Whether some process says so: a scalar on its way to the host, as `snapshot` gives. Collective."""
  if jax.process_count() == 1:
    return np.bool_(mine)
  flat = Mesh(mesh.devices.ravel(), ("all",))
  spread = NamedSharding(flat, PartitionSpec("all"))
  flags = jax.make_array_from_callback((flat.size,), spread, lambda _: np.array([mine]))
  return snapshot(_any(flat)(flags), flat)


@functools.cache
def _copier(mesh: Mesh) -> Any:
  # Without a copy the result could be the very buffer of an argument, which its next owner gives up.
  return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=NamedSharding(mesh, PartitionSpec()))


@functools.cache
def _any(mesh: Mesh) -> Any:
  return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _gather_bytes(content: bytes) -> list[bytes]:
  if jax.process_count() == 1:
    return [content]
  sizes = multihost_utils.process_allgather(np.array(len(content), np.int32)).ravel()
  room = 1 << int(max(sizes) - 1).bit_length()  # few sizes, few programs
  padded = np.zeros(room, np.uint8)
  padded[: len(content)] = np.frombuffer(content, np.uint8)
  rows = multihost_utils.process_allgather(padded)
  return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
