"""Machines as a plan sees them: a few numbers, from a data sheet, a YAML file, or this computer."""

import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from worldlm_jax import checks, partition

GB = 1e9
HERE = "here"


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
  """What a plan has to know of a machine. Memory and rates are in units of 1e9 bytes, one way."""

  platform: str  # cpu | gpu | tpu
  devices: int  # of all processes
  processes: int  # each with its own host memory and its own share of the devices
  memory_gb: float  # per device
  memory_gb_per_s: float  # per device: how fast it reads and writes its own memory
  tflops_float32: float  # per device: the peak of matrix products on float32 arrays, 1e12 operations a second
  tflops_bfloat16: float
  utilisation: float  # share of the peak that training reaches
  host_memory_gb: float  # per process
  host_link_gb_per_s: float  # per device: between its memory and the host's
  device_link_gb_per_s: float  # per device: between devices
  node_link_gbit_per_s: float  # between a node of the tree and its parent, were each at a place of its own
  node_latency_ms: float  # of one message over that link

  def peak_flops(self, compute_dtype: str) -> float:
    """Operations a second of one device at its best."""
    return 1e12 * (self.tflops_bfloat16 if compute_dtype == "bfloat16" else self.tflops_float32)


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
  """A device that is only described: all that `partition.choose_mesh` asks of one."""

  id: int
  platform: str
  memory: float

  def memory_stats(self) -> dict[str, float]:
    """As `jax.Device.memory_stats` has it."""
    return {"bytes_limit": self.memory, "bytes_in_use": 0.0}


def devices(machine: Machine) -> list[Any]:
  """The machine's devices, described."""
  return [Device(i, machine.platform, machine.memory_gb * GB) for i in range(machine.devices)]


# What no data sheet says is assumed the same everywhere: that training reaches 40 % of the peak, and that organisations
# are 1 Gbit/s and 50 ms apart.
_ASSUMED: dict[str, Any] = {"utilisation": 0.4, "node_link_gbit_per_s": 1.0, "node_latency_ms": 50.0}

# NVIDIA H100 and H200 data sheets, SXM: BF16 1,979 and TF32 989 TFLOP/s with sparsity, so half of it without; JAX
# multiplies float32 matrices in TF32. 80 GB at 3.35 TB/s and 141 GB at 4.8 TB/s; PCIe Gen5 128 GB/s both ways together.
_HOPPER: dict[str, Any] = _ASSUMED | {
  "platform": "gpu", "tflops_float32": 494.5, "tflops_bfloat16": 989.5, "host_link_gb_per_s": 64.0,
}

NAMED = {
  # 8 x DGX H100 (its data sheet): 2 TB of host memory for 8 GPUs, and one 400 Gbit/s port for each of them between the
  # hosts, which counts here since it is slower than NVLink. One process per host.
  "h100x64": Machine(devices=64, processes=8, memory_gb=80.0, memory_gb_per_s=3350.0, host_memory_gb=2000.0,
                     device_link_gb_per_s=50.0, **_HOPPER),
  # One of the eight GPUs of a DGX H200, with an eighth of its 2 TB; NVLink 900 GB/s both ways together.
  "h200x1": Machine(devices=1, processes=1, memory_gb=141.0, memory_gb_per_s=4800.0, host_memory_gb=250.0,
                    device_link_gb_per_s=450.0, **_HOPPER),
  # Google Cloud, "TPU v5p": the slice is named after its 128 cores, which are 64 chips, on 16 hosts of 4 chips with
  # 448 GB. Per chip 459 TFLOP/s in bfloat16, in which JAX multiplies float32 matrices too; 95 GiB at 2,765 GB/s; 1,200
  # GB/s between chips, both ways together. The host's link is in no data sheet: PCIe Gen4 x16 is assumed.
  "v5p-128": Machine(platform="tpu", devices=64, processes=16, memory_gb=102.0, memory_gb_per_s=2765.0,
                     tflops_float32=459.0, tflops_bfloat16=459.0, host_memory_gb=448.0, host_link_gb_per_s=32.0,
                     device_link_gb_per_s=600.0, **_ASSUMED),
}


def load(name: str) -> Machine:
  """A machine by its name, "here", or out of a YAML file with the fields of `Machine`.

  Raises `InputError` naming the flag, the file and the field.
  """
  if name in NAMED:
    return NAMED[name]
  if name == HERE:
    return here()
  path = Path(name).expanduser()
  known = ", ".join(map(repr, (HERE, *NAMED)))
  hint = checks.did_you_mean(name, (HERE, *NAMED)) or "docs/plan.md shows such a file"
  checks.require(path.is_file(), "--machine", name, f"one of {known}, or a YAML file that describes one", hint)
  try:
    content = checks.read_yaml(path)
  except (ValueError, OSError) as error:
    raise checks.InputError(f"--machine={name!r}: cannot be read as YAML ({error})".replace("\n", " ")) from error
  return _from_fields(content, name)


def _from_fields(content: Any, name: str) -> Machine:
  fields = {field.name: field.type for field in dataclasses.fields(Machine)}
  checks.require(isinstance(content, dict), "--machine", name, f"a YAML file with the fields {', '.join(fields)}")
  values = {key: _ASSUMED[key] for key in _ASSUMED} | content
  for key in values:
    checks.one_of(f"--machine={name}: field", key, fields)
  missing = [key for key in fields if key not in values]
  checks.require(not missing, f"--machine={name}: missing fields", missing, "all of them",
                 "docs/plan.md says what each means")
  for key, kind in fields.items():
    value, where = values[key], f"--machine={name}: {key}"
    if kind is str:
      checks.one_of(where, value, ("cpu", "gpu", "tpu"))
    elif kind is int:
      checks.require(isinstance(value, int) and not isinstance(value, bool) and value >= 1, where, value,
                     "a whole number, at least 1")
    else:
      ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
      checks.require(ok, where, value, "a positive number")
  checks.require(values["utilisation"] <= 1, f"--machine={name}: utilisation", values["utilisation"],
                 "a share, at most 1")
  checks.require(values["devices"] % values["processes"] == 0, f"--machine={name}: devices", values["devices"],
                 f"a multiple of processes={values['processes']}")
  return Machine(**values)


def here() -> Machine:
  """This computer: its devices and memory as they are, its peaks as a product of two matrices shows them.

  What cannot be seen is taken from a data sheet: an accelerator's links are those of `h200x1`.
  """
  found = jax.devices()
  platform = found[0].platform
  host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  memory = partition.memory_of(found[0])
  if math.isinf(memory):
    memory = host_bytes / len(jax.local_devices())  # the devices are the host's own cores
  sheet = NAMED["h200x1"]
  copied = _rate_of_copies()
  own = platform == "cpu"  # links within a host are as fast as its memory
  return Machine(
    platform=platform, devices=len(found), processes=jax.process_count(), memory_gb=memory / GB,
    memory_gb_per_s=copied, tflops_float32=_rate_of_products("float32", platform),
    tflops_bfloat16=_rate_of_products("bfloat16", platform), host_memory_gb=host_bytes / GB,
    host_link_gb_per_s=copied if own else sheet.host_link_gb_per_s,
    device_link_gb_per_s=copied if own else sheet.device_link_gb_per_s, **_ASSUMED,
  )


def _rate_of_products(dtype: str, platform: str) -> float:
  """1e12 operations a second of one matrix product."""
  size = 1024 if platform == "cpu" else 8192
  matrix = jnp.ones((size, size), dtype)
  return 2 * size**3 / _seconds(jax.jit(lambda a: a @ a), matrix) / 1e12


def _rate_of_copies() -> float:
  """1e9 bytes a second, read and written."""
  array = jnp.ones(2**24, jnp.float32)
  return 2 * array.nbytes / _seconds(jax.jit(lambda a: a + 1), array) / GB


def _seconds(function: Any, argument: jax.Array) -> float:
  """The least of a few calls, the first of which compiles."""
  jax.block_until_ready(function(argument))
  taken = []
  for _ in range(5):
    begin = time.perf_counter()
    jax.block_until_ready(function(argument))
    taken.append(time.perf_counter() - begin)
  return min(taken)
