"""The command as a person uses it: what it writes, what it prints, and how it exits."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from worldlm_jax import progress, workdir

REPOSITORY = Path(__file__).parent.parent
TINY = (
  "--config.data.sequence_length=16", "--config.rounds=2", "--config.node.local_steps=2", "--config.node.batch_size=3",
  "--config.model.num_layers=2", "--config.model.d_model=12", "--config.model.num_heads=2",
  "--config.model.num_kv_heads=1", "--config.model.d_ff=17", "--config.model.key_layer_share=0.5",
  "--config.evaluation.valid_windows=3", "--config.evaluation.test_windows=5",
)
SCORE = {"loss_nats", "perplexity", "bits_per_byte"}


def _main(*arguments: str | Path) -> tuple[int, str, str]:
  """Exit code, standard output and standard error of the command, on one device."""
  done = subprocess.run(
    [sys.executable, "-m", "worldlm_jax.main", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True,
    timeout=600, env=os.environ | {"COLUMNS": "120"},
  )
  return done.returncode, done.stdout, done.stderr


def _refused(code: int, *arguments: str | Path) -> str:
  """The one line with which the command ends."""
  found, _, errors = _main(*arguments)
  lines = errors.splitlines()
  assert (found, len(lines)) == (code, 1), errors
  return lines[0]


def _texts(folder: Path, *names: str, words: int = 199) -> Path:
  """A folder tree with three splits in each of the named folders."""
  for name in names:
    (folder / name).mkdir(parents=True)
    for split in ("train", "valid", "test"):
      draw = random.Random(f"{name} {split}")
      text = " ".join(draw.choice(["wheat", "barley", "rye", "oats", name]) for _ in range(words))
      (folder / name / f"{split}.txt").write_text(text, encoding="utf-8")
  return folder


def _rows(workdir: Path) -> list[dict[str, Any]]:
  return [json.loads(line, parse_constant=pytest.fail) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _content(workdir: Path) -> dict[str, bytes]:
  return {str(file.relative_to(workdir)): file.read_bytes() for file in workdir.rglob("*")
          if file.is_file() and file.name != "lock"}


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
  """The commands of this file share what they compile."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
    yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, str]:
  """The flags, the work directory and the output of a run over a tree of two levels whose root has no text."""
  world = _texts(tmp_path_factory.mktemp("texts") / "world", "law", "medicine")
  workdir = tmp_path_factory.mktemp("runs") / "first"
  arguments = ["--config=configs/folder.py", f"--config.federation.folder={world}", f"--workdir={workdir}", *TINY,
               "--node=law.local_steps=3"]
  code, output, errors = _main(*arguments)
  assert (code, errors) == (0, ""), errors
  return arguments, workdir, output


@pytest.mark.slow
def test_a_run_writes_its_files_and_a_closing_table(finished: tuple[list[str], Path, str]) -> None:
  _, workdir, output = finished
  assert {file.name for file in workdir.iterdir()} == {
    "checkpoints", "config.json", "lock", "metrics.jsonl", "receipts.jsonl", "summary.json", "tensorboard"
  }
  assert len(list((workdir / "checkpoints").iterdir())) == 2
  for expected in ("3 nodes in 2 levels (1, 2), 2 with text", "round 2/2", "test split", f"see {workdir}"):
    assert expected in output
  closing = {line.split()[0]: line.split()[1:] for line in output[output.index("test split"):].splitlines()}
  summary = json.loads((workdir / "summary.json").read_text())
  law = summary["nodes"]["law"]
  assert closing["law"] == [f"{law['received']['perplexity']:.3f}", f"{law['personalised']['perplexity']:.3f}",
                            f"{law['personalised']['bits_per_byte']:.4f}"]


@pytest.mark.slow
def test_config_json_has_all_that_was_resolved(finished: tuple[list[str], Path, str]) -> None:
  arguments, workdir, _ = finished
  there = json.loads((workdir / "config.json").read_text(), parse_constant=pytest.fail)
  assert there.keys() == {"config", "nodes", "versions", "commit", "devices"}
  assert there["config"]["rounds"] == 2 and there["config"]["model"]["d_model"] == 12
  assert {path: node["settings"]["local_steps"] for path, node in there["nodes"].items()} == {
    ".": 2, "law": 3, "medicine": 2
  }
  assert {path: node["digest"] is not None for path, node in there["nodes"].items()} == {
    ".": False, "law": True, "medicine": True
  }
  folder = arguments[1].partition("=")[2]
  assert there["nodes"]["law"]["data"] == {
    "kind": "Files", "path": f"{folder}/law", "text_field": "text", "node_field": ""
  }
  assert there["versions"]["python"] == ".".join(map(str, sys.version_info[:3])) and there["versions"]["jax"]
  if (REPOSITORY / ".git").exists():
    assert len(there["commit"].removesuffix("-dirty")) == 40


@pytest.mark.slow
def test_metrics_have_a_row_for_every_round_and_node(finished: tuple[list[str], Path, str]) -> None:
  rows = _rows(finished[1])
  assert [(row["round"], row["node"]) for row in rows] == [
    (index, path) for index in range(2) for path in (".", "law", "medicine")
  ]
  assert [row["tokens"] for row in rows] == [0, 3 * 3 * 16, 2 * 3 * 16, 0, 2 * 3 * 3 * 16, 2 * 2 * 3 * 16]
  exchanged = {"round", "node", "tokens", "bytes_down", "bytes_up"}
  trained = {"steps", "trust", "loss_nats", "loss_nats_first", "loss_nats_last", "received", "personalised"}
  for row in rows:
    if row["node"] == ".":
      assert row.keys() == exchanged | {"attention_up", "accepted_up"}
      assert [sum(layer.values()) for layer in row["attention_up"]] == [pytest.approx(1, abs=1e-5)]
      assert row["bytes_down"] == row["bytes_up"] == 0
    else:
      assert row.keys() - {"residuals_received"} == exchanged | trained | {"attention_down", "accepted_down"}
      assert row["received"].keys() == row["personalised"].keys() == SCORE
      assert row["bytes_down"] > 0 and row["bytes_up"] > 0
      assert row["loss_nats_first"] > row["loss_nats"] > row["loss_nats_last"] > 0  # three words are learnt at once
  first, last = rows[1]["personalised"], rows[4]["personalised"]
  assert last["loss_nats"] < first["loss_nats"]


@pytest.mark.slow
def test_the_summary_adds_up(finished: tuple[list[str], Path, str]) -> None:
  workdir = finished[1]
  rows, summary = _rows(workdir), json.loads((workdir / "summary.json").read_text(), parse_constant=pytest.fail)
  assert summary.keys() == {
    "nodes", "tree", "tokens", "bytes_down", "bytes_up", "seconds", "waiting_for_data_share", "duplicates", "matrix",
    "fairness", "bytes_of_others",
  }
  nodes = summary["nodes"]
  assert list(nodes) == [".", "law", "medicine"]
  assert nodes["."].keys() == {"tokens", "bytes_down", "bytes_up", "subtree"}
  assert nodes["law"].keys() == nodes["."].keys() | {"received", "personalised", "data"}
  for path, node in nodes.items():
    own = [row for row in rows if row["node"] == path]
    assert node["tokens"] == own[-1]["tokens"]
    assert node["bytes_down"] == sum(row["bytes_down"] for row in own)
    assert node["bytes_up"] == sum(row["bytes_up"] for row in own)
  for name in ("tokens", "bytes_down", "bytes_up"):
    assert summary[name] == sum(node[name] for node in nodes.values()) > 0
  leaves = [nodes["law"], nodes["medicine"]]
  for kind in ("received", "personalised"):
    tree = summary["tree"][kind]
    for unit in SCORE:
      assert tree["mean"][unit] == pytest.approx(sum(leaf[kind][unit] for leaf in leaves) / 2)
    assert tree["worst"]["bits_per_byte"] == max(leaf[kind]["bits_per_byte"] for leaf in leaves)
    assert nodes["law"]["subtree"][kind] == {
      "mean": nodes["law"][kind], "worst": {"node": "law"} | nodes["law"][kind]
    }
  assert summary["tree"] == nodes["."]["subtree"]
  assert {"training", "aggregating", "evaluating", "compiling", "saving"} <= summary["seconds"].keys()
  assert min(summary["seconds"].values()) >= 0


@pytest.mark.slow
def test_a_finished_run_is_shown_again_and_refused_to_others(finished: tuple[list[str], Path, str]) -> None:
  arguments, workdir, output = finished
  before = _content(workdir)
  code, again, errors = _main(*arguments)
  assert (code, errors) == (0, "")
  assert "holds this run, finished; --overwrite starts afresh" in again
  assert again[again.index("test split"):] == output[output.index("test split"):]
  message = _refused(2, *arguments, "--node=..batch_size=5")
  assert message.startswith(f"error: --workdir={str(workdir)!r}: expected a new folder or one that holds a run of ")
  assert "node '.'.settings.batch_size: 3 there, 5 here" in message
  assert message.endswith("start afresh with --overwrite")
  assert _content(workdir) == before


@pytest.mark.slow
def test_overwrite_runs_again_to_the_same_result(finished: tuple[list[str], Path, str], tmp_path: Path) -> None:
  arguments, workdir, _ = finished
  other = tmp_path / "other"
  other.mkdir()
  record = json.loads((workdir / "config.json").read_text())
  (other / "config.json").write_text(json.dumps(record | {"config": record["config"] | {"rounds": 99}}))
  (other / "summary.json").write_text("old")
  code, _, errors = _main(*arguments, f"--workdir={other}", "--overwrite")
  assert (code, errors) == (0, "")
  assert json.loads((other / "config.json").read_text()) == record
  assert _rows(other) == _rows(workdir)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_for_good(tmp_path: Path) -> None:
  world, workdir = _texts(tmp_path / "world", "law", "medicine"), tmp_path / "run"
  arguments = ["--config=configs/folder.py", f"--config.federation.folder={world}", f"--workdir={workdir}", *TINY,
               "--config.node.clip_norm=inf", "--config.node.warmup_steps=0", "--node=medicine.local_steps=3",
               "--node=medicine.learning_rate=1e30"]
  message = _refused(1, *arguments)
  # The first step would throw the parameters so far away that their norm overflows.
  assert re.match("error: .*step is not finite.* at node 'medicine', round 1, step 1 of the node's own "
                  r"\(not taken: the node stayed as it was before it\); this was noticed (in|after) round 1, ", message)
  assert f"saved in {workdir / 'checkpoints'}" in message
  assert "(--node=medicine.learning_rate=...)" in message and "start afresh with --overwrite" in message
  assert len(list((workdir / "checkpoints").glob("*/state"))) == 1
  assert not (workdir / "summary.json").exists()
  before = _content(workdir)
  assert _refused(1, *arguments) == message.replace("error: ", "error: this run cannot go on: ", 1)
  assert _content(workdir) == before


def test_text_that_is_too_short_is_named(tmp_path: Path) -> None:
  world = _texts(tmp_path / "world", "law", "medicine/trials")
  (world / "medicine" / "trials" / "valid.txt").write_text("too short")
  message = _refused(2, "--config=configs/folder.py", f"--config.federation.folder={world}",
                     f"--workdir={tmp_path / 'run'}", *TINY)
  assert message == (
    "error: medicine/trials: config.data.sequence_length=16: expected at most 9, because "
    "the valid split has 10 tokens and one window takes 17; set a shorter "
    "config.data.sequence_length, or use more text"
  )
  assert not (tmp_path / "run").exists()


def test_two_processes_in_one_work_directory(tmp_path: Path) -> None:
  world, path = _texts(tmp_path / "world", "law", "medicine"), tmp_path / "run"
  arguments = ["--config=configs/folder.py", f"--config.federation.folder={world}", f"--workdir={path}", *TINY]
  with workdir.held(path):
    message = _refused(2, *arguments)
  assert message.startswith(f"error: --workdir={str(path)!r}: expected a folder that no other process works in ")
  assert [file.name for file in path.iterdir()] == ["lock"]


@pytest.mark.parametrize(("arguments", "message"), [
  (["--config.rouns=3"], "error: --config.rouns: field='rouns': expected one of 'algorithm', 'seed', 'rounds', "
   "'schedule', 'inner_text', 'payload', 'nodes_at_once', 'mesh', 'waiting', 'federation', 'node', 'model', 'data', "
   "'optimizer', 'backbone', 'guards', 'key_layers', 'evaluation', "
   "'checkpoint', 'logging'; did you mean 'rounds'?"),
  (["--config.model.num_layers=2.5"], "error: flag --config.model.num_layers=2.5: invalid literal for int()"),
  (["--config.federation.documents.subset=fr"], "error: Field subset not found on dataclass"),
  (["more"], "error: argument='more': expected only flags, each --NAME=VALUE; see --help"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_mistakes_in_flags_are_bad_input(tmp_path: Path, arguments: list[str], message: str) -> None:
  found = _refused(2, "--config=configs/folder.py", f"--workdir={tmp_path / 'run'}", *arguments)
  assert found.startswith(message)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [[], ["--config.rounds=3"]])
def test_a_missing_config_file_is_bad_input(tmp_path: Path, arguments: list[str]) -> None:
  message = _refused(2, "--config=configs/quickstrt.py", f"--workdir={tmp_path / 'run'}", *arguments)
  assert message == ("error: --config='configs/quickstrt.py': expected a file; did you mean 'configs/quickstart.py'?")


def test_closing_lines_fit_short_and_long_names() -> None:
  score = {"loss_nats": 1.0, "perplexity": 2.718, "bits_per_byte": 1.44}
  tree = {kind: {"mean": score, "worst": score | {"node": "a"}} for kind in ("received", "personalised")}
  counts = {"tokens": 7, "bytes_down": 3_000_000, "bytes_up": 0}
  for path in ("a", "medicine/trials"):
    nodes = {".": counts, path: counts | {"received": score, "personalised": score}}
    summary = counts | {"nodes": nodes, "tree": tree, "seconds": {"waiting_for_data": 1.25}}
    heading, own, mean, *rest = progress.closing_lines(summary, "runs/x").splitlines()
    assert own.split() == [path, "2.718", "2.718", "1.4400"] and mean.split() == ["mean", "2.718", "2.718", "1.4400"]
    assert len(heading) == len(own) == len(mean)
    assert rest == ["seconds: waiting for data 1.2", "sent: 3.0 MB down, 0.0 MB up; see runs/x"]
