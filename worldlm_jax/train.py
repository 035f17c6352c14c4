"""The main job: `run` trains a federation from a config, in a work directory that it can resume from."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from worldlm_jax import (
  algorithms,
  checkpoint,
  checks,
  config as config_lib,
  engine as engine_lib,
  fairness,
  federation as federation_lib,
  feed as feed_lib,
  matrix,
  metrics,
  model,
  partition,
  progress,
  records,
  schedule,
  signals,
  state as state_lib,
  trees,
  watching,
  workdir as workdir_lib,
)
from worldlm_jax.data import batches as batches_lib, compression, duplicates, tokenizer as tokenizer_lib
from worldlm_jax.data.evaluation import Evaluation
from worldlm_jax.scoring import Score

PLACES_PER_ROUND = 10_000  # a checkpoint's number is round * PLACES_PER_ROUND + step within the round


class Interrupted(Exception):
  """The run was told to stop, has saved everything, and can be resumed."""


@dataclasses.dataclass
class Progress:
  """Where the run stands: with the arrays, all that a checkpoint has to hold. Plain JSON values."""

  round: int = 0
  step: int = 0  # of the round's steps, the next to do
  positions: dict[str, int] = dataclasses.field(default_factory=dict)  # optimizer steps made, by node
  tokens: dict[str, int] = dataclasses.field(default_factory=dict)  # trained on, by node
  windows: int = 0  # fingerprint of the windows trained on; see `fairness`
  rows: records.Rows = dataclasses.field(default_factory=dict)  # of the unfinished round
  losses: dict[str, float] = dataclasses.field(default_factory=dict)  # last personalised valid loss, by node
  best: dict[str, float] = dataclasses.field(default_factory=dict)  # valid loss of the model that `test` scores
  test: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # personalised, by node
  bytes: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # [down, up] so far, by node
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def run(config: config_lib.Config, workdir: str | Path, *, overwrite: bool = False,
        reporter: progress.Reporter | None = None) -> dict[str, Any]:
  """Trains a federation, or resumes where the work directory's run stopped.

  Args:
    config: the experiment.
    workdir: gets config.json, metrics.jsonl, summary.json, checkpoints/ and tensorboard/.
    overwrite: starts afresh where the folder holds a run.
    reporter: shows progress; silent if None.

  Returns:
    The content of summary.json.

  Raises:
    checks.InputError: bad input (a ValueError), found before anything is compiled.
    FloatingPointError: a loss was not finite; the state before that step is saved.
    Interrupted: SIGTERM or SIGINT came; everything is saved.
    OSError: the disk is full; the newest complete checkpoint is kept.
  """
  return _Run(config, Path(workdir), overwrite, reporter or progress.Silent()).to_the_end()


class _Run:
  def __init__(self, config: config_lib.Config, workdir: Path, overwrite: bool, reporter: progress.Reporter):
    self.config = config = algorithms.adapted(config)
    self.workdir, self.reporter = workdir, reporter
    self.federation = algorithms.arranged(config, federation_lib.resolve(config))
    watching.check(config.logging)
    tokenizer = tokenizer_lib.load(config.data.tokenizer)
    self.arch = _architecture(config, tokenizer)
    self.mesh = partition.make_mesh()
    sources = [
      (m.path, m.data) for level in self.federation.levels
      for m, own in zip(level, partition.own_nodes(len(level), self.mesh), strict=True) if own and m.data is not None
    ]
    limits = {m.path: m.settings.max_train_bytes for m in self.federation.members}
    self.texts = batches_lib.load(sources, config.data, tokenizer, reporter.message, limits)
    self.duplicates = duplicates.find({path: text.text for path, text in self.texts.items()})
    for line in duplicates.warnings(self.duplicates):
      reporter.message(line)
    if lossy := [path for path, text in self.texts.items() if not text.text.lossless]:
      reporter.message(f"warning: the tokenizer loses some of the text of {', '.join(lossy)}: no bits per byte there")
    texts = {path: text.text for path, text in self.texts.items()}
    self.compressed = compression.references(texts, tokenizer, reporter.message)
    digests = {path: text.digest for path, text in self.texts.items()}
    validation = None
    algorithm = algorithms.make(config, self.arch, self.federation)
    if algorithm.needs_validation:
      validation = [e.arrays() for e in self._evaluations("valid", config.evaluation.acceptance_windows)]
    text_tokens = feed_lib.text_tokens(self.texts)
    self.engine = engine_lib.Engine(config, self.federation, self.arch, self.mesh, algorithm, text_tokens, validation)
    abstract = self.engine.abstract_state()
    workdir_lib.check_space(workdir, trees.num_bytes(abstract), config.checkpoint)
    description = workdir_lib.describe(config, self.federation, digests)
    changed = workdir_lib.claim(workdir, description, overwrite=overwrite)
    if changed:
      reporter.message(f"resuming with other versions, so not to the same bits: {'; '.join(changed)}")
    if (stopped := workdir / "stopped.json").exists():
      raise FloatingPointError(f"this run cannot go on: {json.loads(stopped.read_text(encoding='utf-8'))['reason']}")
    self.checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint, self.federation, self.mesh)
    self.rounds = [
      (stage, index == config.rounds - 1)
      for stage in schedule.stages(self.federation, config.schedule) for index in range(config.rounds)
    ]
    for stage, _ in self.rounds[:: config.rounds]:
      places = len(schedule.round_steps(self.federation, stage))
      checks.require(places < PLACES_PER_ROUND, "rounds_per_parent_round", places, f"fewer than {PLACES_PER_ROUND} "
                     "phases in one round of the root", "repeat less often further down the tree")
    shared = {part: params for part, params in model.abstract_params(self.arch).items() if part in algorithm.shares}
    self.exchanges = records.Exchanges(self.federation, config.key_layers, shared)
    self.valid = self._evaluations("valid", config.evaluation.valid_windows)
    self.test = self._evaluations("test", config.evaluation.test_windows)
    self.now = Progress()
    if config.evaluation.personalised == "last":
      self.now.positions |= schedule.first_positions(self.federation, config.rounds)
    self.state = self._restore_or_begin(abstract)
    self.stop = signals.Stop()

  def to_the_end(self) -> dict[str, Any]:
    """Runs what is left and returns the summary."""
    summary = self.workdir / "summary.json"
    if self.now.round == len(self.rounds) and summary.exists():
      self.reporter.message(f"{self.workdir} holds this run, finished; --overwrite starts afresh")
      self.checkpoints.close()
      return json.loads(summary.read_text(encoding="utf-8"))
    rounds = [self._steps(index) for index in range(len(self.rounds))]
    feed = feed_lib.Feed(feed_lib.workloads(
      self.config, self.federation, self.texts, rounds, (self.now.round, self.now.step), self.now.positions
    ))
    watchers = watching.Watchers(
      self.config.logging, self.workdir, config_lib.to_dict(self.config), self.now.round, self.now.seconds,
      self.reporter.message,
    )
    try:
      with self.stop.listening():
        self.reporter.start(self._title(), len(self.rounds), self.now.round)
        for index in range(self.now.round, len(self.rounds)):
          self._round(index, feed, watchers)
        self.checkpoints.wait()
      result = self._summary()
      metrics.write_json(summary, result)
      return result
    finally:
      self.reporter.stop()
      feed.stop()
      self.checkpoints.close()
      watchers.close()

  def _round(self, index: int, feed: feed_lib.Feed, watchers: watching.Watchers) -> None:
    begin = time.perf_counter()
    last = self.rounds[index][1]
    steps = self._steps(index)
    received_at, personalised_at = schedule.evaluations(self.federation, steps)
    if not self.now.rows:
      self.now.rows = records.blank(self.federation, index)
    for place in range(self.now.step, len(steps)):
      step = steps[place]
      compiling = "" if self.engine.is_compiled(step) else " (compiling)"
      self.reporter.phase(index, f"{step.kind} {_names(self.federation, step)}{compiling}", place / len(steps))
      if step.kind == "down":
        self._down(index, step)
        self._evaluate(index, "received", step.level, received_at[place])
      elif step.kind == "train":
        self._train(index, step, feed)
        self._evaluate(index, "personalised", step.level, personalised_at[place])
        self._test(step.level, personalised_at[place], last)
      else:
        self._up(index, step)
      self.now.step = place + 1
      if self.stop.name and place + 1 < len(steps):
        self._stop(index)
    self._finish_round(index, time.perf_counter() - begin, watchers)
    if self.stop.name and index + 1 < len(self.rounds):
      self._stop(index + 1)

  def _steps(self, index: int) -> list[schedule.Step]:
    stage, last = self.rounds[index]
    personalise = last or self.config.evaluation.personalised == "best"
    return schedule.round_steps(self.federation, stage, personalise=personalise)

  def _down(self, index: int, step: schedule.Step) -> None:
    with self._timed("aggregating"):
      self.state, log = self.engine.down(self.state, step, index)
      jax.block_until_ready(self.state[step.level])
    self.exchanges.down(self.now.rows, step.level, step.active, self.engine.topologies[step.level], jax.device_get(log))

  def _up(self, index: int, step: schedule.Step) -> None:
    below = self.federation.parents[step.level + 1]
    members_active = step.active[below]
    with self._timed("aggregating"):
      self.state, log = self.engine.up(self.state, step, members_active, index)
      jax.block_until_ready(self.state[step.level])
    self.exchanges.up(
      self.now.rows, step.level, step.active, members_active, self.engine.topologies[step.level], jax.device_get(log),
      records.present_residuals(self.state, self.federation),
    )

  def _train(self, index: int, step: schedule.Step, feed: feed_lib.Feed) -> None:
    waited = feed.wait_seconds
    work = feed.next()
    self._book("waiting_for_data", feed.wait_seconds - waited)
    with self._timed("training"):
      self.state, logs = self.engine.train(self.state, step.level, work)
      jax.block_until_ready(self.state[step.level])
    members = self.federation.levels[step.level]
    trust = jax.device_get(self.state[step.level].trust) if self.engine.algorithm.trusts and step.level else None
    for rows, losses, taken, predicted in jax.device_get(logs):
      for row, loss_S, count, tokens in zip(rows, losses, taken, predicted, strict=True):
        if row >= len(members) or not work.steps[row]:
          continue
        path = members[row].path
        position = self.now.positions.get(path, 0)
        if count < work.steps[row]:
          loss = float(loss_S[count])
          what = f"the gradient or the step is not finite (loss {loss:.4g})" if np.isfinite(loss) else f"loss is {loss}"
          where = f"step {position + int(count) + 1} of the node's own; the state before that step"
          self._stop_for_good(what, path, index, where)
        self.now.positions[path] = position + int(count)
        if members[row].pools or not self.federation.is_pooled:  # below a pool, the model has seen these windows
          seen = work.windows[row, :count, : members[row].settings.batch_size]
          self.now.windows = (self.now.windows + fairness.windows(seen)) % 2**64
        self.now.tokens[path] = self.now.tokens.get(path, 0) + int(tokens)
        records.add_training(self.now.rows[path], loss_S[:count])
        if trust is not None:
          self.now.rows[path]["trust"] = float(trust[row])

  def _evaluate(self, index: int, kind: str, level: int, mask: np.ndarray) -> None:
    for path, score in self._scores(level, self.valid[level], mask).items():
      if not np.isfinite(score.loss_nats):
        self._stop_for_good(f"valid loss as {kind} is {score.loss_nats}", path, index, "model as it is now, which")
      self.now.rows[path][kind] = records.score_record(score, self.texts[path].bytes_per_token("valid"))

  def _test(self, level: int, mask: np.ndarray, last: bool) -> None:
    """Scores personalised models on their test texts: in the last round, or whenever they are better than before."""
    if self.config.evaluation.personalised == "best":
      improved = [self.now.rows[m.path].get("personalised", {}).get("loss_nats", np.inf) <
                  self.now.best.get(m.path, np.inf) for m in self.federation.levels[level]]
      mask = mask & np.array(improved)
    elif not last:
      return
    for path, score in self._scores(level, self.test[level], mask).items():
      self.now.test[path] = records.score_record(score, self.texts[path].bytes_per_token("test"))
      self.now.best[path] = self.now.rows[path]["personalised"]["loss_nats"]

  def _scores(self, level: int, evaluation: Evaluation, mask: np.ndarray) -> dict[str, Score]:
    members = self.federation.levels[level]
    with self._timed("evaluating"):
      sums = engine_lib.scores_by_row(self.engine.score(self.state, level, evaluation, mask), len(members))
    scored = mask & (evaluation.counts > 0)
    return {m.path: Score(float(sums[i]), evaluation.num_targets(i)) for i, m in enumerate(members) if scored[i]}

  def _finish_round(self, index: int, seconds: float, watchers: watching.Watchers) -> None:
    now = self.now
    shown = []
    for member in self.federation.subtree(self.federation.root.path):  # parents above their own children
      row = now.rows[member.path]
      row["tokens"] = now.tokens.get(member.path, 0)
      total = now.bytes.setdefault(member.path, [0, 0])
      now.bytes[member.path] = [total[0] + row["bytes_down"], total[1] + row["bytes_up"]]
      before = Score(now.losses[member.path], 1).perplexity if member.path in now.losses else None
      shown.append(progress.Row(
        member.path, member.name, len(self.federation.ancestors[member.path]) - 1, row["tokens"], row.get("loss_nats"),
        row.get("received", {}).get("perplexity"), row.get("personalised", {}).get("perplexity"), before,
        records.top_source(row),
      ))
      if "personalised" in row:
        now.losses[member.path] = row["personalised"]["loss_nats"]
    metrics.append_jsonl(self.workdir / "metrics.jsonl", now.rows.values())
    watchers.round(index, now.rows, now.seconds)
    now.round, now.step, now.rows = index + 1, 0, {}
    if (index + 1) % self.config.checkpoint.every_rounds == 0 or index + 1 == len(self.rounds):
      # A mean over the nodes that have trained so far could not be compared with one over all.
      everybody = len(now.losses) == sum(m.trains for m in self.federation.members if m.path in self.texts)
      self._save(float(np.mean(list(now.losses.values()))) if everybody and now.losses else None)
    self.reporter.round(index, shown, seconds)

  def _save(self, loss_nats: float | None) -> None:
    number = self.now.round * PLACES_PER_ROUND + self.now.step
    if not self.checkpoints.has(number):
      with self._timed("saving"):
        self.checkpoints.save(number, self.state, dataclasses.asdict(self.now), loss_nats)

  def _stop(self, round_index: int) -> NoReturn:
    self._save(None)
    self.checkpoints.wait()
    raise Interrupted(
      f"stopped by {self.stop.name} in round {round_index + 1}; everything is saved, run the same command again to "
      "resume"
    )

  def _stop_for_good(self, what: str, path: str, index: int, where: str) -> NoReturn:
    """Saves the state, marks the run as one that cannot go on, and says what to change."""
    self._save(None)
    self.checkpoints.wait()
    reason = (
      f"{what} at node {path!r}, round {index + 1}, {where} is saved in {self.workdir / 'checkpoints'}. Lower "
      f"learning_rate or clip_norm there (--node={path}.learning_rate=...), or config.backbone.server_learning_rate "
      "if the model was bad as received, and start afresh with --overwrite"
    )
    metrics.write_json(self.workdir / "stopped.json", {"reason": reason})
    raise FloatingPointError(reason)

  def _restore_or_begin(self, abstract: state_lib.State) -> state_lib.State:
    restored = self.checkpoints.restore_newest(abstract, self.reporter.message)
    log = self.workdir / "metrics.jsonl"
    if restored is None:
      log.unlink(missing_ok=True)
      return self.engine.init()
    self.now = Progress(**restored.record)
    metrics.keep_jsonl(log, lambda row: row["round"] < self.now.round)
    self.reporter.message(f"resuming {self.workdir} after {self.now.round} of {len(self.rounds)} rounds")
    return restored.state

  def _evaluations(self, split: str, count: int) -> list[Evaluation]:
    return feed_lib.evaluations(self.federation, self.texts, split, count, self.config.data.sequence_length)

  def _title(self) -> list[str]:
    params = model.abstract_params(self.arch)
    megabytes = sum(text.text.splits["train"].counts.text_bytes for text in self.texts.values()) / 1e6
    levels = ", ".join(str(len(level)) for level in self.federation.levels)
    live = [f"to watch it: tensorboard --logdir={self.workdir / 'tensorboard'}"] * self.config.logging.tensorboard
    return [
      f"{len(self.federation.members)} nodes in {len(self.federation.levels)} levels ({levels}), "
      f"{len(self.texts)} with text ({megabytes:.1f} MB to train on)",
      f"{trees.num_parameters(params):,} parameters per node, {trees.num_parameters(params['key_layers']):,} of them "
      f"in {self.arch.num_key_layers} key layers",
      f"{self.mesh.size} device(s), {self.engine.nodes_at_once} node(s) at once on each; writing to {self.workdir}",
      *live,
    ]

  def _summary(self) -> dict[str, Any]:
    """Scores every model on every text, then what every node would receive next. Uses the state up."""
    crossed, windows = None, self.config.evaluation.matrix_windows
    if windows:
      self.reporter.phase(len(self.rounds) - 1, "scoring every model on every text", 1.0)
      with self._timed("evaluating"):
        crossed = matrix.score(self.engine, self.state, self.texts, windows)
    received: dict[str, dict[str, float]] = {}
    for level, members in enumerate(self.federation.levels):
      everybody = np.ones(len(members), bool)
      self.state, _ = self.engine.down(self.state, schedule.Step("down", level, everybody, True), len(self.rounds))
      for path, score in self._scores(level, self.test[level], everybody).items():
        received[path] = records.score_record(score, self.texts[path].bytes_per_token("test"))
    data = {m.path: records.text_record(self.texts[m.path], m.data, self.compressed.get(m.path))
            for m in self.federation.members if m.data}
    found = records.summary(
      self.federation, self.now.tokens, self.now.bytes, received, self.now.test, self.now.seconds, data
    )
    fair = {
      "initial_parameters": fairness.initial_parameters(self.engine.initial_params()),
      "batches": {"all": f"{self.now.windows:016x}"},
      "evaluation": fairness.evaluation(self.texts, self.config.evaluation.test_windows),
    }
    found |= {"matrix": crossed, "fairness": fair}
    return found | {"duplicates": [duplicate._asdict() for duplicate in self.duplicates]}

  @contextlib.contextmanager
  def _timed(self, name: str) -> Iterator[None]:
    """Books the time under `name`, less what went into compiling, which has an entry of its own."""
    begin, compiled = time.perf_counter(), self.engine.compile_seconds
    try:
      yield
    finally:
      compiling = self.engine.compile_seconds - compiled
      self._book(name, time.perf_counter() - begin - compiling)
      self._book("compiling", compiling)

  def _book(self, name: str, seconds: float) -> None:
    self.now.seconds[name] = self.now.seconds.get(name, 0.0) + seconds


def _architecture(config: config_lib.Config, tokenizer: tokenizer_lib.Tokenizer) -> model.Architecture:
  separator = tokenizer.separator_id if config.data.document_mask else None
  arch = model.architecture(config.model, tokenizer.vocab_size, separator, algorithms.num_key_layers(config))
  if arch.vocab_size < tokenizer.vocab_size:
    raise checks.InputError(
      f"config.model.vocab_size={arch.vocab_size}: expected at least {tokenizer.vocab_size}, the vocabulary of "
      f"{config.data.tokenizer!r}; set it to 0 to take the tokenizer's"
    )
  return arch


def _names(federation: federation_lib.Federation, step: schedule.Step) -> str:
  names = [m.path for m, active in zip(federation.levels[step.level], step.active, strict=True) if active]
  return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
