"""The batches of a run in the order in which training asks for them, prepared ahead in a thread."""

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from worldlm_jax import local, schedule
from worldlm_jax.config import Config
from worldlm_jax.data import poisson
from worldlm_jax.data.batches import NodeBatches, NodeText, PooledBatches
from worldlm_jax.federation import Federation, Member
from worldlm_jax.privacy import policy

Batches = NodeBatches | PooledBatches | poisson.PoissonBatches


def workload(
  federation: Federation, step: schedule.Step, batches: Mapping[str, Batches],
  rates: Mapping[str, np.ndarray], positions: Mapping[str, int], planned: Mapping[str, int],
  shape: tuple[int, int, int], text_tokens: Mapping[str, int],
) -> local.Workload:
  """What the nodes of a training step do: leaves `[n, ...]`.

  Args:
    federation: the tree.
    step: a step of kind "train".
    batches: the batches of each node with data whose devices are this process's, by path.
    rates: the learning rate of each of a node's own steps, by path.
    positions: how many steps each node has made so far, by its identity: where in its text it is.
    planned: how many it would have made if it had never been missing: where in its schedule of rates it is.
    shape: (S, B, W); see `workload_shape`.
    text_tokens: how much text each node has to train on, by path.
  """
  members = federation.levels[step.level]
  windows = np.zeros((len(members), *shape), np.int32)
  learning_rates = np.zeros((len(members), shape[0]), np.float32)
  steps = np.zeros(len(members), np.int32)
  for i, member in enumerate(members):
    if step.active[i]:
      count, start = member.settings.local_steps, positions[member.identity]
      if member.path in batches:  # otherwise another process has its text, and puts its windows in place
        windows[i, :count, : _places(member)] = batches[member.path].batches(start, count)
      learning_rates[i, :count] = rates[member.path][planned[member.identity] :][:count]
      steps[i] = count
  return local.Workload(
    windows, learning_rates, steps,
    np.array([_places(member) for member in members], np.int32),
    np.array([member.settings.weight_decay for member in members], np.float32),
    np.array([member.settings.clip_norm for member in members], np.float32),
    np.array([text_tokens.get(member.path, 0) for member in members], np.float32),
  )


def batches(federation: Federation, texts: Mapping[str, NodeText], seed: int) -> dict[str, Batches]:
  """The batches of every node that has a text here, and of a root that trains on everybody's if all are here."""
  own: dict[str, Any] = {
    m.path: (poisson.PoissonBatches if policy.protects_examples(m.settings) else NodeBatches)(
      texts[m.path].train, m.settings.batch_size, seed, m.identity
    ) for m in federation.members if m.path in texts
  }
  if not federation.is_pooled or not own.keys() >= set(federation.root.pools):
    return own
  parts = [(own[path], federation.by_path[path].settings.local_steps) for path in federation.root.pools]
  return own | {federation.root.path: PooledBatches(parts, federation.root.settings.batch_size)}


def workloads(
  config: Config, federation: Federation, texts: Mapping[str, NodeText], tokens: Mapping[str, int],
  rounds: Sequence[Sequence[schedule.Step]], begin: tuple[int, int], positions: Mapping[str, int],
) -> Iterator[local.Workload]:
  """What remains to be trained on, in order.

  Args:
    config: a validated config.
    federation: the tree.
    texts: by path, of nodes whose devices are this process's.
    tokens: how much text each node has to train on, by path, wherever it is.
    rounds: the steps of all rounds.
    begin: the first round, and the first of its steps, that remain.
    positions: how many steps each node has made so far; one that is not there has made none.
  """
  sources = batches(federation, texts, config.seed)
  planned = [*schedule.planned_steps(config, federation)]
  totals = dict.fromkeys((m.identity for m in federation.members), 0)
  for member in federation.members:
    totals[member.identity] += sum(steps[member.path] for steps in planned)
  rates = {m.path: local.learning_rates(m.settings, totals[m.identity]) for m in federation.members}
  done = {identity: positions.get(identity, 0) for identity in totals}
  clock = dict.fromkeys(totals, 0)  # planned steps before the round
  for index, (steps, in_round) in enumerate(zip(rounds, planned, strict=True)):
    within = dict(clock)
    for place, step in enumerate(steps if index >= begin[0] else ()):
      if step.kind != "train":
        continue
      remains = (index, place) >= begin
      if remains:
        sizes = config.optimizer.microbatch_size, config.data.sequence_length
        shape = workload_shape(federation, step.level, *sizes)
        yield workload(federation, step, sources, rates, done, within, shape, tokens)
      for member, active in zip(federation.levels[step.level], step.active, strict=True):
        count = int(active) * member.settings.local_steps
        within[member.identity] += count
        done[member.identity] += count * remains
    for member in federation.members:
      clock[member.identity] += in_round[member.path]


def workload_shape(
  federation: Federation, level: int, microbatch_size: int, sequence_length: int
) -> tuple[int, int, int]:
  """The largest S and B over all nodes that train, B rounded up to whole microbatches, and W.

  All levels have the same shape, so that they share one compiled program; a pool's is its own.
  """
  members = federation.levels[level] if federation.is_pooled else federation.members
  training = [m.settings for m in members if m.trains]
  steps = max((settings.local_steps for settings in training), default=1)
  batch = max((_places(m) for m in members if m.trains), default=1)
  micro = min(microbatch_size, batch) or batch
  return steps, -(-batch // micro) * micro, sequence_length + 1


def _places(member: Member) -> int:
  """How many windows a batch of the node's has at most."""
  size = member.settings.batch_size
  return poisson.places(size) if policy.protects_examples(member.settings) else size


class Feed:
  """Hands out the workloads of `source` one after the other, the next ones prepared meanwhile."""

  def __init__(self, source: Iterable[local.Workload]):
    self.wait_seconds = 0.0
    self._ready: queue.Queue = queue.Queue(maxsize=2)
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._fill, args=(iter(source),), name="feed", daemon=True)
    self._thread.start()

  def next(self) -> local.Workload:
    """The next workload; the time spent waiting for it is booked. Raises what preparing it raised."""
    begin = time.perf_counter()
    item = self._ready.get()
    self.wait_seconds += time.perf_counter() - begin
    if isinstance(item, BaseException):
      raise item
    return item

  def stop(self) -> None:
    """Ends the thread."""
    self._stopped.set()
    self._thread.join()

  def _fill(self, source: Iterator[local.Workload]) -> None:
    try:
      for item in source:
        if not self._offer(item):
          return
    except Exception as error:
      self._offer(error)

  def _offer(self, item: local.Workload | Exception) -> bool:
    while not self._stopped.is_set():
      try:
        self._ready.put(item, timeout=0.2)
        return True
      except queue.Full:
        continue
    return False
