"""Law 10 and what a run survives: kills, signals, damaged checkpoints, a full disk."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from worldlm_jax import checkpoint, config as config_lib, metrics, model, partition, progress, train, trees
from worldlm_jax.data import batches

ROUNDS = 3

# Runs a tiny federation to its end and prints a digest of every array of the final state. KILL names the
# place where the process kills itself, so that nothing can clean up.
DRIVER = """
import hashlib, os, signal, sys
sys.path.insert(0, {tests!r})
import train_test
from worldlm_jax import checkpoint, engine, train
import jax, numpy as np

place, count = os.environ.get("KILL", "never:0").split(":")
left = int(count)

def die_at(owner, method, when, after):
  real = getattr(owner, method)
  def patched(self, *args, **kwargs):
    global left
    hit = when(self, args)
    left -= hit
    if hit and left == 0 and not after:
      os.kill(os.getpid(), signal.SIGKILL)
    result = real(self, *args, **kwargs)
    if hit and left == 0:
      os.kill(os.getpid(), signal.SIGKILL)
    return result
  setattr(owner, method, patched)

if place == "training":  # the first waves of a level are trained, the others are not
  die_at(engine.Engine, "_call", lambda self, args: args[0][0] == "put", after=True)
elif place == "phases":
  die_at(train._Run, "_up", lambda self, args: True, after=False)
elif place == "saving":  # the arrays are copied, their files are being written
  die_at(checkpoint.Checkpoints, "save", lambda self, args: True, after=True)
elif place == "ending":  # the same with the last checkpoint
  last = train_test.ROUNDS * train.PLACES_PER_ROUND
  die_at(checkpoint.Checkpoints, "save", lambda self, args: args[0] == last, after=True)
elif place == "records":  # the rows of the round are written, its checkpoint is not
  die_at(train._Run, "_save", lambda self, args: True, after=False)

def summary(self, real=train._Run._summary):
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(self.state):
    digest.update(np.asarray(leaf).tobytes())
  print("digest", digest.hexdigest(), flush=True)
  return real(self)

train._Run._summary = summary
train.run(train_test.tiny_run(os.environ["TEXTS"], os.environ["SCHEDULE"]), os.environ["WORKDIR"])
"""


def write_texts(folder: Path) -> Path:
  """A tree of three levels with text at the root, at an inner node and at the leaves."""
  words = [w * n for w in ("lo", "re", "mi", "psu", "dol ") for n in (1, 2)]
  for path in ("", "a", "a/p", "a/q", "b/r", "b/s"):
    (folder / path).mkdir(parents=True, exist_ok=True)
    draw = random.Random("text of " + path)
    for split, size in (("train", 900), ("valid", 90), ("test", 90)):
      (folder / path / f"{split}.txt").write_text(" ".join(draw.choice(words) for _ in range(size)))
  return folder


def tiny_run(texts: str, schedule: str = "parallel") -> config_lib.Config:
  """Three rounds of two steps on `write_texts`' tree."""
  return config_lib.Config(
    rounds=ROUNDS, schedule=schedule, federation=config_lib.FederationConfig(folder=texts),
    node=config_lib.NodeSettings(local_steps=2, batch_size=3, warmup_steps=1),
    model=config_lib.ModelConfig(num_layers=3, d_model=12, num_heads=3, num_kv_heads=1, d_ff=17, key_layer_share=0.6),
    data=config_lib.DataConfig(sequence_length=13),
    evaluation=config_lib.EvaluationConfig(valid_windows=3, test_windows=5, matrix_windows=5), inner_text="before",
    mesh=config_lib.MeshConfig(fsdp=1),
  )


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
  return str(write_texts(tmp_path_factory.mktemp("texts")))


def drive(texts: str, workdir: Path, schedule: str = "parallel", kill: str = "never:0") -> subprocess.CompletedProcess:
  driver = DRIVER.format(tests=str(Path(__file__).parent))
  environment = os.environ | {"TEXTS": texts, "WORKDIR": str(workdir), "SCHEDULE": schedule, "KILL": kill}
  return subprocess.run([sys.executable, "-c", driver], capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def unbroken(texts, tmp_path_factory):
  """The digest, metrics and summary of runs that nothing disturbed, by schedule."""
  results = {}
  for schedule in ("parallel", "sequential"):
    workdir = tmp_path_factory.mktemp("unbroken") / schedule
    process = drive(texts, workdir, schedule)
    assert process.returncode == 0, process.stderr
    results[schedule] = outcome(process, workdir)
  return results


def outcome(process: subprocess.CompletedProcess, workdir: Path):
  summary = json.loads((workdir / "summary.json").read_text())
  del summary["seconds"], summary["waiting_for_data_share"]
  records = [(workdir / name).read_text() for name in ("metrics.jsonl", "receipts.jsonl")]
  return process.stdout.split("digest ")[1].split()[0], records, summary


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "kills"), [
  # Which of the checkpoints were complete by then may differ; all of these places are reached in any case.
  ("parallel", ("training:5", "saving:1", "phases:1", "ending:1")),
  pytest.param("parallel", ("training:10", "records:1"), marks=pytest.mark.exhaustive),
  pytest.param("sequential", ("phases:4",), marks=pytest.mark.exhaustive),
])
def test_killed_and_resumed_ends_in_the_same_bits(texts, unbroken, tmp_path, schedule, kills):
  """However often: each time that it goes on, it is killed somewhere else."""
  workdir = tmp_path / "run"
  for kill in kills:
    process = drive(texts, workdir, schedule, kill)
    assert process.returncode == -signal.SIGKILL, (kill, process.stderr)
    assert not (workdir / "summary.json").exists()
  process = drive(texts, workdir, schedule)
  assert process.returncode == 0, process.stderr
  assert outcome(process, workdir) == unbroken[schedule]


@pytest.mark.slow
def test_sigterm_saves_within_the_round_and_the_rest_is_the_same(texts, unbroken, tmp_path):
  workdir = tmp_path / "run"
  flags = [f"--{line}" for line in flag_lines(texts)]
  command = [sys.executable, "-m", "worldlm_jax.main", "--config=configs/folder.py", f"--workdir={workdir}", *flags]
  root = Path(__file__).parent.parent
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root,
    env=os.environ | {"PYTHONUNBUFFERED": "1"},
  )
  try:
    while "writing to" not in (line := process.stdout.readline()):  # the title; then the first phase begins
      assert line, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=600)
  finally:
    process.kill()
  assert process.returncode == 75, error
  assert "stopped by SIGTERM" in error and "run the same command again to resume" in error
  saved = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
  assert len(saved) == 1 and saved[0] % train.PLACES_PER_ROUND > 0  # between two phases of a round
  process = drive(texts, workdir)
  assert process.returncode == 0, process.stderr
  assert outcome(process, workdir) == unbroken["parallel"]


def flag_lines(texts: str) -> list[str]:
  """`tiny_run` as flags on top of configs/folder.py."""
  return [
    f"config.federation.folder={texts}", f"config.rounds={ROUNDS}", "config.node.local_steps=2",
    "config.node.batch_size=3", "config.node.warmup_steps=1", "config.model.num_layers=3", "config.model.d_model=12",
    "config.model.num_heads=3", "config.model.num_kv_heads=1", "config.model.d_ff=17",
    "config.model.key_layer_share=0.6", "config.data.sequence_length=13", "config.evaluation.valid_windows=3",
    "config.evaluation.test_windows=5", "config.evaluation.matrix_windows=5", "config.inner_text=before",
  ]


class Listener(progress.Silent):
  """Keeps the messages."""

  def __init__(self):
    self.messages = []

  def message(self, text):
    self.messages.append(text)


pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("finished") / "run"
  train.run(tiny_run(texts), workdir)
  return workdir


def newest_checkpoint(workdir: Path) -> Path:
  return workdir / "checkpoints" / str(ROUNDS * train.PLACES_PER_ROUND)


def stop_before_the_summary(finished: Path, workdir: Path) -> None:
  """A copy of a finished run whose checkpoints are all there."""
  shutil.copytree(finished, workdir)
  (workdir / "summary.json").unlink()


def stop_before_the_last_round(finished: Path, workdir: Path) -> None:
  """A copy of a finished run without what its last round left."""
  stop_before_the_summary(finished, workdir)
  shutil.rmtree(newest_checkpoint(workdir))


def largest_file(folder: Path) -> Path:
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_damaged_checkpoint_falls_back_to_the_one_before(texts, finished, tmp_path):
  """What is noticed is checkpoint_test's."""
  workdir = tmp_path / "run"
  stop_before_the_summary(finished, workdir)
  newest = newest_checkpoint(workdir)
  largest_file(newest).unlink()
  listener = Listener()
  summary = train.run(tiny_run(texts), workdir, reporter=listener)
  assert any(f"checkpoint {newest.name} is damaged" in text and "falling back" in text for text in listener.messages)
  assert f"resuming {workdir} after {ROUNDS - 1} of {ROUNDS} rounds" in listener.messages
  assert (workdir / "damaged" / f"{newest.name}.0").is_dir()
  assert summary["nodes"] == json.loads((finished / "summary.json").read_text())["nodes"]
  assert (workdir / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()


def test_what_is_no_damage_but_differs(texts, finished, tmp_path):
  """A note of sizes that was never finished, and other versions of libraries."""
  workdir = tmp_path / "run"
  stop_before_the_summary(finished, workdir)
  (newest_checkpoint(workdir) / "sizes.json.new").write_text("{")
  record = json.loads((workdir / "config.json").read_text())
  record["versions"]["optax"] = "0.1"
  (workdir / "config.json").write_text(json.dumps(record))
  listener = Listener()
  train.run(tiny_run(texts), workdir, reporter=listener)
  assert f"resuming {workdir} after {ROUNDS} of {ROUNDS} rounds" in listener.messages
  assert not (workdir / "damaged").exists()
  assert any("not to the same bits: optax 0.1 then" in text for text in listener.messages)


def test_all_checkpoints_damaged_is_an_error(texts, finished, tmp_path):
  workdir = tmp_path / "run"
  stop_before_the_summary(finished, workdir)
  for folder in (workdir / "checkpoints").iterdir():
    largest_file(folder).unlink()
  with pytest.raises(ValueError, match=r"checkpoints=.*expected at least one that is intact.*--overwrite"):
    train.run(tiny_run(texts), workdir)


def test_a_checkpoint_of_another_version_is_refused_and_left_alone(texts, finished, tmp_path):
  workdir = tmp_path / "run"
  stop_before_the_summary(finished, workdir)
  newest = newest_checkpoint(workdir)
  (record,) = newest.glob("record/metadata")
  content = json.loads(record.read_text().replace(".own_weight\"", ".old_weight\""))
  del content["record_checksum"]
  record.write_text(json.dumps(content | {"record_checksum": checkpoint._record_checksum(content)}))
  (newest / "sizes.json").unlink()  # that file may have another size now
  with pytest.raises(ValueError, match=r"checkpoint=.*arrays of this version's state \(.*weight.*--overwrite"):
    train.run(tiny_run(texts), workdir)
  assert newest.is_dir()


class Order(progress.Silent):
  """Keeps what it is told of rounds, and when."""

  def __init__(self):
    self.told = []

  def phase(self, round_index, text, fraction):
    self.told.append(("phase", round_index))

  def round(self, round_index, rows, seconds):
    self.told.append(("round", round_index))


def test_rounds_are_handed_out_before_what_came_of_the_last_is_known(texts, finished, tmp_path):
  config, order = tiny_run(texts), Order()
  config.checkpoint.every_rounds = ROUNDS
  train.run(config, tmp_path / "run", reporter=order)
  for index in range(ROUNDS - 1):
    assert order.told.index(("phase", index + 1)) < order.told.index(("round", index))
  assert [index for kind, index in order.told if kind == "round"] == list(range(ROUNDS))
  assert (tmp_path / "run" / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
  assert list((tmp_path / "run" / "checkpoints").iterdir()) == [newest_checkpoint(tmp_path / "run")]


def test_a_finished_run_is_not_run_again(texts, finished):
  listener = Listener()
  before = (finished / "summary.json").stat().st_mtime_ns
  summary = train.run(tiny_run(texts), finished, reporter=listener)
  assert summary == json.loads((finished / "summary.json").read_text())
  assert (finished / "summary.json").stat().st_mtime_ns == before
  assert any("finished; --overwrite starts afresh" in text for text in listener.messages)


def test_a_full_disk_is_said_and_loses_nothing(texts, finished, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  stop_before_the_last_round(finished, workdir)

  def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
    patch.setattr(checkpoint.ocp.CheckpointManager, "close", full)  # Orbax raises it there once more
    with pytest.raises(OSError, match=r"no space left while writing .*newest complete checkpoint is kept; free some"):
      train.run(tiny_run(texts), workdir)
  assert train.run(tiny_run(texts), workdir)["nodes"] == json.loads((finished / "summary.json").read_text())["nodes"]


def test_a_work_directory_that_cannot_be_written_to_is_said_before_texts_are_read(texts, tmp_path, monkeypatch):
  monkeypatch.setattr(train.texts_lib, "load", pytest.fail)
  (tmp_path / "file").write_text("mine")
  with pytest.raises(ValueError, match=r"--workdir=.*expected a folder that can be written to; .*file is none"):
    train.run(tiny_run(texts), tmp_path / "file" / "run")


def slowly(call):
  """The same, after a while."""
  def called(*arguments, **named):
    time.sleep(0.1)
    return call(*arguments, **named)

  return called


def test_on_a_slow_file_system_with_a_restless_clock_all_is_the_same(texts, finished, tmp_path, monkeypatch):
  """The clock is put forward or back by a day whenever somebody looks at it."""
  workdir, now, days = tmp_path / "run", time.time(), itertools.cycle((0, 1, -1, 2))
  monkeypatch.setattr(time, "time", lambda: now + 86_400 * next(days))
  for name in ("open", "fsync", "mkdir", "rename", "replace"):
    monkeypatch.setattr(os, name, slowly(getattr(os, name)))
  for name in ("append_jsonl", "write_json"):
    monkeypatch.setattr(metrics, name, slowly(getattr(metrics, name)))
  summary = train.run(tiny_run(texts), workdir)
  for name in ("metrics.jsonl", "receipts.jsonl"):
    assert (workdir / name).read_text() == (finished / name).read_text()
  expected = json.loads((finished / "summary.json").read_text())
  assert summary["nodes"] == expected["nodes"]
  assert all(0 <= seconds < 600 for seconds in summary["seconds"].values())
  kept = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (workdir, finished)]
  assert kept[0] == kept[1]


def test_a_bad_model_received_stops_the_run_for_good(texts, tmp_path, monkeypatch):
  """It is noticed some phases later, and the state then is saved."""
  config = tiny_run(texts)
  config.backbone.server_learning_rate = 1e16  # the model is finite, what it computes is not
  for _ in range(2):  # running it again says the same
    with pytest.raises(FloatingPointError, match=r"(valid loss as received is (nan|inf)|gradient or the step is not "
                       r"finite) .*at node .*, round 2.*; this was noticed (in|after) round 2, and the state then is "
                       r"saved in .*server_learning_rate"):
      train.run(config, tmp_path / "run")
  newest = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
  assert train.PLACES_PER_ROUND < newest <= 2 * train.PLACES_PER_ROUND

  def stop(*_):
    raise InterruptedError

  monkeypatch.setattr(train._Run, "_round", stop)  # once it has begun anew
  with pytest.raises(InterruptedError):
    train.run(tiny_run(texts), tmp_path / "run", overwrite=True)
  assert not (tmp_path / "run" / "stopped.json").exists()


def test_too_little_space_is_said_before_training(texts, tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
  with pytest.raises(ValueError, match=r"--workdir=.*GB free for checkpoints.*config.checkpoint.keep_last"):
    train.run(tiny_run(texts), tmp_path / "run")


def test_the_last_and_the_best_checkpoints_are_kept(finished):
  kept = sorted(int(path.name) // train.PLACES_PER_ROUND for path in (finished / "checkpoints").iterdir())
  rows = metrics.read_jsonl(finished / "metrics.jsonl")
  losses = [
    np.mean([row["personalised"]["loss_nats"] for row in rows if row["round"] == r and "personalised" in row])
    for r in range(ROUNDS)
  ]
  assert kept == sorted({ROUNDS - 1, ROUNDS} | {1 + int(np.argmin(losses))})


def test_waiting_for_data_and_compiling_are_booked_apart(finished):
  seconds = json.loads((finished / "summary.json").read_text())["seconds"]
  assert set(seconds) == {"compiling", "training", "aggregating", "evaluating", "saving", "waiting_for_data"}
  assert all(value >= 0 for value in seconds.values())
  share = json.loads((finished / "summary.json").read_text())["waiting_for_data_share"]
  assert share == pytest.approx(seconds["waiting_for_data"] / sum(seconds.values()), abs=2e-3)



def test_rows_name_their_sources_and_count_their_bytes(texts, finished):
  rows = metrics.read_jsonl(finished / "metrics.jsonl")
  assert [(row["round"], row["node"]) for row in rows] == [
    (r, path) for r in range(ROUNDS) for path in (".", "a", "b", "a/p", "a/q", "b/r", "b/s")
  ]
  last = {row["node"]: row for row in rows[-7:]}
  arch = model.architecture(tiny_run(texts).model, 257)
  params = model.abstract_params(arch)
  node, layer = trees.num_bytes(params), trees.num_bytes(params["key_layers"]) // 2
  assert last["."]["bytes_down"] == last["."]["bytes_up"] == 0
  # Residual layers that a leaf receives go no further: its parent, which has them, mixes them in.
  assert last["a/p"]["bytes_up"] == last["a/p"]["bytes_down"] == node
  assert last["a"]["bytes_up"] == node + 2 * layer  # one residual layer for each of two key layers
  received = last["a"]["residuals_received"]
  assert last["a"]["bytes_down"] == node + len(received) * layer
  assert {(r["layer"], r["made_in_round"]) for r in received} == {(0, ROUNDS - 2), (1, ROUNDS - 2)}
  assert {r["from"] for r in received} <= {"b/r", "b/s"}
  assert all(set(layer) <= {"a/p", "a/q"} for layer in last["a"]["attention_up"])
  # b has no text: it follows the mean of its members, weighted by their texts.
  sizes = {node: json.loads((finished / "summary.json").read_text())["nodes"][node]["data"]["train"]["tokens"]
           for node in ("b/r", "b/s")}
  shares = {node: pytest.approx(size / sum(sizes.values()), abs=1e-5) for node, size in sizes.items()}
  assert all(layer == shares for layer in last["b"]["attention_up"])
  assert last["b"]["tokens"] == 0 and "personalised" not in last["b"] and "loss_nats" not in last["b"]
  assert last["a/p"]["tokens"] == ROUNDS * 2 * 3 * 13


def test_receipts_account_for_every_byte(finished):
  rows, receipts = (metrics.read_jsonl(finished / name) for name in ("metrics.jsonl", "receipts.jsonl"))
  for row in rows:
    here = [r for r in receipts if r["round"] == row["round"]]
    assert row["bytes_up"] == sum(r["bytes"] for r in here if r["phase"] == "up" and r["from"] == row["node"])
    assert row["bytes_down"] == sum(r["bytes"] for r in here if r["phase"] == "down" and r["to"] == row["node"])
  assert all(r["decision"] == "sent" and r["rule"] == "" and r["privacy_cost"] is None for r in receipts)
  assert all(r["norm"] > 0 for r in receipts if r["phase"] != "attention" and (r["phase"], r["part"]) != (
    "up", "residual_layer") and r["round"] == 0 and r["part"] != "addition")
  up = {(r["from"], r["part"]): r for r in receipts if r["round"] == ROUNDS - 1 and r["phase"] == "up"}
  assert sum(up[path, "backbone"]["weight"] for path in ("b/r", "b/s")) == pytest.approx(1, abs=1e-5)
  assert all(r["reach"] == "." for (_, part), r in up.items() if part != "residual_layer")
  given = {(r["from"], r["weight"]) for r in receipts if r["phase"] == "attention" and r["to"] == "a/p"}
  assert all(source in ("a", "a/q") and weight > 0 for source, weight in given)


def test_the_summary_adds_up(finished):
  summary = json.loads((finished / "summary.json").read_text())
  rows = metrics.read_jsonl(finished / "metrics.jsonl")
  assert summary["bytes_down"] == sum(row["bytes_down"] for row in rows)
  assert summary["bytes_up"] == sum(row["bytes_up"] for row in rows)
  assert summary["tokens"] == sum(node["tokens"] for node in summary["nodes"].values())
  with_text = [node for node in summary["nodes"].values() if "received" in node]
  assert len(with_text) == 6
  for kind in ("received", "personalised"):
    scores = [node[kind]["perplexity"] for node in with_text]
    assert summary["tree"][kind]["mean"]["perplexity"] == pytest.approx(np.mean(scores))
    assert summary["tree"][kind]["worst"]["perplexity"] == max(scores)
  assert set(summary["nodes"]["b"]["subtree"]["received"]["mean"]) == {"loss_nats", "perplexity", "bits_per_byte"}


def test_every_model_is_scored_on_every_text_at_the_end(finished):
  summary = json.loads((finished / "summary.json").read_text())
  found = summary["matrix"]
  assert found["models"] == [".", "a", "a/p", "a/q", "b", "b/r", "b/s"]
  assert found["corpora"] == [".", "a", "a/p", "a/q", "b/r", "b/s"]
  assert np.shape(found["perplexity"]) == (7, 6) and np.isfinite(found["perplexity"]).all()
  trusts = {row["node"]: row.get("trust") for row in metrics.read_jsonl(finished / "metrics.jsonl")}
  whole = [path for path in ("a/p", "a/q", "b/r", "b/s") if trusts[path] == 1]
  assert whole  # where trust is less, the model in use has moved with the parent's
  for path in whole:  # nothing has changed leaves since they trained
    own = found["perplexity"][found["models"].index(path)][found["corpora"].index(path)]
    assert own == pytest.approx(summary["nodes"][path]["personalised"]["perplexity"])


def test_no_windows_no_matrix(texts, finished, tmp_path):
  workdir, config = tmp_path / "run", tiny_run(texts)
  stop_before_the_summary(finished, workdir)
  shutil.rmtree(workdir / "tensorboard")
  record = json.loads((workdir / "config.json").read_text())
  record["config"]["evaluation"]["matrix_windows"] = config.evaluation.matrix_windows = 0
  (workdir / "config.json").write_text(json.dumps(record))
  config.logging.tensorboard = False
  assert train.run(config, workdir)["matrix"] is None
  assert not (workdir / "tensorboard").exists()


class Watched:
  """Stands in for the watchers, and keeps what they are told."""

  def __init__(self, logging, workdir, config, first_round, seconds, report):
    self.told, self.closed, self.first_round, self.seconds = [], 0, first_round, dict(seconds)
    assert config == json.loads((workdir / "config.json").read_text())["config"]

  def round(self, index, rows, seconds):
    self.told.append((index, list(rows.values()), dict(seconds)))

  def close(self):
    self.closed += 1


def test_watchers_see_each_round_and_are_closed_whatever_happens(texts, finished, tmp_path, monkeypatch):
  made = []
  monkeypatch.setattr(train.watching, "Watchers", lambda *arguments: made.append(Watched(*arguments)) or made[-1])
  train.run(tiny_run(texts), finished)  # nothing left to see
  assert made == []
  workdir = tmp_path / "run"
  stop_before_the_last_round(finished, workdir)
  train.run(tiny_run(texts), workdir)
  rows = [row for row in metrics.read_jsonl(workdir / "metrics.jsonl") if row["round"] == ROUNDS - 1]
  ((index, seen, seconds),) = made[0].told
  assert (made[0].first_round, index, made[0].closed) == (ROUNDS - 1, ROUNDS - 1, 1)
  assert json.loads(json.dumps(seen)) == rows
  assert seconds["training"] > made[0].seconds["training"] > 0
  stop_before_the_last_round(finished, tmp_path / "bad")

  def fail(*_):
    raise FloatingPointError

  monkeypatch.setattr(train._Run, "_round", fail)
  with pytest.raises(FloatingPointError):
    train.run(tiny_run(texts), tmp_path / "bad")
  assert (made[1].told, made[1].closed) == ([], 1)


def test_a_nodes_own_limit_reaches_its_text(texts, tmp_path, monkeypatch):
  config, loaded, load = tiny_run(texts), {}, batches.load
  config.federation.overrides = {"a": {"max_train_bytes": "300"}, "a/q": {"max_train_bytes": 200}}

  def load_and_stop(*arguments):
    loaded.update(load(*arguments))
    raise InterruptedError

  monkeypatch.setattr(batches, "load", load_and_stop)
  with pytest.raises(InterruptedError):
    train.run(config, tmp_path / "run")
  sizes = {path: text.text.splits["train"].counts.text_bytes for path, text in loaded.items()}
  assert {path: size for path, size in sizes.items() if size <= 300} == {"a": 300, "a/p": 300, "a/q": 200}


def test_levels_without_text_exchange_too_when_nodes_judge_by_their_validation_batch(texts, tmp_path):
  leaves = [config_lib.Node(name, config_lib.Files(f"{texts}/a/{name}")) for name in ("p", "q")]
  config = tiny_run(texts)
  config.federation = config_lib.FederationConfig(root=config_lib.Node("world", None, leaves))
  config.key_layers = config_lib.KeyLayerConfig(values="layers", similarity="validation_loss")
  config.node.acceptance, config.rounds = "validated", 1
  train.run(config, tmp_path / "run")
  root = metrics.read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
  assert root["accepted_up"] and root["attention_up"] == [{"p": 0.5, "q": 0.5}] * 2  # no text, no preference


def test_the_summary_says_what_the_texts_hold(texts, finished):
  data = json.loads((finished / "summary.json").read_text())["nodes"]["a/p"]["data"]
  size = (Path(texts) / "a" / "p" / "train.txt").stat().st_size
  assert data["train"] == {"documents": 1, "text_bytes": size, "tokens": size + 1, "replaced": 0, "empty": 0}
  test = data["test"]
  assert data["bytes_per_token"] == test["text_bytes"] / test["tokens"]
  assert data["compressor"]["name"] == "xz" and 0 < data["compressor"]["bits_per_byte"] < 8
  assert json.loads((finished / "summary.json").read_text())["duplicates"] == []


def test_what_is_trained_and_tested_on_is_reported(texts, tmp_path):
  shutil.copytree(texts, tmp_path / "texts")
  leaked = (tmp_path / "texts" / "b" / "s" / "test.txt").read_text()
  with (tmp_path / "texts" / "a" / "train.txt").open("a") as file:
    file.write(f"\n\n{leaked}")
  config, listener = tiny_run(str(tmp_path / "texts")), Listener()
  config.rounds = 1
  summary = train.run(config, tmp_path / "run", reporter=listener)
  assert "warning: 1 test document(s) of b/s are also in the training text of a" in listener.messages
  assert summary["duplicates"] == [
    {"node": "b/s", "split": "test", "also_in_node": "a", "also_in_split": "train", "documents": 1}
  ]


def test_windows_of_single_documents_train_from_end_to_end(texts, tmp_path):
  config = tiny_run(texts)
  config.rounds, config.data.packing, config.data.document_mask = 1, "documents", True
  for path in Path(shutil.copytree(texts, tmp_path / "texts")).rglob("*.txt"):
    path.write_text("\n\n".join(path.read_text().split(" ")))
  config.federation.folder = str(tmp_path / "texts")
  summary = train.run(config, tmp_path / "run")
  most = 2 * 3 * 13  # steps, windows, tokens: padding is not counted
  assert all(0 < node["tokens"] < most for path, node in summary["nodes"].items() if path != "b")
  assert all(np.isfinite(node["personalised"]["loss_nats"]) for path, node in summary["nodes"].items() if path != "b")


def test_artificial_languages_come_with_their_floor(tmp_path):
  config = tiny_run("")
  config.rounds = 1
  config.federation = config_lib.FederationConfig(
    synthetic=config_lib.SyntheticTree((2,), train_bytes=5000, eval_bytes=2000)
  )
  summary = train.run(config, tmp_path / "run")
  leaves = [node for path, node in summary["nodes"].items() if path != "."]
  assert len(leaves) == 2
  for leaf in leaves:
    floor = leaf["data"]["floor"]
    assert 0 < floor["bits_per_byte"] < leaf["personalised"]["bits_per_byte"]
    assert floor["perplexity"] == pytest.approx(np.exp(floor["loss_nats"]))


@pytest.mark.slow
@pytest.mark.parametrize("payload", ["float32", pytest.param("int8", marks=pytest.mark.exhaustive)])
def test_a_run_whose_nodes_wait_on_the_host_is_the_same(texts, tmp_path, monkeypatch, payload):
  """The first of the CPU's devices is the host's, another one trains."""
  monkeypatch.setattr(train, "_mesh", lambda *_: partition.make_mesh(jax.devices()[-1:]))
  found = {}
  for waiting in ("device", "host"):
    config = tiny_run(texts)
    config.waiting, config.payload, config.rounds = waiting, payload, 2
    summary = train.run(config, tmp_path / waiting)
    found[waiting] = [node["personalised"]["loss_nats"] for node in summary["nodes"].values() if "personalised" in node]
  assert found["host"] == pytest.approx(found["device"], rel=1e-4)
