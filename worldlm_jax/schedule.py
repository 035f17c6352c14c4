"""The order of a round: which phase runs at which level, for which nodes.

A round is a short list of steps built from the tree alone, so that the numeric code sees nothing but
levels and masks:

  down   nodes receive their parent's backbone and mix its key layers into their own
  train  nodes with data train
  up     federations merge what their members send

Parallel schedule: a node trains, hands down, and merges when its children are done, the children of
all federations of a level side by side; a federation with `rounds_per_parent_round` = k does this k
times per round of its parent (HierFAVG's kappa, arXiv:1905.06641). Sequential schedule
(arXiv:2405.14446): only one level trains, root first, for `rounds` rounds each; what lies above it
hands down and merges, and what lies below it waits.
"""

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import numpy as np

from worldlm_jax import attendance
from worldlm_jax.config import Config
from worldlm_jax.federation import Federation, Member


class Step(NamedTuple):
  """One phase at one level."""

  kind: str  # "down" | "train" | "up"
  level: int
  active: np.ndarray  # bool [N]: the nodes of the level that take part
  first_repeat: bool  # whether this is the first of the repeats within the parent's round
  heard: Mapping[int, np.ndarray] | None = None  # of a down-phase: see `heard_below`; None: of everybody
  arrived: np.ndarray | None = None  # of an up-phase, float32 [C]: what updates from below count; None: 1
  turnouts: tuple[tuple[str, attendance.Turnout], ...] = ()  # of an up-phase: of the federations, by path


def trains(federation: Federation, level: int) -> np.ndarray:
  """Which nodes of a level train: those with data and local steps. bool `[N]`."""
  return np.array([m.trains for m in federation.levels[level]])


def present(federation: Federation, level: int, round_index: int) -> np.ndarray:
  """Which nodes of a level are in the tree in a round of the root, with all above them. bool `[N]`."""
  above = [[federation.by_path[p] for p in federation.ancestors[m.path]] for m in federation.levels[level]]
  return np.array([all(attendance.is_member(m, round_index) for m in nodes) for nodes in above])


def stages(federation: Federation, schedule: str) -> list[int | None]:
  """The levels that train in turn (None: all of them in every round)."""
  if schedule == "parallel" or federation.is_pooled:
    return [None]
  return [level for level in range(len(federation.levels)) if trains(federation, level).any()]


def round_steps(
  federation: Federation, stage: int | None, attends: attendance.Everybody | None = None,
  round_index: int | None = None, *, personalise: bool = False,
) -> list[Step]:
  """The steps of one round of the root.

  Args:
    federation: the tree.
    stage: the one level that trains, or None for all.
    attends: who takes part in which round of a federation; all below those who do not takes no part either. None:
      everybody does.
    round_index: which round of the root it is; None: one in which whoever ever is a member is one.
    personalise: where the root trains for all (`federation.pooled`), the nodes below only receive its model; whether
      they also make steps of their own from it, before it trains.
  """
  attends = attends or attendance.Everybody(federation)
  present = [np.ones(len(level), bool) for level in federation.levels]

  def visit(level: int, active: np.ndarray, first_repeat: bool, heard: Mapping[int, np.ndarray]) -> Iterator[Step]:
    yield Step("down", level, active, first_repeat, heard)
    has_data = np.array([attendance.has_data(m, round_index) for m in federation.levels[level]])
    training = active & has_data & trains(federation, level)
    if stage in (None, level) and training.any():
      yield Step("train", level, training, first_repeat)
    if level + 1 == len(federation.levels) or stage == level:
      return
    heads = active & federation.is_federation(level)
    repeats = np.array([
      1 if m.parent is None else m.settings.rounds_per_parent_round for m in federation.levels[level]
    ])
    for repeat in range(max(repeats[heads], default=0)):
      running, heard = heads & (repeats > repeat), heard_below(federation, level, attends)
      turnouts = tuple((m.path, attends.next(m.path, round_index)) for m in compress(federation.levels[level], running))
      there = frozenset[str]().union(*(turnout.there for _, turnout in turnouts))
      arrived = collections.ChainMap(*(dict(turnout.arrived) for _, turnout in turnouts))
      below = [m.path for m in federation.levels[level + 1]]
      if there:
        yield from visit(level + 1, np.array([path in there for path in below]), repeat == 0, heard)
      counts = np.array([arrived.get(path, 0.0) for path in below], np.float32)
      yield Step("up", level, running, first_repeat, None, counts, turnouts)

  if federation.is_pooled:
    own = [Step("train", 1, present[1] & trains(federation, 1), True)] if personalise else []
    return [Step("down", 0, present[0], True), Step("down", 1, present[1], True), *own,
            Step("train", 0, present[0], True)]
  return list(visit(0, present[0], True, {}))


def heard_below(
  federation: Federation, level: int, attends: attendance.Everybody
) -> dict[int, np.ndarray]:
  """By level j below `level`, whose last update (or residual layers) has come up to `level`: bool `[N_j]`."""
  found, above = dict[int, np.ndarray](), np.ones(len(federation.levels[level]), bool)
  for j in range(level + 1, len(federation.levels)):
    own = np.array([attends.is_heard(m.path) for m in federation.levels[j]])
    found[j] = above = own & above[federation.parents[j]]
  return found


def whole_run(config: Config, federation: Federation) -> list[list[Step]]:
  """The steps of every round, with those who take part in it."""
  attends = None if federation.is_pooled else attendance.Attendance(config.seed, federation)
  found: list[list[Step]] = []
  for stage in stages(federation, config.schedule):
    for index in range(config.rounds):
      personalise = index == config.rounds - 1 or config.evaluation.personalised == "best"
      found.append(round_steps(federation, stage, attends, len(found), personalise=personalise))
  return found


def last_trainings(federation: Federation, rounds: Sequence[Sequence[Step]]) -> dict[str, int]:
  """By path, the last round in which a node trains."""
  return {
    m.path: index for index, steps in enumerate(rounds) for step in steps if step.kind == "train"
    for m in compress(federation.levels[step.level], step.active)
  }


def evaluations(federation: Federation, steps: list[Step]) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Which nodes are scored after each step of a round: bool `[N]` of the step's level.

  As received: after a node's first down-phase of the round. Personalised: after its last training.
  """
  received = [np.zeros(len(federation.levels[step.level]), bool) for step in steps]
  personalised = [mask.copy() for mask in received]
  in_order = range(len(steps))
  for kind, masks, places in (("down", received, in_order), ("train", personalised, reversed(in_order))):
    done = [np.zeros(len(level), bool) for level in federation.levels]
    for place in places:
      step = steps[place]
      if step.kind == kind:
        masks[place] = step.active & ~done[step.level]
        done[step.level] |= step.active
  return received, personalised


def steps_per_round(federation: Federation, stage: int | None, round_index: int | None = None) -> dict[str, int]:
  """How many optimizer steps each node makes in a round in which everybody takes part, and personalises.

  In a given round of the root, everybody are the members of then who have something to train on.
  """
  count = {member.path: 0 for member in federation.members}
  for step in round_steps(federation, stage, None, round_index, personalise=True):
    if step.kind == "train":
      for member, active in zip(federation.levels[step.level], step.active, strict=True):
        count[member.path] += int(active) * member.settings.local_steps
  return count


def planned_steps(config: Config, federation: Federation) -> Iterator[dict[str, int]]:
  """`steps_per_round` of each round of the run, for those who are members then and have something to train on."""
  known: dict[Any, dict[str, int]] = {}
  for place, stage in enumerate(stages(federation, config.schedule)):
    for index in range(place * config.rounds, (place + 1) * config.rounds):
      now = tuple((attendance.is_member(m, index), attendance.has_data(m, index)) for m in federation.members)
      if (stage, now) not in known:
        known[stage, now] = steps_per_round(federation, stage, index)
      yield known[stage, now]


def epochs(config: Config, federation: Federation, text_tokens: Mapping[str, int]) -> list[np.ndarray]:
  """Per level, how often each node's subtree sees its text in the whole run: float32 `[n]`.

  `text_tokens` says by path how much text there is. Nodes that do not train have no way of their own to go: inf.
  """
  seen_by = dict.fromkeys((federation.by_path[path].identity for path in text_tokens), 0)
  for planned in planned_steps(config, federation):
    for member in (federation.by_path[path] for path in text_tokens):
      windows = planned[member.path] * member.settings.batch_size
      seen_by[member.identity] += windows * config.data.sequence_length
  tokens = {path: seen_by[federation.by_path[path].identity] for path in text_tokens}

  def seen(member: Member) -> float:
    if not member.trains:
      return math.inf
    below = [m.path for m in federation.subtree(member.path) if m.path in tokens]
    return sum(tokens[p] for p in below) / max(1, sum(text_tokens[p] for p in below))

  return [np.array([seen(m) for m in level], np.float32) for level in federation.levels]


def first_positions(federation: Federation, rounds: int) -> dict[str, int]:
  """The optimizer step with which nodes below a pool begin that train in the last round alone.

  So they train on the batches and at the rates which that round has everywhere.
  """
  return {m.path: (rounds - 1) * m.settings.local_steps for m in federation.members[1:]} if federation.is_pooled else {}
