"""What the benchmarks share: interleaved timing, medians with their range, peak memory, tables and JSON.

Machines are noisy, and slower at one moment than at another. So contenders take turns, a figure is the ratio of
neighbouring turns, and what is reported is the median of such ratios with the lowest and the highest. Memory and
compile times are measured in a process of its own (`in_child`), where nothing was allocated or compiled before.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from worldlm_jax import checks

ROOT = Path(__file__).parents[1]
_MMAP_THRESHOLD = -3  # of mallopt
_RESULT = "result of the child process: "


class Spread(NamedTuple):
  """The median of some figures and their range."""

  median: float
  low: float
  high: float


def spread(values: Iterable[float]) -> Spread:
  """Of at least one value."""
  values = list(values)
  return Spread(statistics.median(values), min(values), max(values))


def interleaved(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
  """Seconds of `repeats` calls of each contender, in turn, after one call of each that does not count.

  A call that returns arrays that are still being computed is over when they are there.
  """
  for work in contenders.values():
    jax.block_until_ready(work())
  seconds: dict[str, list[float]] = {name: [] for name in contenders}
  for turn in range(repeats):
    for name in list(contenders)[:: -1 if turn % 2 else 1]:  # nobody always comes after the same neighbour
      begin = time.perf_counter()
      jax.block_until_ready(contenders[name]())
      seconds[name].append(time.perf_counter() - begin)
  return seconds


def ratios(of: Sequence[float], to: Sequence[float]) -> Spread:
  """`of / to`, turn by turn."""
  return spread(a / b for a, b in zip(of, to, strict=True))


class PeakMemory:
  """How much memory the body of a `with` takes beyond what was in use at its beginning: `bytes`, at its peak.

  On an accelerator: what its allocator says. Since that never forgets a peak, an earlier and higher one hides the
  body's; measure in a fresh process (`in_child`). On CPUs: the resident memory of the process. Run the body once
  before, so that compiling it does not count.

  Raises:
    checks.InputError: the CPU's system is not Linux, the only one that can be asked.
  """

  bytes = 0

  def __enter__(self) -> "PeakMemory":
    gc.collect()
    if jax.default_backend() == "cpu":
      checks.require(sys.platform == "linux", "operating system", sys.platform, "'linux', to measure memory of CPUs",
                     "measure on an accelerator, or on Linux")
      libc = ctypes.CDLL(None)
      libc.mallopt(_MMAP_THRESHOLD, 1 << 16)  # arrays go back to the system as soon as they are freed,
      libc.malloc_trim(0)  # and so does what was freed before; otherwise the body would use that again, unseen
      Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
      self._begin = _status("VmRSS")
    else:
      self._begin = _device_memory("bytes_in_use")
    return self

  def __exit__(self, *error: object) -> None:
    peak = _status("VmHWM") if jax.default_backend() == "cpu" else _device_memory("peak_bytes_in_use")
    self.bytes = peak - self._begin


def _status(name: str) -> int:
  lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _device_memory(name: str) -> int:
  return jax.devices()[0].memory_stats()[name]


def in_child(function: Callable[..., Any], **arguments: Any) -> Any:
  """Calls a module's function in a new process.

  Arguments and result must survive JSON. Not for use after this process has taken an accelerator, which the child
  needs.

  Raises:
    subprocess.CalledProcessError: the function failed; its message has been printed.
  """
  module = function.__module__
  if module == "__main__":
    module = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
  command = [sys.executable, "-m", "benchmarks.measuring", module, function.__name__, json.dumps(arguments)]
  found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
  return json.loads(found.stdout.rpartition(_RESULT)[2])


class Table:
  """A Markdown table that is printed line by line; `columns` maps keys of its rows to headings."""

  def __init__(self, title: str, columns: Mapping[str, str]):
    self.title, self.columns, self.rows = title, columns, list[dict[str, Any]]()
    print(f"\n{title}\n\n| {' | '.join(columns.values())} |\n|{'---|' * len(columns)}", flush=True)

  def add(self, row: dict[str, Any]) -> None:
    """Prints the columns of a row; all of it goes into the JSON."""
    self.rows.append(row)
    print(f"| {' | '.join(_text(row[key]) for key in self.columns)} |", flush=True)


def _text(value: Any) -> str:
  if isinstance(value, Spread | list) and len(value) == 3:
    return f"{_text(value[0])} ({_text(value[1])} to {_text(value[2])})"
  if isinstance(value, float):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
  return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def parser(documentation: str | None) -> argparse.ArgumentParser:
  """A parser of flags that knows `--out`."""
  found = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
  found.add_argument("--out", help="where the results go as JSON")
  return found


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, **choices: Iterable[str]) -> argparse.Namespace:
  """Parses the flags. Those in `choices` are lists with commas between their items; ends the program at a mistake."""
  args = parser.parse_args(argv)
  for name, known in choices.items():
    given = getattr(args, name).split(",")
    if unknown := [item for item in given if item not in known]:
      parser.error(f"--{name}: {', '.join(unknown)}: expected of {', '.join(known)}")
    setattr(args, name, given)
  return args


def whole_numbers(text: str) -> list[int]:
  """The type of flags such as `1,4,16`."""
  return [int(item) for item in text.split(",")]


def finish(args: argparse.Namespace, tables: Sequence[Table]) -> None:
  """Writes the JSON file, if one is wanted."""
  if not args.out:
    return
  content = {
    "flags": {name: value for name, value in vars(args).items() if name != "out"}, "machine": machine(),
    "tables": [{"title": table.title, "columns": dict(table.columns), "rows": table.rows} for table in tables],
  }
  Path(args.out).parent.mkdir(parents=True, exist_ok=True)
  Path(args.out).write_text(json.dumps(content, indent=1, default=float) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
  """What the figures were measured on."""
  device = jax.devices()[0]
  return {"device": device.device_kind, "devices": jax.device_count(), "cores": len(os.sched_getaffinity(0)),
          "system": platform.platform(), "python": platform.python_version(), "jax": jax.__version__}


if __name__ == "__main__":
  _, module_name, function_name, given = sys.argv
  print(_RESULT + json.dumps(getattr(importlib.import_module(module_name), function_name)(**json.loads(given))))
