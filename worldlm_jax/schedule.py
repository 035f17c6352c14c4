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

import math
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from worldlm_jax.config import Config
from worldlm_jax.federation import Federation, Member


class Step(NamedTuple):
  """One phase at one level."""

  kind: str  # "down" | "train" | "up"
  level: int
  active: np.ndarray  # bool [N]: the nodes of the level that take part
  first_repeat: bool  # whether this is the first of the repeats within the parent's round


def trains(federation: Federation, level: int) -> np.ndarray:
  """Which nodes of a level train: those with data and local steps. bool `[N]`."""
  return np.array([m.trains for m in federation.levels[level]])


def stages(federation: Federation, schedule: str) -> list[int | None]:
  """The levels that train in turn (None: all of them in every round)."""
  if schedule == "parallel" or federation.is_pooled:
    return [None]
  return [level for level in range(len(federation.levels)) if trains(federation, level).any()]


def round_steps(
  federation: Federation, stage: int | None, absent: Collection[str] = (), *, personalise: bool = False
) -> list[Step]:
  """The steps of one round of the root.

  Args:
    federation: the tree.
    stage: the one level that trains, or None for all.
    absent: paths of nodes that take no part in this round; all below them takes none either.
    personalise: where the root trains for all (`federation.pooled`), the nodes below only receive its model; whether
      they also make steps of their own from it, before it trains.
  """
  present = [
    np.array([not any(federation.is_within(m.path, gone) for gone in absent) for m in level])
    for level in federation.levels
  ]

  def visit(level: int, active: np.ndarray, first_repeat: bool) -> Iterator[Step]:
    yield Step("down", level, active, first_repeat)
    training = active & trains(federation, level)
    if stage in (None, level) and training.any():
      yield Step("train", level, training, first_repeat)
    if level + 1 == len(federation.levels) or stage == level:
      return
    heads = active & federation.is_federation(level)
    members = federation.levels[level]
    repeats = np.array([1 if m.parent is None else m.settings.rounds_per_parent_round for m in members])
    for repeat in range(max(repeats[heads], default=0)):
      running = heads & (repeats > repeat)
      members = running[federation.parents[level + 1]] & present[level + 1]
      yield from visit(level + 1, members, repeat == 0)
      yield Step("up", level, running, first_repeat)

  if federation.is_pooled:
    own = [Step("train", 1, present[1] & trains(federation, 1), True)] if personalise else []
    return [Step("down", 0, present[0], True), Step("down", 1, present[1], True), *own,
            Step("train", 0, present[0], True)]
  return list(visit(0, present[0], True))


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


def steps_per_round(federation: Federation, stage: int | None) -> dict[str, int]:
  """How many optimizer steps each node makes in a round in which everybody takes part, and personalises."""
  count = {member.path: 0 for member in federation.members}
  for step in round_steps(federation, stage, personalise=True):
    if step.kind == "train":
      for member, active in zip(federation.levels[step.level], step.active, strict=True):
        count[member.path] += int(active) * member.settings.local_steps
  return count


def epochs(config: Config, federation: Federation, text_tokens: Mapping[str, int]) -> list[np.ndarray]:
  """Per level, how often each node's subtree sees its text in the whole run: float32 `[n]`.

  `text_tokens` says by path how much text there is. Nodes that do not train have no way of their own to go: inf.
  """
  tokens = dict.fromkeys(text_tokens, 0)
  for stage in stages(federation, config.schedule):
    for path, count in steps_per_round(federation, stage).items():
      if path in tokens:
        windows = config.rounds * count * federation.by_path[path].settings.batch_size
        tokens[path] += windows * config.data.sequence_length

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
