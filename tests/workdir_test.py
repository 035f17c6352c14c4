"""Whose a work directory is: resumed by the same run, refused to any other, and never robbed of foreign files."""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from worldlm_jax import config as c, federation, workdir

HOLDER = """
import pathlib, sys, time
from worldlm_jax import workdir
with workdir.held(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""


def _describe(folder: str = "texts", digest: str = "1234", rounds: int = 3, **settings: Any) -> dict[str, Any]:
  root = c.Node("world", None, [c.Node("a", c.Files(f"{folder}/a"), settings=settings),
                                c.Node("b", c.Files(f"{folder}/b"))])
  config = c.Config(rounds=rounds, federation=c.FederationConfig(root=root))
  return workdir.describe(config, federation.resolve(config), {"a": digest, "b": "5678"})


def _run_in(path: Path) -> dict[str, str]:
  """Claims the folder, and puts there what a run writes."""
  workdir.claim(path, _describe(), overwrite=False)
  for name in ("checkpoints/10000/state", "damaged/20000/state", "tensorboard/events", "metrics.jsonl",
               "summary.json", "stopped.json", "wandb_id.txt"):
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(name)
  return _content(path)


def _content(path: Path) -> dict[str, str]:
  return {str(file.relative_to(path)): file.read_text() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_fresh_folder_is_made_and_recorded(tmp_path: Path) -> None:
  path = tmp_path / "runs" / "first"
  workdir.claim(path, _describe(clip_norm=float("inf")), overwrite=False)
  there = json.loads((path / "config.json").read_text(), parse_constant=pytest.fail)
  assert there["config"]["rounds"] == 3 and there["config"]["model"]["d_model"] == 96
  assert there["nodes"]["."] | {"settings": {}} == {
    "name": "world", "parent": None, "settings": {}, "data": None, "digest": None
  }
  assert there["nodes"]["a"]["settings"]["clip_norm"] == "inf"
  files = {"kind": "Files", "path": "texts/a", "text_field": "text", "node_field": ""}
  assert there["nodes"]["a"]["data"] == files
  assert there["nodes"]["a"]["digest"] == "1234"
  assert {"jax", "flax", "python"} <= there["versions"].keys() and there["devices"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
  workdir.claim(tmp_path, _describe(), overwrite=False)
  assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("description", [
  _describe(), _describe(clip_norm=1.0), pytest.param(_describe("moved/elsewhere"), id="the folder moved"),
])
def test_the_same_run_is_resumed(tmp_path: Path, description: dict[str, Any]) -> None:
  before = _run_in(tmp_path)
  workdir.claim(tmp_path, description, overwrite=False)
  assert _content(tmp_path) == before


def test_what_changes_no_result_may_change(tmp_path: Path) -> None:
  config = c.Config(federation=c.FederationConfig(root=c.Node("world", c.Files("texts"))))
  workdir.claim(tmp_path, workdir.describe(config, federation.resolve(config), {}), overwrite=False)
  config.nodes_at_once, config.checkpoint.keep_last, config.logging.wandb_project = 5, 7, "worlds"
  workdir.claim(tmp_path, workdir.describe(config, federation.resolve(config), {}), overwrite=False)


@pytest.mark.parametrize(("description", "differences"), [
  (_describe(rounds=5), "config.rounds: 3 there, 5 here"),
  (_describe(local_steps=7), "node 'a'.settings.local_steps: 20 there, 7 here"),
  (_describe(clip_norm=float("inf")), "node 'a'.settings.clip_norm: 1.0 there, \"inf\" here"),
  (_describe(digest="9999"), "node 'a'.text, by its digest: \"1234\" there, \"9999\" here"),
  (_describe(digest="9999", rounds=5),
   "config.rounds: 3 there, 5 here; node 'a'.text, by its digest: \"1234\" there, \"9999\" here"),
])
def test_another_run_is_refused_and_told_where_it_differs(
  tmp_path: Path, description: dict[str, Any], differences: str
) -> None:
  before = _run_in(tmp_path)
  with pytest.raises(ValueError) as caught:
    workdir.claim(tmp_path, description, overwrite=False)
  assert str(caught.value) == (
    f"--workdir={str(tmp_path)!r}: expected a new folder or one that holds a run of this configuration; it differs in: "
    f"{differences}. Choose another folder, or start afresh with --overwrite"
  )
  assert _content(tmp_path) == before


def test_many_differences_are_counted(tmp_path: Path) -> None:
  _run_in(tmp_path)
  other = _describe()
  for node in other["nodes"].values():
    node["settings"] |= {name: -1 for name in ("local_steps", "batch_size", "warmup_steps", "learning_rate")}
  with pytest.raises(ValueError, match=r"node 'a'\.settings\.warmup_steps: .* and 4 more\. Choose"):
    workdir.claim(tmp_path, other, overwrite=False)


@pytest.mark.parametrize("rounds", [3, 5])
def test_overwrite_replaces_a_run_and_leaves_foreign_files(tmp_path: Path, rounds: int) -> None:
  _run_in(tmp_path)
  (tmp_path / "plots").mkdir()
  (tmp_path / "plots" / "loss.svg").write_text("mine")
  workdir.claim(tmp_path, _describe(rounds=rounds), overwrite=True)
  content = _content(tmp_path)
  assert content.keys() == {"config.json", "plots/loss.svg"}
  assert json.loads(content["config.json"])["config"]["rounds"] == rounds


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("files", [
  {"thesis.tex": "years of work"},
  {"checkpoints/best": "weights"},
  {"config.json": '{"architectures": ["Llama"]}', "checkpoints/best": "weights"},
  {"config.json": "[]", "summary.json": "{}"},
  {"config.json": "not json", "metrics.jsonl": "rows"},
])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path, files: dict[str, str], overwrite: bool) -> None:
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=r"--workdir='.*': expected a new or empty folder, .* no config.json of a run\); "
                                       "choose another folder; --overwrite does not delete what is not a run's"):
    workdir.claim(tmp_path, _describe(), overwrite=overwrite)
  assert _content(tmp_path) == files


def test_what_a_kill_while_claiming_leaves_does_not_stand_in_the_way(tmp_path: Path) -> None:
  (tmp_path / "config.json.new").write_text('{"config": {')
  workdir.claim(tmp_path, _describe(), overwrite=False)
  assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_folder(tmp_path: Path, overwrite: bool) -> None:
  file = tmp_path / "file"
  file.write_text("mine")
  with pytest.raises(ValueError, match=r"--workdir='.*file': expected a folder"):
    workdir.claim(file, _describe(), overwrite=overwrite)
  assert file.read_text() == "mine"


def test_space_for_the_checkpoints_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  free = 0
  usage = namedtuple("usage", "total used free")
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, free))
  config = c.CheckpointConfig(keep_last=3, keep_best=1)  # and one more while it is written: 5
  free = 10 * 10**9 + 1
  workdir.check_space(tmp_path, 2 * 10**9, config)
  free = 10 * 10**9
  with pytest.raises(ValueError) as caught:
    workdir.check_space(tmp_path, 2 * 10**9, config)
  assert str(caught.value) == (
    f"--workdir={str(tmp_path)!r}: expected a disk with 10.00 GB free for checkpoints (2.00 GB each); 10.00 GB are "
    "free: make room, choose another folder, or set config.checkpoint.keep_last or keep_best lower"
  )
  for number in range(7):  # those that are there take none of the free space; there is always one more to write
    (tmp_path / "checkpoints" / str(number)).mkdir(parents=True)
    free = max(1, 5 - number - 1) * 2 * 10**9 + 1
    workdir.check_space(tmp_path, 2 * 10**9, config)
    free -= 1
    with pytest.raises(ValueError, match="GB are free: make room"):
      workdir.check_space(tmp_path, 2 * 10**9, config)


def test_a_folder_is_held_by_one_process_until_it_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  path = tmp_path / "runs" / "first"
  with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as process:
    try:
      assert process.stdout is not None and process.stdout.readline() == "held\n"
      with monkeypatch.context() as patch, pytest.raises(ValueError) as caught:
        patch.setattr(time, "sleep", lambda _: pytest.fail("it is to be said at once"))
        with workdir.held(path):
          pass
    finally:
      process.kill()
  assert str(caught.value) == (
    f"--workdir={str(path)!r}: expected a folder that no other process works in (process {process.pid} on "
    f"{platform.node()} does); wait until it has ended, or choose another folder"
  )
  for _ in range(2):
    with workdir.held(path):
      assert (path / "lock").read_text() == f"process {os.getpid()} on {platform.node()}\n"
      workdir.claim(path, _describe(), overwrite=True)  # leaves it held
      with pytest.raises(ValueError, match="no other process works in"), workdir.held(path):
        pass


def test_a_process_on_another_machine_may_take_a_while_to_be_gone(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  waited: list[float] = []
  monkeypatch.setattr(time, "sleep", waited.append)
  monkeypatch.setattr(time, "monotonic", lambda: sum(waited))
  with (tmp_path / "lock").open("w") as file:
    file.write("process 7 on elsewhere\n")
    file.flush()
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=r"\(process 7 on elsewhere does\)"), workdir.held(tmp_path):
      pass
    assert sum(waited) == workdir.SECONDS_TO_LET_GO
    monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(file, fcntl.LOCK_UN))
    waited.clear()
    with workdir.held(tmp_path):
      assert "elsewhere" not in (tmp_path / "lock").read_text()


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def none(*_: Any) -> None:
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(fcntl, "flock", none)
  with workdir.held(tmp_path), workdir.held(tmp_path):
    pass


def test_a_foreign_folder_is_not_held(tmp_path: Path) -> None:
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(ValueError, match="expected a new or empty folder"), workdir.held(tmp_path):
    pass
  assert _content(tmp_path) == {"thesis.tex": "years of work"}


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  workdir.check_writable(tmp_path)
  workdir.check_writable(tmp_path / "runs" / "first")
  file = tmp_path / "file"
  file.write_text("mine")
  file.chmod(0o755)
  for path in (file, file / "first"):
    with pytest.raises(ValueError, match=rf"--workdir='{path}': expected a folder that can be written to; {file} is"):
      workdir.check_writable(path)
  monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)  # as on a read-only file system
  with pytest.raises(ValueError, match=rf"expected a folder that can be written to; {tmp_path} is none; choose"):
    workdir.check_writable(tmp_path / "runs" / "first")
  assert [path.name for path in tmp_path.iterdir()] == ["file"]
