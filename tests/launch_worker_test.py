"""What keeps a run going on each of several machines, whatever becomes of the connection: launch/worker.sh as it is."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class Machine:
  """A machine on which the repository is installed."""

  def __init__(self, folder: Path):
    self.folder, self.repository = folder, folder / "a repository"
    shutil.copytree(Path(__file__).parent.parent / "launch", self.repository / "launch")
    (self.repository / ".venv/bin").mkdir(parents=True)
    (self.repository / ".venv/bin/python").symlink_to(sys.executable)

  def environment(self) -> dict[str, str]:
    """The variables of a script."""
    return {"PATH": os.environ["PATH"], "HOME": str(self.folder)}

  def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs launch/worker.sh to its end."""
    return subprocess.run(
      ["bash", str(self.repository / "launch/worker.sh"), *arguments], env=self.environment(), capture_output=True,
      stdin=subprocess.DEVNULL, text=True, timeout=600, check=False,
    )


# What a worker runs in these tests: waits for a file, then ends with the code in it; SIGTERM makes it end with 75.
COMMAND = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
end = pathlib.Path(sys.argv[1])
with open(end.with_name("starts"), "a") as starts:
  starts.write("x")
print("begun", sys.argv[2], flush=True)
while not end.exists():
  time.sleep(0.02)
sys.exit(int(end.read_text()))
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Machine]:
  """A machine of the test's own."""
  yield Machine(tmp_path)
  (tmp_path / "end").write_text("0")  # ends what a failed test has left running


def _follow(worker: Machine, *command: str) -> subprocess.Popen[str]:
  arguments = ["bash", str(worker.repository / "launch/worker.sh"), "run", *command]
  pipe = subprocess.PIPE
  return subprocess.Popen(
    arguments, env=worker.environment(), stdout=pipe, stderr=pipe, text=True, start_new_session=True
  )


def _training(worker: Machine, name: str = "it's  two") -> list[str]:
  return [sys.executable, "-c", COMMAND, str(worker.folder / "end"), name]


def _first_line(follower: subprocess.Popen[str]) -> str:
  assert follower.stdout
  line = follower.stdout.readline()
  assert line.startswith("begun"), follower.communicate()
  return line


def test_a_worker_goes_on_when_its_connection_is_lost_and_the_same_command_follows_it_again(worker: Machine) -> None:
  first = _follow(worker, *_training(worker))
  assert _first_line(first) == "begun it's  two\n"
  os.killpg(first.pid, signal.SIGKILL)  # all that hangs on the connection
  first.communicate()
  second = _follow(worker, *_training(worker))
  assert _first_line(second) == "begun it's  two\n"  # from the log
  assert "running: begun" in worker.run("status").stdout
  (worker.folder / "end").write_text("3")
  second.communicate(timeout=600)
  assert second.returncode == 3
  assert (worker.folder / "starts").read_text() == "x"
  assert "ended with exit code 3" in worker.run("status").stdout


def test_a_connection_that_hangs_does_not_keep_what_has_ended_from_beginning_again(worker: Machine) -> None:
  hanging = _follow(worker, *_training(worker))
  _first_line(hanging)
  os.killpg(hanging.pid, signal.SIGSTOP)
  try:
    (worker.folder / "end").write_text("0")
    while not list((worker.repository / ".venv/worker").glob("*/exit_code")):
      time.sleep(0.02)
    assert worker.run("run", *_training(worker)).returncode == 0
    assert (worker.folder / "starts").read_text() == "xx"
  finally:
    os.killpg(hanging.pid, signal.SIGKILL)
    hanging.communicate()


def test_a_worker_that_is_told_to_stop_saves_and_says_so_and_can_begin_again(worker: Machine) -> None:
  follower = _follow(worker, *_training(worker))
  _first_line(follower)
  assert worker.run("stop").returncode == 0
  follower.communicate(timeout=600)
  assert follower.returncode == 75
  (worker.folder / "end").write_text("0")
  assert worker.run("run", *_training(worker)).returncode == 0
  assert (worker.folder / "starts").read_text() == "xx"


def test_a_worker_does_not_train_two_things_at_once(worker: Machine) -> None:
  follower = _follow(worker, *_training(worker))
  _first_line(follower)
  other = worker.run("run", *_training(worker, "another"))
  (worker.folder / "end").write_text("0")
  follower.communicate(timeout=600)
  assert other.returncode == 2 and "something else is running" in other.stderr
  assert (worker.folder / "starts").read_text() == "x"


def test_a_killed_command_has_the_exit_code_of_one(worker: Machine) -> None:
  follower = _follow(worker, *_training(worker))
  _first_line(follower)
  pid, = (worker.repository / ".venv/worker").glob("*/pid")
  os.killpg(int(pid.read_text()), signal.SIGKILL)
  follower.communicate(timeout=600)
  assert follower.returncode == 137
  while "idle" not in (status := worker.run("status").stdout):  # it is noticed a little later
    assert "running" in status
