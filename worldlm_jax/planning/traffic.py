"""Bytes between nodes and their parents, round by round, without training: the rules played through on counts.

What crosses an edge depends on the tree, the schedule and how many residual layers are there to be sent, not on the
parameters; so the whole run can be counted ahead. `records.Exchanges` counts the same while a run goes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from worldlm_jax import schedule, state as state_lib
from worldlm_jax.algorithms.rules import Algorithm
from worldlm_jax.config import Config
from worldlm_jax.exchange import attend
from worldlm_jax.federation import Federation, Member
from worldlm_jax.records import EdgeBytes

Traffic = dict[str, list[int]]  # by path: bytes down and up over the edge to the parent


def by_round(
  config: Config, federation: Federation, algorithm: Algorithm, topologies: Sequence[state_lib.Topology],
  abstract: Sequence[state_lib.LevelState], sizes: EdgeBytes,
) -> list[Traffic]:
  """What crosses every edge in each round of the run, if everybody takes part.

  When a node goes its own way depends on its text: it may be sent additions to its own model as long as that is
  possible, so that what is counted here is the most.

  Args:
    config: a validated config.
    federation: the tree, as the algorithm arranges it.
    algorithm: the pair of rules.
    topologies: of the levels.
    abstract: the shapes of the state.
    sizes: of the messages; see `records.edge_bytes`.
  """
  play = _Play(config, federation, algorithm, topologies, abstract, sizes)
  found: list[Traffic] = []
  for stage in schedule.stages(federation, config.schedule):
    steps = {last: schedule.round_steps(federation, stage, personalise=last) for last in (False, True)}
    for index in range(config.rounds):
      personalises = index == config.rounds - 1 or config.evaluation.personalised == "best"
      found.append(play.round(len(found), steps[personalises]))
  return found


def data_parallel(config: Config, federation: Federation, model_bytes: int) -> list[Traffic]:
  """The same tokens in synchronous data-parallel training: gradients up and their mean down at every step.

  Every node that trains is a worker with a link of its own to whoever adds up; a ring would carry as much over each.
  """
  found = []
  for stage in schedule.stages(federation, config.schedule):
    steps = schedule.steps_per_round(federation, stage)
    found += [{path: [count * model_bytes] * 2 for path, count in steps.items()}] * config.rounds
  return found


def total(rounds: Sequence[Traffic]) -> tuple[int, int]:
  """Bytes down and up, of all edges and rounds."""
  down, up = (sum(edge[i] for row in rounds for edge in row.values()) for i in (0, 1))
  return down, up


class _Play:
  """Who has trained, and how many residual layers of which round everybody holds, per layer index."""

  def __init__(
    self, config: Config, federation: Federation, algorithm: Algorithm, topologies: Sequence[state_lib.Topology],
    abstract: Sequence[state_lib.LevelState], sizes: EdgeBytes,
  ):
    self._federation, self._algorithm, self._topologies, self._bytes = federation, algorithm, topologies, sizes
    self._over_updates = config.key_layers.values == "updates"
    self._added = attend.added_parts(config.key_layers, config.payload)
    self._sends = [_places(level.residuals) for level in abstract]
    self._receives = config.key_layers.residuals_received if any(self._sends) else 0
    self._num_layers = next((r.present.shape[2] for own in abstract for r in (own.residuals, own.received) if r), 0)
    counts = [len(level) for level in federation.levels]
    self._sent: list[list[list[int]]] = [[[] for _ in range(n)] for n in counts]  # the rounds that made them
    self._received: list[list[list[int]]] = [[[] for _ in range(n)] for n in counts]
    places = {m.path: (j, i) for j, level in enumerate(federation.levels) for i, m in enumerate(level)}
    self._below = {path: [places[m.path] for m in federation.subtree(path)] for path in places}
    self._weighs, self._trained, self._fresh = ([np.zeros(n, bool) for n in counts] for _ in range(3))

  def round(self, index: int, steps: Sequence[schedule.Step]) -> Traffic:
    """One round of the run."""
    traffic: Traffic = {member.path: [0, 0] for member in self._federation.members}
    for step in steps:
      level, active = step.level, step.active
      if step.kind == "down":
        self._descend(index, step, traffic)
        for books in (self._weighs, self._trained, self._fresh):
          books[level] &= ~active
      elif step.kind == "train":
        for books in (self._weighs, self._trained, self._fresh):
          books[level] |= active
      else:
        self._ascend(index, step, traffic)
    return traffic

  def _descend(self, index: int, step: schedule.Step, traffic: Traffic) -> None:
    level, room = step.level, self._receives
    for i in np.flatnonzero(step.active):
      member = self._federation.levels[level][i]
      if member.parent is None:
        continue
      if room:
        made = sorted(self._pool(index, step, int(i)), reverse=True)
        self._received[level][i] = made[:room]
      forwards = not self._over_updates or bool(self._federation.is_federation(level)[i])
      layers = len(self._received[level][i]) * self._num_layers * forwards if room else 0
      traffic[member.path][0] += self._model_down(member) + layers * self._bytes.residual_layer

  def _model_down(self, member: Member) -> int:
    """What a node may be sent of its parent's model, as it is and as additions to its own."""
    sizes, algorithm, settings = self._bytes, self._algorithm, member.settings
    rules = algorithm.governance
    may_backbone, may_layers = (
      rules is None or part not in algorithm.shares or not rules.takes(part, member.path)
      for part in ("backbone", "key_layers")
    )
    if not algorithm.goes_own_way:
      return sizes.backbone * may_backbone + sizes.key_layers * may_layers
    backbone_never, layers_never = (
      c == math.inf for c in (settings.backbone_independence, settings.key_layer_independence)
    )
    layers_always = may_layers and not layers_never and (settings.key_layer_independence == 0 or not member.trains)
    backbone_always = may_backbone and not backbone_never and (settings.backbone_independence == 0 or not member.trains)
    backbone = algorithm.hands_all or not backbone_never
    layers = algorithm.hands_all or not self._over_updates or not layers_never
    added_backbone = "backbone" in self._added and not backbone_always
    added_layers = "key_layers" in self._added and not layers_always
    return sizes.backbone * ((backbone and may_backbone) + added_backbone) + sizes.key_layers * (
      (layers and may_layers) + added_layers)

  def _pool(self, index: int, step: schedule.Step, i: int) -> list[int]:
    """The rounds that made the residual layers which node i of a level may get."""
    topology = self._topologies[step.level]
    pooled = [made for j, eligible in topology.eligible.items() for o in np.flatnonzero(eligible[i])
              for made in self._sent[j][o]]
    above = self._received[step.level - 1][topology.parent[i]]
    if not self._over_updates:
      return pooled + above
    # Each update is used once, and not when it is old.
    return [made for made in pooled + (above if step.first_repeat else []) if made >= index - 1]

  def _ascend(self, index: int, step: schedule.Step, traffic: Traffic) -> None:
    level, federation = step.level, self._federation
    parents, room = federation.parents[level + 1], self._sends[step.level]
    gains = np.zeros(len(federation.levels[level]), bool)
    for i in np.flatnonzero(step.active):
      members = np.flatnonzero(parents == i)
      gains[i] = self._weighs[level + 1][members].any()
      if room and gains[i]:
        offered = [c for c in members if self._fresh[level + 1][c] or not self._over_updates]
        enough = len(offered) + self._trained[level][i] > 1  # with a single layer to take, nothing is left over
        self._sent[level][i] = [index] * (min(room, len(offered)) if enough else 0)
    self._weighs[level] |= gains
    self._fresh[level] |= gains
    for c, child in enumerate(federation.levels[level + 1]):
      if step.active[parents[c]]:
        count = sum(len(self._sent[j][i]) for j, i in self._below[child.path])
        sizes = {"backbone": self._bytes.backbone, "key_layers": self._bytes.key_layers}
        rules = self._algorithm.governance
        model = sum(sizes[part] for part in self._algorithm.shares if rules is None or rules.sends(part, child.path))
        traffic[child.path][1] += model + count * self._num_layers * self._bytes.residual_layer


def _places(residuals: Any) -> int:
  """How many residual layers a node has room for, per layer index."""
  return residuals.present.shape[1] if residuals is not None else 0
