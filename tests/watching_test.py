"""Live watching: what TensorBoard and Weights & Biases get to see, after a resume too, and what their failures cost."""

import errno
import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from worldlm_jax import watching
from worldlm_jax.config import LoggingConfig

ROWS = {
  ".": {"round": 0, "node": ".", "bytes_down": 0, "bytes_up": 0},
  "law": {"round": 0, "node": "law", "bytes_down": 7, "bytes_up": 9, "loss_nats": 1.5,
          "received": {"perplexity": 8.0}, "personalised": {"perplexity": 4.0}},
  "law/eu and uk": {"round": 0, "node": "law/eu and uk", "bytes_down": 1, "bytes_up": 2,
                    "personalised": {"perplexity": 6.0}},
}
VALUES = {
  "perplexity_received/law": 8.0, "perplexity_personalised/law": 4.0, "perplexity_personalised/law/eu and uk": 6.0,
  "tree_mean/perplexity_received": 8.0, "tree_mean/perplexity_personalised": 5.0, "loss_nats/law": 1.5,
  "bytes_down/.": 0, "bytes_down/law": 7, "bytes_down/law/eu and uk": 1,
  "bytes_up/.": 0, "bytes_up/law": 9, "bytes_up/law/eu and uk": 2,
}


def _events(file: Path) -> Iterator[Event]:
  """The complete records of an event file: length, its checksum, content, its checksum."""
  content = file.read_bytes()
  while len(content) >= 12 and len(content) >= 16 + (size := struct.unpack("<Q", content[:8])[0]):
    yield Event.FromString(content[12 : 12 + size])
    content = content[16 + size :]


def _points(folder: Path) -> dict[str, list[tuple[int, float]]]:
  """What TensorBoard shows of a folder: a session that starts at a step takes back what was said of it and later."""
  shown: dict[str, list[tuple[int, float]]] = {}
  for file in sorted(folder.iterdir()):
    for i, event in enumerate(_events(file)):
      assert (event.file_version == "brain.Event:2") is (i == 0)
      if event.session_log.status == SessionLog.START:
        shown = {tag: [point for point in points if point[0] < event.step] for tag, points in shown.items()}
      for value in event.summary.value:
        shown.setdefault(value.tag, []).append((event.step, value.simple_value))
  return shown


def _watchers(workdir: Path, first_round: int = 0, told: list[str] | None = None, **logging: Any) -> watching.Watchers:
  workdir.mkdir(exist_ok=True)
  report = (told if told is not None else []).append
  return watching.Watchers(LoggingConfig(**logging), workdir, {"rounds": 3}, first_round, {"training": 1.0}, report)


def test_a_round_as_numbers() -> None:
  assert watching.scalars(ROWS, {"training": 2.5}) == VALUES | {"seconds/training": 2.5}


def test_nothing_scored_has_no_mean() -> None:
  assert set(watching.scalars({".": ROWS["."]}, {})) == {"bytes_down/.", "bytes_up/."}


def test_tensorboard_gets_every_round_with_its_own_seconds(tmp_path: Path) -> None:
  told: list[str] = []
  watchers = _watchers(tmp_path, told=told)
  watchers.round(0, ROWS, {"training": 4.0, "saving": 0.5})
  live = _points(tmp_path / "tensorboard")  # nothing waits for the end
  assert {tag: points for tag, points in live.items() if not tag.startswith("seconds/")} == {
    tag: [(0, value)] for tag, value in VALUES.items()
  }
  watchers.round(1, ROWS, {"training": 6.0, "saving": 0.5})
  watchers.close()
  watchers.close()
  found = _points(tmp_path / "tensorboard")
  assert found["seconds/training"] == [(0, 3.0), (1, 2.0)] and found["seconds/saving"] == [(0, 0.5), (1, 0.0)]
  assert found["loss_nats/law"] == [(0, 1.5), (1, 1.5)]
  assert told == []


def test_a_round_that_is_run_again_is_shown_once(tmp_path: Path) -> None:
  killed: list[watching.Watchers] = []  # not closed before the others begin

  def rounds(*indices: int) -> None:
    killed.append(_watchers(tmp_path, indices[0]))
    for index in indices:
      killed[-1].round(index, ROWS, {"training": float(index)})

  rounds(0, 1, 2)
  newest = max((tmp_path / "tensorboard").iterdir())
  newest.write_bytes(newest.read_bytes()[:-5])  # in the middle of writing
  rounds(1, 2)  # within the same second: a file of its own all the same
  rounds(2, 3)
  found = _points(tmp_path / "tensorboard")
  assert [step for step, _ in found["loss_nats/law"]] == [0, 1, 2, 3]
  assert len(list((tmp_path / "tensorboard").iterdir())) == 3
  for watchers in killed:
    watchers.close()


def test_a_clock_that_is_put_back_changes_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  for start, day in enumerate((2, 3, 1)):
    monkeypatch.setattr(time, "time", lambda day=day: 1.7e9 + 86_400 * day)
    watchers = _watchers(tmp_path, start)
    for index in (start, start + 1):
      watchers.round(index, ROWS, {"training": 2.0})
    watchers.close()
  assert [step for step, _ in _points(tmp_path / "tensorboard")["loss_nats/law"]] == [0, 1, 2, 3]


def test_what_is_not_finite_can_be_shown(tmp_path: Path) -> None:
  watchers = _watchers(tmp_path)
  for index, value in enumerate((1e300, math.inf, math.nan)):
    watchers.round(index, {"a": {"received": {"perplexity": value}}}, {})
  watchers.close()
  points = _points(tmp_path / "tensorboard")["perplexity_received/a"]
  assert points[:2] == [(0, math.inf), (1, math.inf)] and math.isnan(points[2][1])


def test_switched_off_writes_nothing(tmp_path: Path) -> None:
  watchers = _watchers(tmp_path, tensorboard=False)
  watchers.round(0, ROWS, {})
  watchers.close()
  assert list(tmp_path.iterdir()) == []


class _Wandb(types.ModuleType):
  """Stands in for the package: keeps what it is told, and fails on demand."""

  class Settings:
    def __init__(self, **settings: Any):
      assert settings["console"] == "off"  # it must not take the screen

  def __init__(self) -> None:
    super().__init__("wandb")
    self.begun: list[dict[str, Any]] = []
    self.logged: list[tuple[int, dict[str, float]]] = []
    self.fails = ""
    self.finished = 0

  def init(self, **arguments: Any) -> "_Wandb":
    self._maybe("init")
    self.begun.append(arguments)
    return self

  def log(self, values: dict[str, float], step: int) -> None:
    self._maybe("log")
    self.logged.append((step, values))

  def finish(self) -> None:
    self._maybe("finish")
    self.finished += 1

  def _maybe(self, place: str) -> None:
    if self.fails == place:
      raise ConnectionError("no route\nto host")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> _Wandb:
  module = _Wandb()
  monkeypatch.setitem(sys.modules, "wandb", module)
  return module


def test_weights_and_biases_goes_on_with_the_same_id(tmp_path: Path, wandb: _Wandb) -> None:
  for first in (0, 2):
    watchers = _watchers(tmp_path / "runs-7", first, wandb_project="worlds", tensorboard=False)
    watchers.round(first, ROWS, {"training": 1.0})
    watchers.close()
  one, two = wandb.begun
  assert one["project"] == "worlds" and one["name"] == "runs-7" and one["config"] == {"rounds": 3}
  assert one["dir"] == str(tmp_path / "runs-7")
  assert one["id"] == two["id"] and one["resume"] == two["resume"] == "allow"
  assert wandb.logged == [(first, VALUES | {"seconds/training": 0.0}) for first in (0, 2)]
  assert wandb.finished == 2
  _watchers(tmp_path / "another", wandb_project="worlds", tensorboard=False)
  assert wandb.begun[2]["id"] != one["id"]


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_failure_is_said_once_and_the_others_go_on(tmp_path: Path, wandb: _Wandb, place: str) -> None:
  wandb.fails = place
  told: list[str] = []
  watchers = _watchers(tmp_path, told=told, wandb_project="worlds")
  for index in range(3):
    watchers.round(index, ROWS, {})
  watchers.close()
  assert told == [
    "warning: Weights & Biases shows nothing more of this run, which goes on (ConnectionError: no route to host)"
  ]
  assert [step for step, _ in _points(tmp_path / "tensorboard")["loss_nats/law"]] == [0, 1, 2]


def test_a_full_disk_costs_no_more_than_the_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  told: list[str] = []
  writers: list[Any] = []

  def full(self: Any, event: Event) -> None:
    writers.append(self)
    if event.HasField("summary"):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(watching.EventsWriter, "write_event", full)
  watchers = _watchers(tmp_path, told=told)
  for index in range(20):
    watchers.round(index, ROWS, {})
  writers[0].close()
  assert told == [
    "warning: TensorBoard shows nothing more of this run, which goes on (OSError: No space left on device)"
  ]


def test_a_missing_package_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
  watching.check(LoggingConfig())
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  watching.check(LoggingConfig())
  with pytest.raises(ValueError) as caught:
    watching.check(LoggingConfig(wandb_project="worlds"))
  assert str(caught.value) == (
    "config.logging.wandb_project='worlds': expected the package wandb to be installed; pip install "
    "'worldlm_jax[wandb]', or leave it empty"
  )


_SCRIPT = """
import sys
from pathlib import Path
from worldlm_jax import config, watching
told = []
for first in (0, 1):
  watchers = watching.Watchers(config.LoggingConfig(False, "worlds"), Path(sys.argv[1]), {}, first, {}, told.append)
  watchers.round(first, {"a": {"loss_nats": 1.5}}, {})
  watchers.close()
print(told)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the extra [wandb]")
def test_the_real_package_works_without_an_account(tmp_path: Path) -> None:
  environment = os.environ | {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
  done = subprocess.run([sys.executable, "-c", _SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=600,
                        env=environment)
  assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
  identity = (tmp_path / "wandb_id.txt").read_text()
  files = list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/*.wandb"))
  assert files and all(file.stat().st_size for file in files)
  assert json.dumps("loss_nats/a").encode()[1:-1] in b"".join(file.read_bytes() for file in files)
