"""The main job: `run` trains a federation from a config, in a work directory that it can resume from."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from worldlm_jax import (
  algorithms,
  checkpoint,
  checks,
  config as config_lib,
  distributed,
  engine as engine_lib,
  fairness,
  federation as federation_lib,
  feed as feed_lib,
  ledger as ledger_lib,
  matrix,
  metrics,
  model,
  partition,
  progress,
  receipts as receipts_lib,
  records,
  schedule,
  signals,
  spending as spending_lib,
  state as state_lib,
  texts as texts_lib,
  trees,
  watching,
  workdir as workdir_lib,
)
from worldlm_jax.data import tokenizer as tokenizer_lib
from worldlm_jax.model import llama

PLACES_PER_ROUND = 10_000  # a checkpoint's number is round * PLACES_PER_ROUND + step within the round


class Interrupted(Exception):
  """The run was told to stop, has saved everything, and can be resumed."""


def run(config: config_lib.Config, workdir: str | Path, *, overwrite: bool = False,
        reporter: progress.Reporter | None = None) -> dict[str, Any]:
  """Trains a federation, or resumes where the work directory's run stopped.

  Args:
    config: the experiment.
    workdir: gets config.json, metrics.jsonl, receipts.jsonl, summary.json, checkpoints/ and tensorboard/.
    overwrite: starts afresh where the folder holds a run.
    reporter: shows progress; silent if None.

  Returns:
    The content of summary.json.

  Raises:
    checks.InputError: bad input (a ValueError), found before anything is compiled; also a work directory that another
      process works in.
    FloatingPointError: a loss was not finite. That node's training ended before the bad step by itself; the others
      went on for the few phases until it was noticed, and the state then is saved, to be looked at.
    Interrupted: SIGTERM or SIGINT came; everything is saved.
    OSError: the disk is full; the newest complete checkpoint is kept.
  """
  with contextlib.ExitStack() as held:
    return _Run(config, Path(workdir), overwrite, reporter or progress.Silent(), held).to_the_end()


class _Run:
  def __init__(self, config: config_lib.Config, workdir: Path, overwrite: bool, reporter: progress.Reporter,
               held: contextlib.ExitStack):
    self.config = config = algorithms.adapted(config)
    self.workdir, self.reporter = workdir, reporter if distributed.is_lead() else progress.Silent()
    with distributed.agreed():
      workdir_lib.check_writable(workdir)
      self.federation = algorithms.arranged(config, federation_lib.resolve(config))
      watching.check(config.logging)
      tokenizer = tokenizer_lib.load(config.data.tokenizer)
      self.arch = algorithms.architecture(config, tokenizer)
      algorithm = algorithms.make(config, self.arch, self.federation)
      self.mesh = _mesh(config, self.federation, self.arch)
    _check_same_in_all(workdir_lib.describe(config, self.federation, {}))
    self.texts = texts_lib.load(config, self.federation, self.mesh, tokenizer, self.reporter.message)
    validation, length = None, config.data.sequence_length
    if algorithm.needs_validation:
      windows = config.evaluation.acceptance_windows
      validation = [e.arrays() for e in self.texts.evaluations("valid", windows, length)]
    with distributed.agreed():
      start = config.model.init_from
      initial = llama.read(Path(start).expanduser(), self.arch) if start else None
    self.engine = engine_lib.Engine(
      config, self.federation, self.arch, self.mesh, algorithm, self.texts.train_tokens, validation, initial=initial
    )
    abstract = self.engine.abstract_state()
    self._claim(overwrite, trees.num_bytes(abstract), held)
    rounds = schedule.whole_run(config, self.federation)
    places = max(map(len, rounds))
    checks.require(places < PLACES_PER_ROUND, "rounds_per_parent_round", places, f"fewer than {PLACES_PER_ROUND} "
                   "phases in one round of the root", "repeat less often further down the tree")
    self.spending = spending_lib.Spending(config, self.federation, self.texts, bool(algorithm.shares), rounds)
    self.rounds = self.spending.rounds
    self.last_trainings = schedule.last_trainings(self.federation, self.rounds)
    self.checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint, self.federation)
    self.valid = self.texts.evaluations("valid", config.evaluation.valid_windows, length)
    self.test = self.texts.evaluations("test", config.evaluation.test_windows, length)
    now, self.state = self._restore_or_begin(abstract)
    shared = {part: params for part, params in model.abstract_params(self.arch).items() if part in algorithm.shares}
    exchanges = records.Exchanges(self.federation, config.key_layers, shared, config.payload, algorithm.governance)
    sizes = records.edge_bytes(shared, config.key_layers.values, config.payload)
    receipts = receipts_lib.Receipts(algorithms.governance(config, self.federation), sizes, config.key_layers)
    self.ledger = ledger_lib.Ledger(now, self.federation, self.texts, self.engine, exchanges, receipts, self._show)
    self.watchers: watching.Watchers | None = None
    self.stop = signals.Stop()

  def to_the_end(self) -> dict[str, Any]:
    """Runs what is left and returns the summary."""
    summary, now = self.workdir / "summary.json", self.ledger.now
    finished = now.round == len(self.rounds) and summary.exists()
    if all(distributed.gather(finished)):
      self.reporter.message(f"{self.workdir} holds this run, finished; --overwrite starts afresh")
      self.checkpoints.close()
      return checks.read_object(summary)
    feed = feed_lib.Feed(feed_lib.workloads(
      self.config, self.federation, self.texts.here, self.texts.train_tokens, self.rounds, (now.round, now.step),
      now.positions,
    ))
    if distributed.is_lead():
      self.watchers = watching.Watchers(
        self.config.logging, self.workdir, config_lib.to_dict(self.config), now.round, now.seconds,
        self.reporter.message,
      )
    try:
      with self.stop.listening():
        self.reporter.start(self._title(), len(self.rounds), now.round)
        self.ledger.start()
        for index in range(now.round, len(self.rounds)):
          self._round(index, feed)
        self.checkpoints.wait()
        self.ledger.clock.lap("saving")
      result = self._summary()
      with distributed.agreed():
        if distributed.is_lead():
          metrics.write_json(summary, result)
      return result
    finally:
      self.reporter.stop()
      feed.stop()
      self.ledger.close()
      self.checkpoints.close()
      if self.watchers is not None:
        self.watchers.close()

  def _round(self, index: int, feed: feed_lib.Feed) -> None:
    """Hands the phases of a round to the devices, and what they will have to say to the ledger."""
    steps = self.rounds[index]
    received_at, personalised_at = schedule.evaluations(self.federation, steps)
    self.ledger.round_begins(index)
    begin = self.ledger.now.step if index == self.ledger.now.round else 0
    if not begin:
      self.state = self.engine.move(self.state, self.federation.moves(index))
    for place in range(begin, len(steps)):
      step = steps[place]
      compiling = "" if self.engine.is_compiled(step) else " (compiling)"
      self.reporter.phase(index, f"{step.kind} {_names(self.federation, step)}{compiling}", place / len(steps))
      if step.kind == "down":
        self._down(index, step)
        self._evaluate(index, "received", step.level, received_at[place])
      elif step.kind == "train":
        self._train(index, step, feed)
        self._evaluate(index, "personalised", step.level, personalised_at[place])
        self._test(index, step.level, personalised_at[place])
      else:
        self._up(index, step)
      self.ledger.phase_ends(place, bool(self.stop.name))
      if place + 1 < len(steps):
        self._stop_if_told()
    self.ledger.round_ends(index)
    if (index + 1) % self.config.checkpoint.every_rounds == 0 or index + 1 == len(self.rounds):
      self.ledger.settle()
      self._stop_if_failed()
      self._save(self.ledger.mean_loss_nats())
    if index + 1 < len(self.rounds):
      self._stop_if_told()

  def _down(self, index: int, step: schedule.Step) -> None:
    self.state, log = self.engine.down(self.state, step, index)
    self.ledger.down(index, step, log)

  def _up(self, index: int, step: schedule.Step) -> None:
    self.state, log = self.engine.up(self.state, step, index)
    self.ledger.up(index, step, log, records.present_residuals(self.state))

  def _train(self, index: int, step: schedule.Step, feed: feed_lib.Feed) -> None:
    waited = feed.wait_seconds
    work = feed.next()
    self.ledger.clock.apart("waiting_for_data", feed.wait_seconds - waited)
    self.state, logs = self.engine.train(self.state, step.level, work)
    trust = self.state[step.level].trust if self.engine.algorithm.trusts and step.level else None
    self.ledger.trained(index, step.level, work, logs, trust)

  def _evaluate(self, index: int, kind: str, level: int, mask: np.ndarray) -> None:
    found = self.engine.score(self.state, level, self.valid[level], mask)
    self.ledger.scored(index, kind, level, self.valid[level], mask, found)

  def _test(self, index: int, level: int, mask: np.ndarray) -> None:
    """Scores personalised models on their test texts: in their nodes' last round, or whenever
    they are better than before.

    `ends` says who trains no more since its privacy budget is spent, for whom this is the last round.
    To know whether they are, it waits for their scores on the valid split.
    """
    if self.config.evaluation.personalised == "best":
      mask = mask & self.ledger.improved(level)
    else:
      mask = mask & np.array([self.last_trainings.get(m.path) == index for m in self.federation.levels[level]])
    if not mask.any():
      return
    self.ledger.tested(level, self.test[level], mask, self.engine.score(self.state, level, self.test[level], mask))

  def _show(self, index: int, shown: list[progress.Row], seconds: float) -> None:
    """Takes a finished round out of the ledger."""
    if distributed.is_lead():
      metrics.append_jsonl(self.workdir / "receipts.jsonl", self.ledger.now.receipts)
      metrics.append_jsonl(self.workdir / "metrics.jsonl", self.ledger.now.rows.values())
    if self.watchers is not None:
      self.watchers.round(index, self.ledger.now.rows, self.ledger.now.seconds)
    self.reporter.round(index, shown, seconds)

  def _save(self, loss_nats: float | None) -> None:
    record = self.ledger.record()
    number = self.ledger.now.round * PLACES_PER_ROUND + self.ledger.now.step
    if not self.checkpoints.has(number):
      self.checkpoints.save(number, self.state, record, loss_nats)
      self.ledger.clock.lap("saving")

  def _stop_if_told(self) -> None:
    """Ends the run here if something was not finite, or a signal came to this process or, a little later, another."""
    self._stop_if_failed()
    if self.ledger.told_to_stop or (self.stop.name and jax.process_count() == 1):
      self.ledger.settle()
      self._stop_if_failed()
      self._save(None)
      self.checkpoints.wait()
      raise Interrupted(
        f"stopped by {self.stop.name or 'a signal to another process'} in round {self.ledger.now.round + 1}; "
        "everything is saved, run the same command again to resume"
      )

  def _stop_if_failed(self) -> None:
    """Where something was not finite, saves the state, marks the run as one that cannot go on, and says why."""
    if (failure := self.ledger.failure) is None:
      return
    self.ledger.settle()
    self._save(None)
    self.checkpoints.wait()
    now = self.ledger.now
    reached = f"in round {now.round + 1}" if now.step else f"after round {now.round}"
    reason = (
      f"{failure.what} at node {failure.node!r}, round {failure.round + 1}{failure.where}; this was noticed {reached}, "
      f"and the state then is saved in {self.workdir / 'checkpoints'}. Lower learning_rate or clip_norm there "
      f"(--node={failure.node}.learning_rate=...), or config.backbone.server_learning_rate if the model was bad as "
      "received, and start afresh with --overwrite"
    )
    if distributed.is_lead():
      metrics.write_json(self.workdir / "stopped.json", {"reason": reason})
    raise FloatingPointError(reason)

  def _claim(self, overwrite: bool, state_bytes: int, held: contextlib.ExitStack) -> None:
    """Makes the work directory this run's own, as long as `held` is open; the lead does it for all."""
    with distributed.agreed():
      changed: list[str] = []
      if distributed.is_lead():
        workdir_lib.check_space(self.workdir, state_bytes, self.config.checkpoint)
        held.enter_context(workdir_lib.held(self.workdir))
        description = workdir_lib.describe(self.config, self.federation, self.texts.digests)
        changed = workdir_lib.claim(self.workdir, description, overwrite=overwrite)
        workdir_lib.keep_tokenizer(self.workdir, self.config.data.tokenizer)
      if changed:
        self.reporter.message(f"resuming with other versions, so not to the same bits: {'; '.join(changed)}")
    distributed.check_shared(self.workdir)
    if (stopped := self.workdir / "stopped.json").exists():
      raise FloatingPointError(f"this run cannot go on: {checks.read_object(stopped, 'reason')['reason']}")

  def _restore_or_begin(self, abstract: state_lib.State) -> tuple[ledger_lib.Progress, state_lib.State]:
    restored = self.checkpoints.restore_newest(abstract, self.reporter.message)
    now = ledger_lib.progress_of(restored.record) if restored else ledger_lib.Progress()
    with distributed.agreed():
      if distributed.is_lead():
        done = range(now.round)
        for name in ("metrics.jsonl", "receipts.jsonl"):
          metrics.keep_jsonl(self.workdir / name, lambda row: row.get("round") in done)
    if restored is not None:
      self.reporter.message(f"resuming {self.workdir} after {now.round} of {len(self.rounds)} rounds")
      return now, restored.state
    if self.config.evaluation.personalised == "last":
      now.positions |= schedule.first_positions(self.federation, self.config.rounds)
    return now, self.engine.init()

  def _title(self) -> list[str]:
    params = model.abstract_params(self.arch)
    megabytes = sum(held["train"]["text_bytes"] for held in self.texts.held.values()) / 1e6
    levels = ", ".join(str(len(level)) for level in self.federation.levels)
    live = [f"to watch it: tensorboard --logdir={self.workdir / 'tensorboard'}"] * self.config.logging.tensorboard
    state = self.engine.abstract_state()
    waiting = f"the state takes {partition.bytes_per_device(state) / 1e9:.2f} GB on each"
    if self.engine.home is not self.mesh:
      waiting = f"the state waits on the host: {trees.num_bytes(state) / 1e9:.2f} GB"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return [
      f"{len(self.federation.members)} nodes in {len(self.federation.levels)} levels ({levels}), "
      f"{len(self.texts.held)} with text ({megabytes:.1f} MB to train on)",
      f"{trees.num_parameters(params):,} parameters per node, {trees.num_parameters(params['key_layers']):,} of them "
      f"in {self.arch.num_key_layers} key layers",
      f"{partition.describe(self.mesh)}{processes}, {self.engine.nodes_at_once} node(s) at once on each; "
      f"{waiting}",
      f"writing to {self.workdir}",
      *self.spending.title(),
      *live,
      *(self.engine.algorithm.governance.lines() if self.engine.algorithm.governance is not None else []),
    ]

  def _summary(self) -> dict[str, Any]:
    """Scores every model on every text, then what every node would receive next. Uses the state up."""
    crossed, windows, now = None, self.config.evaluation.matrix_windows, self.ledger.now
    if windows:
      self.reporter.phase(len(self.rounds) - 1, "scoring every model on every text", 1.0)
      crossed = matrix.score(self.engine, self.state, self.texts, windows)
      self.ledger.clock.lap("evaluating")
    received: dict[str, dict[str, float]] = {}
    for level, members in enumerate(self.federation.levels):
      everybody = np.array([m.path not in self.federation.deserted for m in members])
      still = schedule.present(self.federation, level, len(self.rounds) - 1)
      self.state, _ = self.engine.down(self.state, schedule.Step("down", level, still, True), len(self.rounds))
      scores = self.engine.score(self.state, level, self.test[level], everybody)
      self.ledger.received(level, self.test[level], everybody, scores, received)
    self.ledger.settle()
    found = records.summary(
      self.federation, now.tokens, now.bytes, received, now.test, now.seconds, self.texts.held,
      records.baseline_bytes(self.config, self.federation, model.abstract_params(self.arch)),
      records.turnout_totals(self.rounds), now.rejected,
    )
    fair = {
      "initial_parameters": fairness.initial_parameters(self.engine.initial_params()),
      "batches": {"all": f"{now.windows:016x}"},
      "evaluation": self.texts.fairness,
    }
    found |= {"matrix": crossed, "fairness": fair}
    if private := self.spending.report(now.private):
      found["privacy"] = private
    return found | {"duplicates": [duplicate._asdict() for duplicate in self.texts.duplicates]}


def _mesh(
  config: config_lib.Config, federation: federation_lib.Federation, arch: model.Architecture
) -> jax.sharding.Mesh:
  bytes_per_node = 7 * trees.num_bytes(model.abstract_params(arch))  # as in partition.choose_nodes_at_once
  return partition.choose_mesh(config.mesh, max(map(len, federation.levels)), bytes_per_node, jax.devices())


def _check_same_in_all(description: dict[str, Any]) -> None:
  """Raises `InputError` unless all processes were started with the same config. Collective.

  Where the texts lie may differ, since each process reads its own.
  """
  own = workdir_lib.comparable(description)
  own |= {name: description["config"][name] for name in ("nodes_at_once", "mesh", "checkpoint")}
  first, *rest = distributed.gather(own)
  for i, other in enumerate(rest, 1):
    found = checks.differences(first, other)
    checks.require(not found, "--process_id", i, "the config of process 0, as all processes have to have",
                   f"it differs in: {'; '.join(found[:8])}")


def _names(federation: federation_lib.Federation, step: schedule.Step) -> str:
  names = [m.path for m, active in zip(federation.levels[step.level], step.active, strict=True) if active]
  return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
