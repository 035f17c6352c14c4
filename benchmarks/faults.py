"""What a run survives of its machine: kills at random moments, and hundreds of rounds in which members fail.

  python -m benchmarks.faults [--parts=kills,soak] [--kills=50] [--rounds=8] [--within=SECONDS] [--soak_rounds=500]
                              [--soak_kills=3] [--seed=0] [--config=FILE] [--out=FILE]

`kills`: a small federation with as many features on as go together (`get_config`) trains as a command of its own:
once to its end, then again and again, killed with SIGKILL after a random time, up to that of the unbroken run, from
when it was started; the next start resumes. A run that has come to its end is compared with the unbroken one, and
another begins, until there were so many kills. Compared are, bit for bit, all arrays of the last checkpoint
(parameters, moments, updates, residual layers, ...) and what it says of the run, and metrics.jsonl, receipts.jsonl and
summary.json but for the seconds. Each start has to go on from the newest checkpoint that was complete at the kill; a
round is `redone` if it was in metrics.jsonl then and is later than that.

`soak`: a smaller model in many short rounds, in which members are lost and late, one's training is never finite and one
sends updates that are too long. The first `--soak_kills` starts are killed; from then on one process works to the end.
Its memory, open files and threads are sampled twice a second, and compared in the second and the last quarter of its
rounds. Linux only.

With `--config` another file's `get_config(part)` says what trains. Ends with an error where something was lost or
differs.
"""

import argparse
import collections
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks import measuring
from worldlm_jax import checkpoint, config as c, metrics, train

PARTS = ("kills", "soak")
SECONDS_BETWEEN_SAMPLES = 0.5
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
KILLS = {"run": "run", "kills": "kills", "starting": "before a new round", "saving": "while saving",
         "redone": "rounds redone", "most_redone": "most by one kill", "equal": "equal to the unbroken run's"}
SOAK = {"what": "held", "second": "second quarter", "last": "last quarter", "growth": "growth of the median",
        "slope": "per 1000 rounds"}
FAILURES = {"what": "what", "count": "how often"}


def get_config(part: str) -> c.Config:
  """The experiment of a part of the benchmark: `--config=benchmarks/faults.py:kills`."""
  def text(lineage: str) -> c.Synthetic:
    return c.Synthetic(lineage, train_bytes=20_000, eval_bytes=3_000)

  config = c.Config(
    payload="int8", node=c.NodeSettings(local_steps=2, batch_size=4, warmup_steps=4, learning_rate=6e-3),
    model=c.ModelConfig(num_layers=3, d_model=24, num_heads=4, num_kv_heads=2, d_ff=48, key_layer_share=0.6),
    data=c.DataConfig(sequence_length=32), guards=c.GuardConfig(norm_ratio=3.0, opposition=0.5, failing="leave_out"),
    evaluation=c.EvaluationConfig(valid_windows=4, test_windows=8, matrix_windows=4, personalised="best"),
    checkpoint=c.CheckpointConfig(every_rounds=2), logging=c.LoggingConfig(tensorboard=False),
  )
  late = {"step_seconds": 1.0, "step_seconds_spread": 0.5}
  lost = {"loss_before": 0.2, "loss_after": 0.2}
  if part == "soak":
    config.federation.root = c.Node("world", None, [
      c.Node("late", text("late"), settings=late), c.Node("lost", text("lost"), settings=lost),
      c.Node("failing", text("failing"), settings={"learning_rate": 1e30, "clip_norm": math.inf, "warmup_steps": 0}),
      c.Node("long", text("long"), settings={"learning_rate": 0.1}), c.Node("honest", text("honest")),
    ], settings={"deadline_seconds": 1.2})
    config.node.local_steps = 1
    config.evaluation = c.EvaluationConfig(valid_windows=2, test_windows=2, matrix_windows=0)
    return config
  law = c.Node("law", text("law"), [
    c.Node("eu", text("law/eu"), settings=late), c.Node("uk", text("law/uk"), settings={"joins_round": 2}),
    c.Node("us", text("law/us"), settings={"share_residuals": "federation", "acceptance": "validated"}),
  ], settings={"rounds_per_parent_round": 2, "member_count": 2, "deadline_seconds": 2.5, "member_weight_cap": 0.8})
  med = c.Node("med", text("med"), [
    c.Node("notes", text("med/notes"), settings={"share_backbone": "federation"}), c.Node("trials", text("med/trials")),
  ], settings=lost | {"quorum": 0.5})
  code = c.Node("code", text("code"), settings={"privacy": "local", "privacy_clip": 4.0, "privacy_noise": 1.0})
  config.federation.root = c.Node("world", None, [law, med, code])
  config.federation.moves = [c.Move("law/eu", "med", 4)]
  return config


class Sample(NamedTuple):
  """What a process holds, and the last round that is in its run's metrics.jsonl."""

  round: int
  memory_mb: float
  files: int
  threads: int


class Run:
  """A run in a folder of its own, started as often as it takes."""

  def __init__(self, config: str, rounds: int, workdir: Path):
    self.workdir = workdir
    self._log = workdir.with_suffix(".log")
    self._command = [sys.executable, "-m", "worldlm_jax.main", f"--config={config}", f"--config.rounds={rounds}",
                     f"--workdir={workdir}"]

  def start(self) -> subprocess.Popen:
    """A new process that begins, or resumes."""
    with self._log.open("w", encoding="utf-8") as log:
      return subprocess.Popen(
        self._command, cwd=measuring.ROOT, stdout=log, stderr=subprocess.STDOUT,
        env={"XLA_FLAGS": QUICK_TO_COMPILE} | os.environ,
      )

  def to_the_end(self) -> float:
    """Runs what is left; gives the seconds."""
    begin = time.perf_counter()
    self.finish(self.start())
    return time.perf_counter() - begin

  def finish(self, process: subprocess.Popen) -> None:
    """Waits for a process, which has to succeed."""
    if process.wait():
      raise RuntimeError(f"the run has failed:\n{self._log.read_text(encoding='utf-8')[-2000:]}")

  def kill_after(self, process: subprocess.Popen, seconds: float) -> bool:
    """Whether the process had to be killed."""
    try:
      process.wait(seconds)
    except subprocess.TimeoutExpired:
      process.kill()
    if process.wait() >= 0:
      self.finish(process)
      return False
    return True

  def went_on_after(self) -> int | None:
    """The number of rounds after which the last start went on; None where it did not come so far, 0 for a new run."""
    lines = self._log.read_text(encoding="utf-8").splitlines()
    for line in lines:
      if line.startswith(f"resuming {self.workdir} after "):
        return int(line.removeprefix(f"resuming {self.workdir} after ").split()[0])
    return 0 if any(line.startswith("writing to ") for line in lines) else None

  def rounds_between_checkpoints(self) -> int:
    """As its config has it."""
    return json.loads((self.workdir / "config.json").read_text())["config"]["checkpoint"]["every_rounds"]

  def saved(self) -> int:
    """The number of rounds in the newest complete checkpoint."""
    found = checkpoint.stored(self.workdir / "checkpoints")
    return int(found[0].name) // train.PLACES_PER_ROUND if found else 0

  def is_saving(self) -> bool:
    """Whether a checkpoint has been begun and not finished."""
    folder = self.workdir / "checkpoints"
    return folder.is_dir() and any(not path.name.isdecimal() for path in folder.iterdir())

  def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return metrics.read_jsonl(self.workdir / name)

  def recorded(self) -> int:
    """The number of rounds in metrics.jsonl."""
    rows = self.rows()
    return rows[-1]["round"] + 1 if rows else 0

  def outcome(self) -> dict[str, Any]:
    """All that has to be the same whatever happened on the way, by name."""
    stored = checkpoint.Stored(checkpoint.stored(self.workdir / "checkpoints")[0])
    with warnings.catch_warnings(action="ignore"):  # it asks for shardings, which are this computer's
      arrays = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(stored.folder / "state")
    summary = json.loads((self.workdir / "summary.json").read_text(encoding="utf-8"))
    record = {name: value for name, value in stored.record.items() if name not in ("seconds", "record_checksum")}
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {f"array {jax.tree_util.keystr(path)}": np.asarray(leaf).tobytes() for path, leaf in leaves} | {
      "the checkpoint's record": record, "metrics.jsonl": self.rows(), "receipts.jsonl": self.rows("receipts.jsonl"),
      "summary.json": {k: v for k, v in summary.items() if k not in ("seconds", "waiting_for_data_share")},
    }

  def sample(self, process: subprocess.Popen) -> Sample | None:
    """What the process holds now; None once it has ended."""
    here = Path(f"/proc/{process.pid}")
    try:
      status = dict(line.split(":", 1) for line in (here / "status").read_text(encoding="ascii").splitlines())
      files = len(list((here / "fd").iterdir()))
      return Sample(_last_round(self.workdir / "metrics.jsonl"), int(status["VmRSS"].split()[0]) / 1024, files,
                    int(status["Threads"]))
    except (FileNotFoundError, KeyError):  # a process that has ended, but was not waited for, has no memory
      return None


def _last_round(path: Path) -> int:
  """The round of the last complete row; -1 for none."""
  if not path.exists():
    return -1
  with path.open("rb") as file:
    file.seek(max(0, path.stat().st_size - 20_000))
    lines = [line for line in file.read().splitlines(keepends=True)[1:] if line.endswith(b"\n")]
  return json.loads(lines[-1])["round"] if lines else -1


def kills(args: argparse.Namespace, folder: Path) -> measuring.Table:
  """Kills runs, and holds each that has come to its end against one that nothing disturbed."""
  draw, left, number = random.Random(args.seed), args.kills, 0

  def new(name: str) -> Run:
    return Run(f"{args.config}:kills", args.rounds, folder / name)

  unbroken = new("unbroken")
  unbroken.to_the_end()
  within = args.within or new("again").to_the_end()  # where all is compiled already, as for those that are killed
  expected = unbroken.outcome()
  most_redone = 2 * unbroken.rounds_between_checkpoints()  # one checkpoint may still be in the making
  table = measuring.Table(f"Killed within {within:.0f} s of each start", KILLS)
  while left:
    number += 1
    run, row = new(f"run{number}"), dict[str, Any](dict.fromkeys(KILLS, 0))
    while True:
      saved, killed = run.saved(), False
      process = run.start()
      if left:
        killed = run.kill_after(process, draw.uniform(0, within))
      else:
        run.finish(process)
      went_on_after = run.went_on_after()
      _check(went_on_after in (None, saved), f"went on after {went_on_after} rounds, where {saved} were saved")
      if not killed:
        break
      left -= 1
      redone = max(0, run.recorded() - run.saved())
      _check(redone <= most_redone, f"{redone} rounds have to be done again")
      row["kills"] += 1
      row["starting"] += run.recorded() <= saved
      row["saving"] += run.is_saving()
      row["redone"] += redone
      row["most_redone"] = max(row["most_redone"], redone)
    found = run.outcome()
    different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    _check(not different, f"not as without kills: {', '.join(sorted(different))}")
    table.add(row | {"run": number, "equal": f"all {len(expected)}"})
  return table


def soak(args: argparse.Namespace, folder: Path) -> list[measuring.Table]:
  """Many short rounds, in which members fail; what their process holds in the course of them, and who failed."""
  run, draw = Run(f"{args.config}:soak", args.soak_rounds, folder / "soak"), random.Random(args.seed)
  for _ in range(args.soak_kills):
    run.kill_after(run.start(), draw.uniform(30, 90))
  process, samples = run.start(), list[Sample]()
  while (sample := run.sample(process)) is not None:
    samples.append(sample)
    time.sleep(SECONDS_BETWEEN_SAMPLES)
  run.finish(process)
  rows = run.rows()
  places = [(index, path) for index in range(args.soak_rounds) for path in dict.fromkeys(row["node"] for row in rows)]
  _check([(row["round"], row["node"]) for row in rows] == places, "rounds are missing, or there twice")
  return [_growth([sample for sample in samples if sample.round >= 0]), _failures(rows)]


def _growth(samples: Sequence[Sample]) -> measuring.Table:
  """How much more is held in the last quarter of the rounds that were sampled than in the second."""
  last = samples[-1].round - 1  # of which all is sampled; thereafter the process scores, and closes what it has open
  samples = [sample for sample in samples if sample.round <= last]
  first = samples[0].round
  table = measuring.Table(f"Held by the process of rounds {first + 1} to {last + 1}, {len(samples)} samples", SOAK)
  quarter = (last + 1 - first) / 4
  second = [sample for sample in samples if quarter <= sample.round - first < 2 * quarter]
  final = [sample for sample in samples if 3 * quarter <= sample.round - first]
  for field, name in (("memory_mb", "resident memory, MB"), ("files", "open files"), ("threads", "threads")):
    before, after = (measuring.spread(getattr(sample, field) for sample in part) for part in (second, final))
    warm = [(sample.round, getattr(sample, field)) for sample in samples if sample.round - first >= quarter]
    slope = float(np.polyfit(*np.transpose(warm), 1)[0])
    table.add({"what": name, "second": before, "last": after, "growth": after.median - before.median,
               "slope": 1000 * slope, "samples": [[sample.round, getattr(sample, field)] for sample in samples]})
  return table


def _failures(rows: Sequence[dict[str, Any]]) -> measuring.Table:
  """What happened to members, and how often, in all rounds."""
  table, counts = measuring.Table("What happened to members", FAILURES), collections.Counter[str]()
  for row in rows:
    counts.update(row.get("turnout", {}))
    counts.update(f"rejected: {reason}" for reason in row.get("rejected", ()))
    counts["training failed"] += "failed" in row
  for what, count in sorted(counts.items()):
    table.add({"what": what, "count": count})
  return table


def _check(ok: bool, otherwise: str) -> None:
  if not ok:
    raise RuntimeError(otherwise)


def main(argv: Sequence[str] | None = None) -> list[measuring.Table]:
  """Prints the tables."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--rounds", type=int, default=8, help="of each run that is killed")
  parser.add_argument("--within", type=float, default=0.0, help="seconds; 0: as long as the unbroken run takes")
  parser.add_argument("--soak_rounds", type=int, default=500)
  parser.add_argument("--soak_kills", type=int, default=3)
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument("--config", default=__file__, help="a Python file with get_config(part)")
  args = measuring.parse(parser, argv, parts=PARTS)
  tables = []
  with tempfile.TemporaryDirectory() as folder:
    if "kills" in args.parts:
      tables.append(kills(args, Path(folder)))
    if "soak" in args.parts:
      tables += soak(args, Path(folder))
  measuring.finish(args, tables)
  return tables


if __name__ == "__main__":
  main()
