"""The books of a run: what came of each phase, entered in order as soon as the devices have got that far.

The round loop hands phases to the devices without waiting for them, and puts here what they will have to say, as
arrays that are on their way to the host. An entry is made once so many later ones are outstanding (`OUTSTANDING`): the
devices always have work ahead of them, and the host does not run away from them, so that a signal, or a loss that is
not finite, is acted upon a few phases later, and few batches wait in the devices' memory. `settle` makes all entries;
only then do the books say what the arrays of the state are, which is what a checkpoint needs.
"""

import collections
import dataclasses
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np

from worldlm_jax import (
  checks,
  distributed,
  engine as engine_lib,
  fairness,
  local,
  progress,
  receipts as receipts_lib,
  records,
  schedule,
)
from worldlm_jax.data.evaluation import Evaluation
from worldlm_jax.federation import Federation, Member
from worldlm_jax.privacy import policy
from worldlm_jax.scoring import Score
from worldlm_jax.texts import Texts

OUTSTANDING = 8  # results that may be outstanding; a phase has two or three


@dataclasses.dataclass
class Progress:
  """Where the run stands: with the arrays, all that a checkpoint has to hold. Plain JSON values."""

  round: int = 0
  step: int = 0  # of the round's steps, the next to do
  positions: dict[str, int] = dataclasses.field(default_factory=dict)  # optimizer steps made, by node
  tokens: dict[str, int] = dataclasses.field(default_factory=dict)  # trained on, by node
  windows: int = 0  # fingerprint of the windows trained on; see `fairness`
  rows: records.Rows = dataclasses.field(default_factory=dict)  # of the unfinished round
  receipts: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of the unfinished round; see receipts.py
  losses: dict[str, float] = dataclasses.field(default_factory=dict)  # last personalised valid loss, by node
  best: dict[str, float] = dataclasses.field(default_factory=dict)  # valid loss of the model that `test` scores
  test: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # personalised, by node
  private: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # [releases, steps of DP-SGD], by node
  bytes: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # [down, up] so far, by node
  rejected: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # updates, by node and reason
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def progress_of(record: dict[str, Any]) -> Progress:
  """What a checkpoint says of where the run stands. Raises `InputError` where it is not what a run writes."""
  blank = vars(Progress())
  wrong = [name for name, value in record.items() if name not in blank or not isinstance(value, type(blank[name]))]
  checks.require(not wrong, "checkpoint: record", wrong, "the fields that a run writes",
                 "resume with the version that wrote it (config.json names it), or start afresh with --overwrite")
  return Progress(**record)


class Failure(NamedTuple):
  """What was not finite, and where."""

  what: str
  node: str
  round: int
  where: str


class Clock:
  """Divides all the time that passes among activities.

  What the devices do is measured where it ends: a lap goes from one result's coming to the next one's, whenever
  the host looks at it. As long as the host is ahead of them, that is what the devices took; where it is not, the host's
  own work is in it.
  """

  def __init__(self, seconds: dict[str, float]):
    self.seconds = seconds  # by activity; added to
    self.restart()

  def restart(self) -> None:
    """Begins a lap; what has passed since the last one is nobody's."""
    self._begin, self._apart = time.perf_counter(), 0.0

  def lap(self, name: str, end: float | None = None) -> None:
    """Books what has passed between the last lap's end and `end` (now) under `name`, but for what was booked apart."""
    end = max(self._begin, time.perf_counter() if end is None else end)
    apart = min(self._apart, end - self._begin)  # what is more happens in a later lap
    self._book(name, end - self._begin - apart)
    self._begin, self._apart = end, self._apart - apart

  def apart(self, name: str, seconds: float) -> None:
    """Books seconds that are in no lap under a name of their own."""
    self._book(name, seconds)
    self._apart += seconds

  def _book(self, name: str, seconds: float) -> None:
    self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class _Entry(NamedTuple):
  activity: str  # what the time is booked under until the results have come
  results: Any  # arrays; see `distributed.snapshot`
  make: Callable[[Any], None]
  came: futures.Future[float]  # when they have, by `time.perf_counter`


def _wait_for(results: Any) -> float:
  jax.block_until_ready(results)
  return time.perf_counter()


class Ledger:
  """Makes the entries of a run in `now`.

  Args:
    now: where the run stands.
    federation: the tree.
    texts: of all nodes.
    engine: whose results they are.
    exchanges: turns logs of the exchange into rows.
    receipts: and into receipts.
    show: is given each finished round: its index, what the screen shows of it, and its seconds.
  """

  def __init__(self, now: Progress, federation: Federation, texts: Texts, engine: engine_lib.Engine,
               exchanges: records.Exchanges, receipts: receipts_lib.Receipts,
               show: Callable[[int, list[progress.Row], float], None]):
    self.now, self.clock = now, Clock(now.seconds)
    self.failure: Failure | None = None  # the first thing that was not finite
    self.told_to_stop = False  # whether some process had been when the last phase entered was handed out
    self._federation, self._texts, self._engine, self._exchanges = federation, texts, engine, exchanges
    self._receipts = receipts
    self._show = show
    self._outstanding: collections.deque[_Entry] = collections.deque()
    self._waiting = futures.ThreadPoolExecutor(1, "results")  # sees them come while the host does something else
    self._windows = 0  # of this process, not yet in `now.windows`
    self._compiled = engine.compile_seconds
    self._round_began = time.perf_counter()

  def start(self) -> None:
    """Time counts from now on."""
    self.clock.restart()
    self._round_began = time.perf_counter()

  def settle(self, most: int = 0) -> None:
    """Makes entries, the oldest first, until no more than `most` are outstanding."""
    while len(self._outstanding) > most:
      entry = self._outstanding.popleft()
      came, results = entry.came.result(), jax.device_get(entry.results)
      if entry.activity:
        self.clock.lap(entry.activity, came)
      entry.make(results)

  def close(self) -> None:
    """Waits for nothing more; what is outstanding is lost."""
    self._waiting.shutdown(wait=False, cancel_futures=True)

  def record(self) -> dict[str, Any]:
    """`now` as plain JSON, after `settle`. Collective."""
    assert not self._outstanding
    self.now.windows = (self.now.windows + sum(distributed.gather(self._windows))) % 2**64
    self._windows = 0
    return dataclasses.asdict(self.now)

  def round_begins(self, index: int) -> None:
    """Rows of a round; those of one that is resumed are there."""

    def make(_: Any) -> None:
      if not self.now.rows:
        self.now.rows = records.blank(self._federation, index)

    self._put("", None, make)

  def down(self, index: int, step: schedule.Step, log: Any) -> None:
    """A down-phase."""
    topology = self._engine.topologies[step.level]

    def make(log: Any) -> None:
      self._exchanges.down(self.now.rows, step.level, step.active, topology, log)
      self.now.receipts += self._receipts.down(index, step.level, step.active, topology, log)

    self._put("aggregating", self._snapshot(log, self._engine.home), make)

  def up(self, index: int, step: schedule.Step, log: Any, present: dict[int, jax.Array]) -> None:
    """An up-phase; for `present` see `records.Exchanges.up`."""
    topology = self._engine.topologies[step.level]
    assert step.arrived is not None
    arrived = step.arrived > 0

    def make(found: Any) -> None:
      records.add_turnouts(self.now.rows, step)
      self._exchanges.up(self.now.rows, step.level, step.active, arrived, topology, *found)
      # Who has not trained in this round has released nothing new.
      releases = {path: n for path, (n, _) in self.now.private.items() if "steps" in self.now.rows[path]}
      self.now.receipts += self._receipts.up(index, step.level, step.active, arrived, topology, releases, *found)

    self._put("aggregating", self._snapshot((log, present), self._engine.home), make)

  def trained(self, index: int, level: int, work: local.Workload, logs: list[engine_lib.WaveLog], trust: Any) -> None:
    """A training phase; `trust` is that of the level's nodes, or None."""
    rows = [np.asarray(log.rows) for log in logs]
    waves = [(log.losses, log.steps, log.tokens) for log in logs]
    results = self._snapshot(waves, self._engine.mesh), self._snapshot(trust, self._engine.home)

    def make(found: Any) -> None:
      waves, trust = found
      for places, wave in zip(rows, waves, strict=True):
        for row, losses_S, count, tokens in zip(places, *wave, strict=True):
          if row < len(self._federation.levels[level]) and work.steps[row]:
            self._trained_node(index, self._federation.levels[level][row], int(row), work, losses_S, int(count),
                               int(tokens), None if trust is None else float(trust[row]))

    self._put("training", results, make)

  def scored(self, index: int, kind: str, level: int, evaluation: Evaluation, mask: np.ndarray, found: Any) -> None:
    """Scores on the valid split; `kind` is "received" or "personalised"."""

    def enter(scores: dict[str, Score]) -> None:
      for path, score in scores.items():
        if not np.isfinite(score.loss_nats):
          self._fail(f"valid loss as {kind} is {score.loss_nats}", path, index, "")
        self.now.rows[path][kind] = records.score_record(score, self._texts.bytes_per_token[path]["valid"])

    self._put_scores(level, evaluation, mask, found, enter)

  def tested(self, level: int, evaluation: Evaluation, mask: np.ndarray, found: Any) -> None:
    """Scores of personalised models on the test split."""

    def enter(scores: dict[str, Score]) -> None:
      for path, score in scores.items():
        self.now.test[path] = records.score_record(score, self._texts.bytes_per_token[path]["test"])
        self.now.best[path] = self.now.rows[path]["personalised"]["loss_nats"]

    self._put_scores(level, evaluation, mask, found, enter)

  def received(self, level: int, evaluation: Evaluation, mask: np.ndarray, found: Any,
               into: dict[str, dict[str, float]]) -> None:
    """Scores on the test split of what nodes would receive next."""

    def enter(scores: dict[str, Score]) -> None:
      for path, score in scores.items():
        into[path] = records.score_record(score, self._texts.bytes_per_token[path]["test"])

    self._put_scores(level, evaluation, mask, found, enter)

  def phase_ends(self, place: int, stop: bool) -> None:
    """The end of a round's step `place`; `stop` says whether this process has been told to stop. Collective."""

    def make(told: Any) -> None:
      self.now.step, self.told_to_stop = place + 1, bool(told)

    self._put("", distributed.any_says(stop, self._engine.mesh), make)

  def round_ends(self, index: int) -> None:
    """The end of a round."""
    self._put("", None, lambda _: self._finish_round(index))

  def improved(self, level: int) -> np.ndarray:
    """Which nodes of a level have their best valid loss now: bool `[n]`. Waits for all that is outstanding."""
    self.settle()
    return np.array([
      self.now.rows[m.path].get("personalised", {}).get("loss_nats", np.inf) < self.now.best.get(m.path, np.inf)
      for m in self._federation.levels[level]
    ])

  def mean_loss_nats(self) -> float | None:
    """The nodes' mean valid loss; None while not all have one: it could not be compared with a mean over all."""
    losses = {self._federation.by_path[path].identity: loss for path, loss in self.now.losses.items()}
    everybody = len(losses) == len({m.identity for m in self._federation.members if m.trains and m.data is not None})
    return float(np.mean(list(losses.values()))) if everybody and losses else None

  def _put(self, activity: str, results: Any, make: Callable[[Any], None]) -> None:
    self.clock.apart("compiling", self._engine.compile_seconds - self._compiled)
    self._compiled = self._engine.compile_seconds
    self._outstanding.append(_Entry(activity, results, make, self._waiting.submit(_wait_for, results)))
    self.settle(OUTSTANDING)

  def _snapshot(self, results: Any, mesh: jax.sharding.Mesh) -> Any:
    return None if results is None else distributed.snapshot(results, mesh)

  def _put_scores(self, level: int, evaluation: Evaluation, mask: np.ndarray, found: Any,
                  enter: Callable[[dict[str, Score]], None]) -> None:
    if not found:  # nobody was to be scored
      return
    places, losses = [rows for rows, _ in found], self._snapshot([losses for _, losses in found], self._engine.mesh)
    members, scored = self._federation.levels[level], mask & (evaluation.counts > 0)

    def make(losses: list[jax.Array]) -> None:
      sums = engine_lib.scores_by_row([*zip(places, losses, strict=True)], len(members))
      enter({
        m.path: Score(float(sums[i]), evaluation.num_targets(i)) for i, m in enumerate(members) if scored[i]
      })

    self._put("evaluating", losses, make)

  def _trained_node(self, index: int, member: Member, row: int, work: local.Workload, losses_S: np.ndarray, count: int,
                    tokens: int, trust: float | None) -> None:
    path, entry = member.path, self.now.rows[member.path]
    position = self.now.positions.get(member.identity, 0)
    if count < work.steps[row]:
      loss = float(losses_S[count])
      what = f"the gradient or the step is not finite (loss {loss:.4g})" if np.isfinite(loss) else f"loss is {loss}"
      where = f", step {position + count + 1} of the node's own (not taken: the node stayed as it was before it)"
      self._fail(what, path, index, where)
    self.now.positions[member.identity] = position + int(work.steps[row])
    counts_here = member.identity in self._texts.first and (member.pools or not self._federation.is_pooled)
    if counts_here:  # below a pool, the model has seen these windows
      seen = work.windows[row, :count, : work.batch_size[row]]
      self._windows = (self._windows + fairness.windows(seen)) % 2**64
    self.now.tokens[path] = self.now.tokens.get(path, 0) + tokens
    if count:
      records.add_training(entry, losses_S[:count])
      self._book_privacy(member, count)
    if trust is not None:
      entry["trust"] = trust

  def _book_privacy(self, member: Member, steps: int) -> None:
    """A training that happened: what left the node by it, if it is protected. One that did not, costs nothing."""
    releases = bool(self._engine.algorithm.shares) and policy.protects_updates(member.settings)
    examples = policy.protects_examples(member.settings)
    if releases or examples:
      before = self.now.private.get(member.path, [0, 0])
      self.now.private[member.path] = [before[0] + releases, before[1] + steps * examples]

  def _fail(self, what: str, path: str, index: int, where: str) -> None:
    """Ends the run; or only says so, and the others go on, where the config wants a failing node to be left out."""
    self.now.rows[path]["failed"] = what + where
    if self._engine.config.guards.failing == "stop":
      self.failure = self.failure or Failure(what, path, index, where)

  def _finish_round(self, index: int) -> None:
    now, shown = self.now, []
    trained = [path for path, row in now.rows.items() if "steps" in row or "failed" in row]
    if trained and all("failed" in now.rows[path] for path in trained):
      what = f"{now.rows[trained[0]]['failed']} (and so it is with everybody who trained)"
      self.failure = self.failure or Failure(what, trained[0], index, "")
    for member in self._federation.subtree(self._federation.root.path):  # parents above their own children
      row = now.rows[member.path]
      row["tokens"] = now.tokens.get(member.path, 0)
      total = now.bytes.setdefault(member.path, [0, 0])
      now.bytes[member.path] = [total[0] + row["bytes_down"], total[1] + row["bytes_up"]]
      before = Score(now.losses[member.path], 1).perplexity if member.path in now.losses else None
      shown.append(progress.Row(
        member.path, member.name, len(self._federation.ancestors[member.path]) - 1, row["tokens"],
        row.get("loss_nats"), row.get("received", {}).get("perplexity"), row.get("personalised", {}).get("perplexity"),
        before, records.top_source(row),
      ))
      if np.isfinite(row.get("personalised", {}).get("loss_nats", np.nan)):
        now.losses[member.path] = row["personalised"]["loss_nats"]
      for reason in row.get("rejected", ()):
        counts = now.rejected.setdefault(member.path, {})
        counts[reason] = counts.get(reason, 0) + 1
    seconds = time.perf_counter() - self._round_began
    self._round_began += seconds
    self._show(index, shown, seconds)
    now.round, now.step, now.rows, now.receipts = index + 1, 0, {}, []
