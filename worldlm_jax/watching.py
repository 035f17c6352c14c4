"""Watching a run live: each round's numbers for TensorBoard, and for Weights & Biases where a project is named.

A number has a tag, `quantity/node`, and the round in `metrics.jsonl` as its step. What a watcher does wrong is
said once and costs the run nothing but the watcher.
"""

import functools
import importlib.util
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from worldlm_jax import checks
from worldlm_jax.config import LoggingConfig
from worldlm_jax.data import reading


class Watcher(Protocol):
  """Takes in what happens."""

  def round(self, index: int, values: Mapping[str, float]) -> None:
    """Shows the numbers of a finished round, by tag. A resumed run may come with rounds that were there before."""

  def close(self) -> None:
    """Writes what is left to write."""


def check(logging: LoggingConfig) -> None:
  """Raises `InputError` where a watcher is wanted whose package is missing."""
  checks.require(not logging.wandb_project or importlib.util.find_spec("wandb") is not None,
                 "config.logging.wandb_project", logging.wandb_project, "the package wandb to be installed",
                 "pip install 'worldlm_jax[wandb]', or leave it empty")


class Watchers:
  """The watchers of a run, as one.

  Args:
    logging: which ones.
    workdir: of the run; they keep their files in it.
    config: of the run, as plain JSON values, for the record.
    first_round: of those to come; what was shown of it and later ones before is replaced or left as it is.
    seconds: the run's so far, by activity.
    report: is told what goes wrong.
  """

  def __init__(self, logging: LoggingConfig, workdir: Path, config: Mapping[str, Any], first_round: int,
               seconds: Mapping[str, float], report: Callable[[str], None]):
    self._report, self._seconds = report, dict(seconds)
    self._open: dict[str, Watcher] = {}
    if logging.tensorboard:
      self._begin("TensorBoard", lambda: TensorBoard(workdir / "tensorboard", first_round))
    if logging.wandb_project:
      self._begin("Weights & Biases", lambda: WeightsAndBiases(logging.wandb_project, workdir, config))

  def round(self, index: int, rows: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float]) -> None:
    """Shows a finished round: its rows by path (see `records`), and the seconds of the run so far by activity."""
    taken = {name: value - self._seconds.get(name, 0.0) for name, value in seconds.items()}
    self._seconds = dict(seconds)
    values = scalars(rows, taken)
    for name, watcher in list(self._open.items()):
      self._guarded(name, functools.partial(watcher.round, index, values))

  def close(self) -> None:
    """Closes all. Does nothing the second time."""
    for name, watcher in list(self._open.items()):
      self._guarded(name, watcher.close)
    self._open.clear()

  def _begin(self, name: str, make: Callable[[], Watcher]) -> None:
    watcher = self._guarded(name, make)
    if watcher is not None:
      self._open[name] = watcher

  def _guarded(self, name: str, call: Callable[[], Any]) -> Any:
    try:
      return call()
    except Exception as error:  # networks, disks and other people's libraries have errors of all kinds
      self._open.pop(name, None)
      self._report(f"warning: {name} shows nothing more of this run, which goes on ({reading.reason(error)})")
      return None


def scalars(rows: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float]) -> dict[str, float]:
  """A round as numbers by tag. `tree_mean` is over the nodes that were scored in this round."""
  found: dict[str, float] = {}
  for kind in ("received", "personalised"):
    scores = {path: row[kind]["perplexity"] for path, row in rows.items() if kind in row}
    found |= {f"perplexity_{kind}/{path}": score for path, score in scores.items()}
    if scores:
      found[f"tree_mean/perplexity_{kind}"] = float(np.mean(list(scores.values())))
  for name in ("loss_nats", "bytes_down", "bytes_up"):
    found |= {f"{name}/{path}": row[name] for path, row in rows.items() if name in row}
  return found | {f"seconds/{name}": value for name, value in seconds.items()}


class TensorBoard:
  """Event files, one for each time that the run was started.

  They begin with a note that makes TensorBoard forget what earlier files say about `first_round` and later
  ones, which a run that was stopped goes through again. Writing is synchronous: the asynchronous writers wait
  forever once their thread has met a full disk.
  """

  def __init__(self, folder: Path, first_round: int):
    folder.mkdir(exist_ok=True)
    # TensorBoard reads files in the order of their names, into which the writer puts the time; but clocks are put back.
    self._events = EventsWriter(str(folder / f"start{len(list(folder.iterdir())):06}"))
    start = SessionLog(status=SessionLog.START)
    self._events.write_event(Event(wall_time=time.time(), step=first_round, session_log=start))
    self._events.flush()

  def round(self, index: int, values: Mapping[str, float]) -> None:
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    self._events.write_event(Event(wall_time=time.time(), step=index, summary=summary))
    self._events.flush()

  def close(self) -> None:
    self._events.close()


class WeightsAndBiases:
  """A run of Weights & Biases, which keeps its id in the work directory and so goes on when this one is resumed.

  Without an account, `WANDB_MODE=offline` writes to workdir/wandb, and `wandb sync` sends it later.
  """

  def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]):
    import wandb  # takes a second

    record = workdir / "wandb_id.txt"
    if not record.exists():
      record.write_text(secrets.token_hex(6), encoding="utf-8")
    self._run = wandb.init(
      project=project, id=record.read_text(encoding="utf-8"), name=workdir.absolute().name, dir=str(workdir),
      config=dict(config), resume="allow",
      # The screen is the reporter's; and what a slow network has not taken at the end stays in the folder.
      settings=wandb.Settings(console="off", quiet=True, finish_timeout=60),
    )

  def round(self, index: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=index)  # a round that is there already stays as it is: it is the same

  def close(self) -> None:
    self._run.finish()
