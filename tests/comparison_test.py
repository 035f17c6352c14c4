"""Which runs a comparison makes, skips, resumes and shares, with a stand-in for the training itself."""

import contextlib
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from worldlm_jax import checks, comparison, config as c, federation, metrics, progress, train, workdir
from worldlm_jax.data import batches, tokenizer

PERPLEXITY = {"local": 10.0, "fedavg": 9.0, "worldlm": 8.0}


def _score(perplexity: float) -> dict[str, float]:
  return {"loss_nats": 2.0, "perplexity": perplexity, "bits_per_byte": 3.0}


class Training:
  """Stands in for train.run: writes a run's files, keeps what was called, and fails where it is told to."""

  def __init__(self) -> None:
    self.calls: list[str] = []
    self.fail: dict[str, Exception] = {}
    self.change: dict[str, dict[str, Any]] = {}  # in the summary
    self.meanwhile: Callable[[], None] = lambda: None

  def __call__(self, config: c.Config, folder: Path, *, overwrite: bool, reporter: progress.Reporter) -> dict[str, Any]:
    name, key = folder.parent.name, f"{folder.parent.name} {config.seed}"
    self.calls.append(key + " afresh" * overwrite)
    tree = federation.resolve(config)
    sources = [(m.path, m.data) for m in tree.members if m.data]
    texts = batches.load(sources, config.data, tokenizer.load(config.data.tokenizer))
    digests = {path: text.digest for path, text in texts.items()}
    workdir.claim(folder, workdir.describe(config, tree, digests), overwrite=overwrite)
    self.meanwhile()
    reporter.start(["title"], config.rounds, 0)
    reporter.phase(1, "training", 0.5)
    if key in self.fail:
      error = self.fail.pop(key)
      if isinstance(error, FloatingPointError):
        metrics.write_json(folder / "stopped.json", {"reason": str(error)})
      raise error
    scores = {path: {kind: _score(PERPLEXITY[name] + config.seed) for kind in ("received", "personalised")}
              for path in texts}
    mean = {kind: {"mean": scores["a"][kind], "worst": scores["a"][kind]} for kind in ("received", "personalised")}
    metrics.append_jsonl(folder / "metrics.jsonl", [{"round": 0, "node": "a", "received": _score(99.0)}])
    metrics.write_json(folder / "summary.json", {
      "nodes": scores, "tree": mean, "tokens": 64, "bytes_down": 1, "bytes_up": 2, "seconds": {"training": 5.0},
      "fairness": {"initial_parameters": f"{config.seed}f", "batches": {p: "b" for p in texts},
                   "evaluation": {p: "e" for p in texts}},
    } | self.change.get(key, {}))
    return {}


class Lines(progress.Silent):
  """Keeps what a person would see."""

  def __init__(self, lines: list[str]) -> None:
    self.lines = lines

  def phase(self, round_index: int, text: str, fraction: float) -> None:
    self.lines.append(f"phase: {text}")

  def message(self, text: str) -> None:
    self.lines.append(text)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
  stand_in = Training()
  monkeypatch.setattr(train, "run", stand_in)
  monkeypatch.setattr(comparison, "SECONDS_BETWEEN_LOOKS", 0.02)
  return stand_in


@pytest.fixture
def compared(tmp_path: Path) -> c.Comparison:
  """Three entries with two seeds, on three nodes of a little text."""
  for name in ("a", "b", "a/inner"):
    (tmp_path / "texts" / name).mkdir(parents=True)
    for split in ("train", "valid", "test"):
      words = random.Random(name + split).choices(["wheat", "rye", name], k=60)
      (tmp_path / "texts" / name / f"{split}.txt").write_text(" ".join(words), encoding="utf-8")
  base = c.Config(rounds=2, federation=c.FederationConfig(folder=str(tmp_path / "texts")),
                  data=c.DataConfig(sequence_length=8), node=c.NodeSettings(local_steps=2, batch_size=2))
  return c.Comparison(base, [c.Entry(name, {"backbone.server_learning_rate": 0.1 + i})
                             for i, name in enumerate(PERPLEXITY)], seeds=(0, 1))


ALL = [f"{name} {seed}" for seed in (0, 1) for name in PERPLEXITY]


def _compare(compared: c.Comparison, folder: Path, **arguments: Any) -> tuple[dict[str, Any] | None, list[str]]:
  lines: list[str] = []
  return comparison.run(compared, folder, reporters=lambda: Lines(lines), **arguments), lines


def test_all_runs_are_made_and_put_together(training: Training, compared: c.Comparison, tmp_path: Path) -> None:
  content, lines = _compare(compared, tmp_path / "out", command="the command")
  assert training.calls == ALL
  assert content is not None
  assert json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=pytest.fail) == content
  assert (content["own"], content["alone"], content["seeds"]) == ("worldlm", "local", [0, 1])
  assert list(content["entries"]) == list(PERPLEXITY)
  assert content["entries"]["fedavg"] == {
    "algorithm": "worldlm", "overrides": {"backbone.server_learning_rate": 1.1}
  }
  assert content["results"]["fedavg"]["nodes"]["b"]["personalised"]["perplexity"]["values"] == [9.0, 10.0]
  assert [verdict["node"] for verdict in content["verdicts"]] == ["a", "a/inner", "b"]  # children after their parent
  assert content["verdicts"][0]["own_gain_percent"]["values"] == pytest.approx([25, 100 * 2 / 9])
  node = content["nodes"]["a"]
  num_windows = (node["train_tokens"] - 1) // 8
  assert node["parent"] == "a/" and node["name"] == "a" and node["has_text"] and node["floor"] is None
  assert node["epochs"] == pytest.approx(2 * 2 * 2 / num_windows)
  assert content["nodes"]["."] == {
    "parent": None, "name": "texts", "has_text": False, "train_tokens": 0, "epochs": 0.0, "floor": None
  }
  assert content["fairness"]["tokens"] == 64 and content["fairness"]["batches"] == {"a": "b", "b": "b", "a/inner": "b"}
  assert content["runs"][1] == {
    "entry": "fedavg", "seed": 0, "workdir": "runs/fedavg/seed0", "seconds": 5.0, "stopped": None
  }
  assert "the command" in (tmp_path / "out" / "comparison.md").read_text()
  assert "run 2/6: fedavg, seed 0" in lines
  assert "run 2/6: fedavg, seed 0 is done; mean test perplexity, personalised: 9.000" in lines
  assert "phase: run 2/6 (all in ~21 s): training" in lines  # 5 s a run, 4 and a quarter of them left


def test_what_is_done_is_skipped(training: Training, compared: c.Comparison, tmp_path: Path) -> None:
  compared.seeds = (0,)
  _compare(compared, tmp_path / "out")
  compared.seeds, compared.base.checkpoint.keep_last, compared.base.nodes_at_once = (0, 1), 7, 3  # change no result
  content, lines = _compare(compared, tmp_path / "out")
  assert training.calls == ALL and content is not None
  assert next(line for line in lines if line.startswith("run ")) == "run 4/6: local, seed 1"
  assert _compare(compared, tmp_path / "out")[0] == content and training.calls == ALL


def test_a_run_that_differs_is_refused_before_anything_runs(
  training: Training, compared: c.Comparison, tmp_path: Path
) -> None:
  _compare(compared, tmp_path / "out")
  compared.entries[1].overrides["backbone.server_learning_rate"] = 5.0
  compared.entries.append(c.Entry("first", {}))
  with pytest.raises(checks.InputError) as caught:
    _compare(compared, tmp_path / "out")
  assert str(caught.value) == (
    f"--workdir='{tmp_path}/out/runs/fedavg/seed0': expected a run of this configuration (fedavg, seed 0); it differs "
    "in: backbone.server_learning_rate: 1.1 there, 5.0 here. Choose another folder, or start afresh with --overwrite"
  )
  assert training.calls == ALL


def test_a_changed_text_is_left_to_the_run_to_refuse(
  training: Training, compared: c.Comparison, tmp_path: Path
) -> None:
  _compare(compared, tmp_path / "out")
  (tmp_path / "texts" / "a" / "train.txt").write_text("barley " * 60)
  with pytest.raises(checks.InputError, match="text, by its digest"):
    _compare(compared, tmp_path / "out")


def test_texts_that_have_moved_are_no_other_run(training: Training, compared: c.Comparison, tmp_path: Path) -> None:
  content, _ = _compare(compared, tmp_path / "out")
  os.rename(tmp_path / "texts", tmp_path / "moved")
  compared.base.federation.folder = str(tmp_path / "moved")
  again, _ = _compare(compared, tmp_path / "out")  # the real train.run returns what is finished
  assert training.calls == 2 * ALL and again is not None and content is not None
  assert again["results"]["fedavg"]["nodes"] == content["results"]["fedavg"]["nodes"]


def test_overwrite_starts_afresh_what_is_there(training: Training, compared: c.Comparison, tmp_path: Path) -> None:
  compared.seeds = (0,)
  _compare(compared, tmp_path / "out")
  compared.seeds, training.calls = (0, 1), []
  compared.entries[0].overrides["backbone.server_learning_rate"] = 5.0
  _compare(compared, tmp_path / "out", overwrite=True)
  assert training.calls == [key + " afresh" * key.endswith("0") for key in ALL]


def test_a_run_that_diverged_is_reported_and_the_others_go_on(
  training: Training, compared: c.Comparison, tmp_path: Path
) -> None:
  training.fail["fedavg 1"] = FloatingPointError("loss is nan at node 'a'")
  content, lines = _compare(compared, tmp_path / "out")
  assert training.calls == ALL and content is not None
  assert "run 5/6: fedavg, seed 1 diverged, the comparison goes on: loss is nan at node 'a'" in lines
  assert content["results"]["fedavg"]["diverged"]
  assert content["results"]["fedavg"]["tree"]["personalised"]["mean"]["perplexity"] == {
    "mean": None, "standard_error": None, "values": [9.0, None]
  }
  assert content["runs"][4]["stopped"] == "loss is nan at node 'a'" and content["runs"][4]["seconds"] is None
  assert content["verdicts"][0]["best"] == "worldlm" and content["fairness"]["tokens"] == 64
  page = (tmp_path / "out" / "comparison.md").read_text()
  assert "- fedavg, seed 1: loss is nan at node 'a'" in page
  assert _compare(compared, tmp_path / "out")[0] == content and training.calls == ALL


def test_another_arithmetic_error_is_not_swallowed(
  training: Training, compared: c.Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def failing(*_: Any, **__: Any) -> None:
    raise FloatingPointError("elsewhere")

  monkeypatch.setattr(train, "run", failing)
  with pytest.raises(FloatingPointError, match="elsewhere"):
    _compare(compared, tmp_path / "out")


def test_an_interruption_ends_it_and_the_rest_is_made_later(
  training: Training, compared: c.Comparison, tmp_path: Path
) -> None:
  training.fail["worldlm 0"] = train.Interrupted("stopped by SIGTERM; run the same command again to resume")
  with pytest.raises(train.Interrupted, match=r"^run 3/6: worldlm, seed 0: stopped by SIGTERM; run the same command"):
    _compare(compared, tmp_path / "out")
  assert not (tmp_path / "out" / "comparison.json").exists()
  training.calls.clear()
  assert _compare(compared, tmp_path / "out")[0] is not None
  assert training.calls == ALL[2:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_the_training_ends_it_too(
  training: Training, compared: c.Comparison, tmp_path: Path, number: signal.Signals
) -> None:
  before = signal.getsignal(number)
  training.meanwhile = lambda: signal.raise_signal(number)
  with pytest.raises(train.Interrupted, match=f"stopped by {number.name}; .*run the same command again to resume"):
    _compare(compared, tmp_path / "out")
  assert signal.getsignal(number) == before and training.calls == ["local 0"]


@pytest.mark.parametrize(("change", "what"), [
  ({"tokens": 65}, r"tokens trained on \(64 and 65\)"),
  ({"fairness": {"initial_parameters": "00", "batches": {}, "evaluation": {}}}, "initial parameters"),
])
def test_a_run_that_was_given_something_else_stops_it(
  training: Training, compared: c.Comparison, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
  training.change["fedavg 0"] = change
  for _ in range(2):  # at once, and when the same command is given again
    with pytest.raises(checks.InputError, match=f"entry='fedavg': .*entry 'local' was given; .* differ in {what}"):
      _compare(compared, tmp_path / "out")
  assert training.calls == ALL[:2] and not (tmp_path / "out" / "comparison.json").exists()


def test_some_entries_alone(training: Training, compared: c.Comparison, tmp_path: Path) -> None:
  content, lines = _compare(compared, tmp_path / "out", only=["fedavg"])
  assert content is None and training.calls == ["fedavg 0", "fedavg 1"]
  assert lines[-1] == "no results yet: the others are held against 'worldlm', whose runs are not done"
  content, _ = _compare(compared, tmp_path / "out", only=["worldlm"])
  assert content is not None and list(content["entries"]) == ["fedavg", "worldlm"] and content["alone"] is None
  content, _ = _compare(compared, tmp_path / "out")
  assert content is not None and list(content["entries"]) == list(PERPLEXITY) and len(training.calls) == 6


@contextlib.contextmanager
def _taken_by_another(folder: Path, *runs: str) -> Iterator[Callable[[], None]]:
  """Holds the locks of some runs in a thread of its own until the returned function is called."""
  held, let_go = threading.Event(), threading.Event()

  def hold() -> None:
    (folder / "locks").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
      for run in runs:
        stack.enter_context(filelock.FileLock(folder / "locks" / f"{run}.lock"))
      held.set()
      let_go.wait(600)

  thread = threading.Thread(target=hold)
  thread.start()
  assert held.wait(600)
  try:
    yield let_go.set
  finally:
    let_go.set()
    thread.join()


def test_runs_that_another_process_has_come_last(training: Training, compared: c.Comparison, tmp_path: Path) -> None:
  with _taken_by_another(tmp_path / "out", "local.seed0", "worldlm.seed1") as let_go:
    training.meanwhile = lambda: let_go() if len(training.calls) == 4 else None
    content, _ = _compare(compared, tmp_path / "out")
  assert content is not None and sorted(training.calls) == sorted(ALL)
  assert training.calls[:4] == ["fedavg 0", "worldlm 0", "local 1", "fedavg 1"]


def test_two_processes_share_the_work(training: Training, compared: c.Comparison, tmp_path: Path) -> None:
  both, begun = threading.Barrier(2), set()

  def meanwhile() -> None:
    if threading.get_ident() not in begun:  # nobody goes on before the other has begun too
      begun.add(threading.get_ident())
      both.wait(600)

  training.meanwhile = meanwhile
  found: list[Any] = []
  other = threading.Thread(target=lambda: found.append(_compare(compared, tmp_path / "out")))
  other.start()
  found.append(_compare(compared, tmp_path / "out"))
  other.join()
  (one, lines), (another, other_lines) = found
  assert sorted(training.calls) == sorted(ALL)
  assert one == another == json.loads((tmp_path / "out" / "comparison.json").read_text())
  made = [sum("is done" in line for line in of) for of in (lines, other_lines)]
  assert sum(made) == 6 and min(made) > 0


def test_what_another_process_finishes_at_the_last_moment_is_left_to_it(
  training: Training, compared: c.Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  content, _ = _compare(compared, tmp_path / "out")
  run, aside = tmp_path / "out" / "runs" / "local" / "seed0", tmp_path / "aside"
  run.rename(aside)
  acquire = filelock.FileLock.acquire

  def acquire_late(lock: filelock.FileLock, *arguments: Any, **named: Any) -> Any:
    if "local.seed0" in str(lock.lock_file):
      aside.rename(run)
    return acquire(lock, *arguments, **named)

  monkeypatch.setattr(filelock.FileLock, "acquire", acquire_late)
  training.calls.clear()
  assert _compare(compared, tmp_path / "out")[0] == content
  assert training.calls == [] and not aside.exists()


def test_the_wait_for_another_process_is_said_once(
  training: Training, compared: c.Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  looks = 0
  with _taken_by_another(tmp_path / "out", *(key.replace(" ", ".seed") for key in ALL)) as let_go:
    def sleep(_: float) -> None:
      nonlocal looks
      looks += 1
      if looks == 3:
        let_go()

    monkeypatch.setattr(comparison.time, "sleep", sleep)
    _, lines = _compare(compared, tmp_path / "out")
  assert looks >= 3 and sorted(training.calls) == sorted(ALL)
  waiting = [line for line in lines if line.startswith("waiting")]
  assert waiting == ["waiting for another process, which has local, seed 0; fedavg, seed 0; worldlm, seed 0 and 3 more"]


def test_overwrite_wants_to_be_alone(training: Training, compared: c.Comparison, tmp_path: Path) -> None:
  with _taken_by_another(tmp_path / "out", "fedavg.seed0"):
    (tmp_path / "out" / "runs" / "fedavg" / "seed0").mkdir(parents=True)
    with pytest.raises(checks.InputError, match=r"--overwrite=True: expected to be alone .*; leave it out"):
      _compare(compared, tmp_path / "out", overwrite=True)
  assert training.calls == []


def test_the_folder_of_a_single_run_is_refused(training: Training, compared: c.Comparison, tmp_path: Path) -> None:
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "config.json").write_text("{}")
  with pytest.raises(checks.InputError, match=r"or a new one .it holds a single run.; choose another folder"):
    _compare(compared, tmp_path / "out")
  (tmp_path / "file").write_text("")
  with pytest.raises(checks.InputError, match="file': expected a folder"):
    _compare(compared, tmp_path / "file")


def test_the_time_left_comes_from_finished_runs_or_from_the_present_one() -> None:
  now = 0.0
  pace = comparison._Pace(lambda: now)
  pace.start(3)
  assert pace.left(0.0, 0.0) == ""
  now = 30.0
  assert pace.left(0.5, 0.25) == " (all in ~7 min)"  # 120 s a run, 3.5 to go
  pace.finished += [50.0, 70.0]
  assert pace.left(0.5, 0.25) == " (all in ~4 min)"


def test_the_first_round_tells_of_no_time_left() -> None:
  lines: list[str] = []
  pace = comparison._Pace()
  pace.start(1)
  nested = comparison._Nested(Lines(lines), "run 1/2", pace)
  nested.start([], 4, 2)
  nested.phase(2, "down", 0.9)
  nested.phase(3, "down", 0.5)
  assert lines[0] == "phase: run 1/2: down"
  assert lines[1].startswith("phase: run 1/2 (all in ~") and lines[1].endswith("): down")
