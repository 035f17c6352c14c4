"""Runs every entry of a comparison with every seed, skips what is done, and writes what they say together."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import filelock

from worldlm_jax import (
  checks,
  comparison_tables,
  config as config_lib,
  entries as entries_lib,
  federation as federation_lib,
  metrics,
  model,
  progress,
  records,
  train,
  trees,
  verdicts,
  workdir as workdir_lib,
)
from worldlm_jax.data import batches as batches_lib, tokenizer as tokenizer_lib
from worldlm_jax.entries import Planned

SECONDS_BETWEEN_LOOKS = 2.0  # at runs that another process has taken
# What may change after a run is done, since it changes no result: see workdir.claim.
WITHOUT_EFFECT = ("checkpoint", "logging", "nodes_at_once")


def run(comparison: config_lib.Comparison, workdir: str | Path, *, only: Sequence[str] = (), overwrite: bool = False,
        command: str = "", reporters: Callable[[], progress.Reporter] = progress.Silent) -> dict[str, Any] | None:
  """Trains every entry with every seed, one run after the other, or goes on where that stopped.

  Several processes may be given the same folder: each takes runs that nobody else has taken, waits for the rest,
  and writes the results.

  Args:
    comparison: what to compare.
    workdir: gets runs/<entry>/seed<k>/, the folder of each run, and comparison.json and comparison.md.
    only: names of entries; the others are not run, and are in the results if they are done.
    overwrite: starts those runs afresh that are there.
    command: how this was called, for the record.
    reporters: makes what shows the progress of a run.

  Returns:
    The content of comparison.json; None where `only` left out the entry that the others are held against.

  Raises:
    checks.InputError: bad input, found before anything runs, or runs that were not given the same.
    train.Interrupted: SIGTERM or SIGINT came; everything is saved.
    OSError: the disk is full.
  """
  with _stoppable():
    return _Comparison(comparison, Path(workdir), only, overwrite, command, reporters).to_the_end()


class _Comparison:
  def __init__(self, comparison: config_lib.Comparison, workdir: Path, only: Sequence[str], overwrite: bool,
               command: str, reporters: Callable[[], progress.Reporter]):
    self.comparison, self.workdir, self.command, self.reporters = comparison, workdir, command, reporters
    self.say = reporters().message
    self.all = entries_lib.plan(comparison)
    names = entries_lib.chosen(comparison, only)
    self.planned = [planned for planned in self.all if planned.entry in names]
    checks.require(not workdir.exists() or workdir.is_dir(), "--workdir", str(workdir), "a folder")
    checks.require(not (workdir / "config.json").exists(), "--workdir", str(workdir),
                   "the folder of a comparison, or a new one (it holds a single run)", "choose another folder")
    base = self.all[0].config
    self.federation = federation_lib.resolve(base)
    self.tokenizer = tokenizer_lib.load(base.data.tokenizer)
    self.texts = batches_lib.load(
      [(m.path, m.data) for m in self.federation.members if m.data is not None], base.data, self.tokenizer, self.say,
      {m.path: m.settings.max_train_bytes for m in self.federation.members},
    )
    self.paths = [m.path for m in self.federation.subtree(self.federation.root.path) if m.path in self.texts]
    self.pace = _Pace()
    self.done: set[Planned] = set()
    self.to_redo = {planned for planned in self.planned if overwrite and self._path(planned).exists()}
    for planned in self.to_redo:
      with self._taken(planned) as ours:
        checks.require(ours, "--overwrite", True, "to be alone (another process runs this comparison)",
                       "leave it out, to share the work with the other process")
    for planned in self.planned:
      if planned not in self.to_redo:
        self._check_same_run(planned)
      if self._is_done(planned):
        self._note_pace(planned)
    for seed in comparison.seeds:
      self._check_fair(seed)

  def to_the_end(self) -> dict[str, Any] | None:
    """Runs what is left and writes the results."""
    self._run_all()
    for seed in self.comparison.seeds:
      self._check_fair(seed)
    complete = {
      entry.name for entry in self.comparison.entries
      if all(self._is_done(planned) for planned in self.all if planned.entry == entry.name)
    }
    if self.comparison.own not in complete:
      self.say(f"no results yet: the others are held against {self.comparison.own!r}, whose runs are not done")
      return None
    content = self._results([planned for planned in self.all if planned.entry in complete])
    with filelock.FileLock(self._lock_file("results")):
      metrics.write_json(self.workdir / "comparison.json", content)
      (self.workdir / "comparison.md").write_text(comparison_tables.page(content), encoding="utf-8")
    return content

  def _run_all(self) -> None:
    told = False
    while left := [planned for planned in self.planned if not self._is_done(planned)]:
      if not any(self._run_if_free(planned) for planned in left):
        if not told:
          self.say(f"waiting for another process, which has {_listed(left)}")
        told = True
        time.sleep(SECONDS_BETWEEN_LOOKS)

  def _run_if_free(self, planned: Planned) -> bool:
    """Whether this process could take the run; it is done then."""
    with self._taken(planned) as ours:
      if ours and not self._is_done(planned):  # meanwhile another process may have
        self._run(planned)
      return ours

  def _run(self, planned: Planned) -> None:
    left = [other for other in self.planned if not self._is_done(other)]
    label = f"run {len(self.planned) - len(left) + 1}/{len(self.planned)}"
    folder = self._path(planned)
    self.say(f"{label}: {planned}")
    self.pace.start(len(left) - 1)
    begin = time.perf_counter()
    reporter = _Nested(self.reporters(), label, self.pace)
    try:
      train.run(planned.config, folder, overwrite=planned in self.to_redo, reporter=reporter)
    except FloatingPointError as error:
      if not (folder / "stopped.json").exists():
        raise
      self.say(f"{label}: {planned} diverged, the comparison goes on: {error}")
    except train.Interrupted as stop:
      raise train.Interrupted(f"{label}: {planned}: {stop}") from None
    self.done.add(planned)
    self.to_redo.discard(planned)
    self._check_fair(planned.seed)
    summary = self._read(planned).summary
    if summary is not None:
      self._note_pace(planned, time.perf_counter() - begin)
      mean = summary["tree"]["personalised"]["mean"]["perplexity"]
      self.say(f"{label}: {planned} is done; mean test perplexity, personalised: {comparison_tables.number(mean)}")

  def _note_pace(self, planned: Planned, measured: float = 0.0) -> None:
    """Takes what a run booked, or what was measured if that is more: only a run from its start has its set-up in."""
    booked = verdicts.seconds(self._read(planned))
    if booked is not None:
      self.pace.finished.append(max(booked, measured))

  def _is_done(self, planned: Planned) -> bool:
    """Whether the run has ended, well or not, and was of the same config and text."""
    if planned in self.done or planned in self.to_redo:
      return planned in self.done
    folder = self._path(planned)
    there = workdir_lib.read_record(folder / "config.json")
    if there is None or not ((folder / "summary.json").exists() or (folder / "stopped.json").exists()):
      return False
    digests = {path: node["digest"] for path, node in there["nodes"].items() if node["digest"] is not None}
    same_text = digests == {path: text.digest for path, text in self.texts.items()}
    if same_text and _comparable(there["config"]) == _comparable(config_lib.to_dict(planned.config)):
      self.done.add(planned)
    return planned in self.done

  def _check_same_run(self, planned: Planned) -> None:
    """Refuses a folder whose run differs. What this cannot see, as texts that have moved, is for train.run."""
    record = workdir_lib.read_record(self._path(planned) / "config.json")
    if record is not None:
      there, here = (
        _comparable(config) | {"federation": None} for config in (record["config"], config_lib.to_dict(planned.config))
      )
      found = checks.differences(there, here)
      checks.require(not found, "--workdir", str(self._path(planned)), f"a run of this configuration ({planned})",
                     f"it differs in: {'; '.join(found[:8])}. Choose another folder, or start afresh with --overwrite")

  def _check_fair(self, seed: int) -> None:
    """Holds all finished runs of a seed against the first of them."""
    done = [planned for planned in self.all if planned.seed == seed and self._is_done(planned)]
    found = [(planned, summary) for planned in done if (summary := self._read(planned).summary) is not None]
    for planned, summary in found[1:]:
      first, reference = found[0]
      unequal = verdicts.unequal(reference, summary)
      checks.require(not unequal, "entry", planned.entry, f"the same as entry {first.entry!r} was given",
                     f"{self._path(first)} and {self._path(planned)} differ in {'; '.join(unequal)}, so that comparing "
                     "them would not be fair")

  def _results(self, planned: Sequence[Planned]) -> dict[str, Any]:
    own, alone = self.comparison.own, self.comparison.alone
    names = list(dict.fromkeys(each.entry for each in planned))
    runs = {name: [self._read(each) for each in planned if each.entry == name] for name in names}
    found = verdicts.results(runs, self.paths)
    config = {each.entry: each.config for each in planned}
    # Nobody who could pool the texts would ask; it is a reference, not an option.
    options = {name: entry for name, entry in found.items() if config[name].algorithm != "centralized"}
    overrides = {entry.name: config_lib.to_dict(entry.overrides) for entry in self.comparison.entries}
    arch = model.architecture(self.all[0].config.model, self.tokenizer.vocab_size, None)
    return {
      "own": own, "alone": alone if alone in names else None,
      "entries": {name: {"algorithm": config[name].algorithm, "overrides": overrides[name]} for name in names},
      "seeds": list(self.comparison.seeds), "command": self.command,
      "parameters": trees.num_parameters(model.abstract_params(arch)),
      "nodes": self._nodes(), "results": found,
      "verdicts": [verdicts.verdict(path, options, own, alone if alone in names else None) for path in self.paths],
      "fairness": verdicts.fairness(list(zip(*runs.values(), strict=True))),
      "runs": [
        {"entry": each.entry, "seed": each.seed, "workdir": str(each.folder),
         "seconds": verdicts.seconds(self._read(each)), "stopped": self._reason(each)} for each in planned
      ],
    }

  def _nodes(self) -> dict[str, Any]:
    windows = entries_lib.windows_per_node(self.all[0].config)
    nodes = {}
    for member in self.federation.subtree(self.federation.root.path):
      node: dict[str, Any] = {"parent": member.parent, "name": member.name, "has_text": member.data is not None,
                              "train_tokens": 0, "epochs": 0.0, "floor": None}
      if member.data is not None:
        text = self.texts[member.path]
        steps, batch_size = windows.get(member.path, (0, 0))
        record = records.text_record(text, member.data)
        node |= {"train_tokens": record["train"]["tokens"], "epochs": steps * batch_size / len(text.train),
                 "floor": record.get("floor")}
      nodes[member.path] = node
    return nodes

  def _read(self, planned: Planned) -> verdicts.Run:
    folder = self._path(planned)
    summary = None
    if (folder / "summary.json").exists():
      summary = checks.read_object(folder / "summary.json", "nodes", "tree", "seconds")
    return verdicts.Run(summary, metrics.read_jsonl(folder / "metrics.jsonl"))

  def _reason(self, planned: Planned) -> str | None:
    stopped = self._path(planned) / "stopped.json"
    return checks.read_object(stopped, "reason")["reason"] if stopped.exists() else None

  def _path(self, planned: Planned) -> Path:
    return self.workdir / planned.folder

  def _lock_file(self, name: str) -> Path:
    folder = self.workdir / "locks"
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      checks.fail("--workdir", str(self.workdir), "a folder that can be made", f"{error.strerror}; choose another")
    return folder / f"{name}.lock"

  @contextlib.contextmanager
  def _taken(self, planned: Planned) -> Iterator[bool]:
    """Holds the run's lock; yields False where another process does."""
    lock = filelock.FileLock(self._lock_file(f"{planned.entry}.seed{planned.seed}"))
    try:
      lock.acquire(timeout=0)
    except filelock.Timeout:
      yield False
      return
    try:
      yield True
    finally:
      lock.release()


class _Pace:
  """How long runs take. All runs train on the same number of tokens, so that one tells of the next."""

  def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
    self.finished: list[float] = []  # seconds of each finished run
    self._clock = clock
    self._after = 0
    self._begin = 0.0

  def start(self, runs_after: int) -> None:
    """A run begins, after which there are `runs_after` more."""
    self._after, self._begin = runs_after, self._clock()

  def left(self, done: float, made_here: float) -> str:
    """The time left for all runs, in words; empty where nothing tells.

    Args:
      done: share of the present run that is done.
      made_here: share of it that was done since `start`; 0 where that tells nothing.
    """
    if self.finished:
      usual = sum(self.finished) / len(self.finished)
    elif made_here > 0:
      usual = (self._clock() - self._begin) / made_here
    else:
      return ""
    return f" (all in ~{progress.duration((1 - done + self._after) * usual)})"


class _Nested:
  """Shows a run's progress as one of many."""

  def __init__(self, inner: progress.Reporter, label: str, pace: _Pace):
    self._inner, self._label, self._pace = inner, label, pace
    self._first = self._total = 0
    self.round, self.message, self.stop = inner.round, inner.message, inner.stop

  def start(self, title_lines: list[str], total_rounds: int, first_round: int) -> None:
    self._first, self._total = first_round, total_rounds
    self._inner.start(title_lines, total_rounds, first_round)

  def phase(self, round_index: int, text: str, fraction: float) -> None:
    done = (round_index + fraction) / self._total
    # The first round compiles, so that it alone would tell of far too long a time.
    left = self._pace.left(done, done - self._first / self._total if round_index > self._first else 0.0)
    self._inner.phase(round_index, f"{self._label}{left}: {text}", fraction)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
  """SIGTERM and SIGINT end the comparison where no run handles them: nothing is lost between two runs."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(number: int, _: Any) -> NoReturn:
    raise train.Interrupted(f"stopped by {signal.Signals(number).name}; everything is saved, run the same command "
                            "again to resume")

  before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
  """What of a config decides on the results."""
  return {name: value for name, value in config.items() if name not in WITHOUT_EFFECT} | {
    "data": {name: value for name, value in config["data"].items() if name != "cache"}
  }


def _listed(left: Sequence[Planned]) -> str:
  return "; ".join(map(str, left[:3])) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
