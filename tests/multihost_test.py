"""Several processes through the command: each reads the text of its own nodes alone, and all train as one would."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROUNDS = 3
NAMES = [f"n{i}" for i in range(7)]

# Seven leaves on four devices: eight rows, two on each device, so that nodes 0 to 3 are the first of two processes'.
# A process finds only the texts of its own nodes: reading any other would fail.
CONFIG = f"""
import os, time
from worldlm_jax import config as c, train

if "HOLD" in os.environ:  # goes on with the second round when it has been told to stop
  real = train._Run._round

  def hold(self, index, feed):
    while index and not self.stop.name:
      time.sleep(0.01)
    return real(self, index, feed)

  train._Run._round = hold

def get_config():
  leaves = [c.Node(f"n{{i}}", c.Files(f"{{os.environ['TEXTS']}}/n{{i}}")) for i in range({len(NAMES)})]
  return c.Config(
    rounds={ROUNDS}, federation=c.FederationConfig(root=c.Node("world", None, leaves)),
    node=c.NodeSettings(local_steps=2, batch_size=4, warmup_steps=1), data=c.DataConfig(sequence_length=13),
    model=c.ModelConfig(num_layers=2, d_model=12, num_heads=2, num_kv_heads=2, d_ff=16, key_layer_share=0.5),
    evaluation=c.EvaluationConfig(valid_windows=3, test_windows=5, acceptance_windows=2, matrix_windows=2),
  )
"""


class Cluster:
  """Starts the command in several processes, each with its own cache of texts and all with one of programs."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.started: list[subprocess.Popen[str]] = []
    (folder / "config.py").write_text(CONFIG)

  def start(
    self, workdir: Path, texts: list[Path], devices: int, *flags: str, hold: int = -1
  ) -> list[subprocess.Popen[str]]:
    """One process for each of `texts`, with so many devices; process `hold` waits for SIGTERM in its second round."""
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    processes = []
    for i, own in enumerate(texts):
      environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices), "XDG_CACHE_HOME": str(self.folder / f"cache{i}"), "JAX_PLATFORMS": "cpu",
        "TEXTS": str(own), "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"), "PYTHONUNBUFFERED": "1",
      } | ({"HOLD": ""} if i == hold else {})
      joined = [f"--coordinator=localhost:{port}", f"--num_processes={len(texts)}", f"--process_id={i}"]
      command = [sys.executable, "-m", "worldlm_jax.main", f"--config={self.folder / 'config.py'}",
                 f"--workdir={workdir}", *flags, *(joined if len(texts) > 1 else [])]
      processes.append(subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parent.parent,
      ))
    self.started += processes
    return processes

  def finish(self, processes: list[subprocess.Popen[str]], code: int = 0) -> list[tuple[str, str]]:
    """Output and errors of processes that all end with `code`."""
    found = [process.communicate(timeout=600) for process in processes]
    for process, (output, errors) in zip(processes, found, strict=True):
      assert process.returncode == code, output + errors
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
  found = Cluster(tmp_path_factory.mktemp("cluster"))
  yield found
  for process in found.started:
    process.kill()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return _write(tmp_path_factory.mktemp("texts"), NAMES)


@pytest.fixture(scope="module")
def alone(cluster: Cluster, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The work directory of one process that has all devices."""
  workdir = tmp_path_factory.mktemp("runs") / "alone"
  cluster.finish(cluster.start(workdir, [texts], 4))
  return workdir


def _write(folder: Path, names: list[str]) -> Path:
  for name in names:
    (folder / name).mkdir(parents=True)
    draw = np.random.default_rng([*name.encode()])
    for split, size in (("train", 900), ("valid", 90), ("test", 90)):
      text = "".join(draw.choice(list("abcdefg ")) for _ in range(size))
      leaked = "".join(np.random.default_rng(1).choice(list("hij"), 60)) if (name, split) in LEAK else ""
      (folder / name / f"{split}.txt").write_text(f"{text}\n\n{leaked}" if leaked else text)
  return folder


LEAK = (("n1", "train"), ("n5", "test"))  # of different processes


def _halves(folder: Path) -> list[Path]:
  return [_write(folder / "first", NAMES[:4]), _write(folder / "second", NAMES[4:])]


def _results(workdir: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  summary = json.loads((workdir / "summary.json").read_text())
  del summary["seconds"], summary["waiting_for_data_share"]
  return rows, summary


def _assert_close(actual: Any, expected: Any) -> None:
  if isinstance(expected, dict):
    assert actual.keys() == expected.keys()
    for name in expected:
      _assert_close(actual[name], expected[name])
  elif isinstance(expected, list | tuple):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
      _assert_close(a, e)
  elif isinstance(expected, float):
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5)
  else:
    assert actual == expected


@pytest.mark.slow
def test_two_processes_train_as_one_and_read_their_own_nodes_alone(
  cluster: Cluster, alone: Path, tmp_path: Path
) -> None:
  workdir = tmp_path / "run"
  (lead, _), (other, _) = cluster.finish(cluster.start(workdir, _halves(tmp_path), 2))
  _assert_close(_results(workdir), _results(alone))
  found = [(d["node"], d["also_in_node"], d["also_in_split"]) for d in _results(workdir)[1]["duplicates"]]
  assert found == [("n5", "n1", "train")]
  for line in ("4 devices (node=4) of 2 processes", "1 test document(s) of n5 are also in the training text of n1",
               f"round {ROUNDS}/{ROUNDS}", "test split"):
    assert line in lead and line not in other


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_one_process_on_another_mesh_goes_on(
  cluster: Cluster, alone: Path, texts: Path, tmp_path: Path
) -> None:
  workdir = tmp_path / "run"
  processes = cluster.start(workdir, _halves(tmp_path), 2, hold=1)
  while not (line := processes[0].stdout.readline()).startswith("round 1/"):  # type: ignore[union-attr]
    assert line, processes[0].stderr.read()  # type: ignore[union-attr]
  processes[1].send_signal(signal.SIGTERM)
  (_, lead), (_, other) = cluster.finish(processes, code=75)
  assert "stopped by a signal to another process" in lead and "stopped by SIGTERM" in other
  assert list((workdir / "checkpoints").iterdir()) and not (workdir / "summary.json").exists()
  # Three groups of two devices, each of which shares a node's matrices: the seven leaves fill nine rows.
  ((output, _),) = cluster.finish(cluster.start(workdir, [texts], 6, "--config.mesh.fsdp=2"))
  assert f"resuming {workdir} after" in output
  _assert_close(_results(workdir), _results(alone))


@pytest.mark.slow
def test_what_one_process_cannot_read_ends_all(cluster: Cluster, tmp_path: Path) -> None:
  halves = _halves(tmp_path)
  (halves[1] / "n6" / "valid.txt").write_text("short")
  (_, lead), (_, other) = cluster.finish(cluster.start(tmp_path / "run", halves, 2), code=2)
  said = "n6: config.data.sequence_length=13: expected at most 5, because the valid split has 6 tokens"
  assert f"error: process 1: {said}" in lead and f"error: {said}" in other
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_must_be_given_the_same(cluster: Cluster, tmp_path: Path) -> None:
  halves = _halves(tmp_path)
  environment = cluster.folder / "config.py"
  content = environment.read_text()
  environment.write_text(content.replace(f"rounds={ROUNDS}", f"rounds={ROUNDS} + ('second' in os.environ['TEXTS'])"))
  try:
    found = cluster.finish(cluster.start(tmp_path / "run", halves, 2), code=2)
  finally:
    environment.write_text(content)
  assert all("config.rounds: 3 there, 4 here" in errors for _, errors in found)
