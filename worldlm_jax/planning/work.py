"""Operations and seconds of a round, from shapes and the numbers of a machine.

  operations per token, forward = L (2 kernels + 4 T D) + 2 D V,   backward = twice as many,
  with remat the blocks' once more, and the head's once more where logits are made in chunks

The scores of attention count in full, as they are computed without a kernel that leaves out what is masked.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from worldlm_jax import engine, feed, model, partition, schedule
from worldlm_jax.algorithms.rules import Algorithm
from worldlm_jax.config import Config
from worldlm_jax.exchange import trust
from worldlm_jax.federation import Federation
from worldlm_jax.planning import memory
from worldlm_jax.planning.machines import GB, Machine
from worldlm_jax.planning.traffic import Traffic


class Operations(NamedTuple):
  """Per token."""

  forward: float
  training: float  # forward, backward and what is computed again


class Seconds(NamedTuple):
  """Of one round."""

  compute: float  # training
  exchange: float  # down- and up-phases inside the machine
  host: float  # moving nodes that wait on the host in and out
  evaluation: float
  links: float  # between nodes and their parents, were each at a place of its own

  @property
  def machine(self) -> float:
    """All but the links."""
    return self.compute + self.exchange + self.host + self.evaluation


@functools.cache
def operations(arch: model.Architecture, windows: int, length: int) -> Operations:
  """How many operations a token takes in microbatches of `windows` windows of `length` predicted tokens."""
  params = model.abstract_params(arch)
  blocks = [params["backbone"]["blocks"], params["key_layers"]]
  kernels = sum(leaf.size for leaf in jax.tree.leaves(blocks) if leaf.ndim == 3)  # [layers, in, out]
  in_blocks = 2 * kernels + 4 * length * arch.d_model * arch.num_layers
  head = 2 * arch.d_model * arch.vocab_size
  return Operations(in_blocks + head, 3 * (in_blocks + head) + (in_blocks if arch.remat == "blocks" else 0))


class Work:
  """What the rounds of a run take on a machine.

  Args:
    config: a validated config.
    federation: the tree, as the algorithm arranges it.
    arch: the model.
    algorithm: the pair of rules.
    machine: the machine.
    mesh: its devices.
    nodes_at_once: nodes that train side by side on the devices of one node.
    on_host: whether nodes that do not train wait on the host.
  """

  def __init__(
    self, config: Config, federation: Federation, arch: model.Architecture, algorithm: Algorithm, machine: Machine,
    mesh: Any, nodes_at_once: int, *, on_host: bool,
  ):
    self._config, self._federation, self._arch, self._algorithm = config, federation, arch, algorithm
    self._machine, self._mesh, self._nodes_at_once, self._on_host = machine, mesh, nodes_at_once, on_host
    self.length = config.data.sequence_length
    self.score_batch = score_batch(config, arch)
    params = model.abstract_params(arch)
    self._shared = memory.device_bytes({part: params[part] for part in algorithm.shares}, mesh)
    self._held = memory.device_bytes(params, mesh) * (4 if algorithm.tracks else 3)
    self._key_layers = memory.device_bytes(params["key_layers"], mesh)
    sharing = mesh.shape[partition.FSDP] * mesh.shape[partition.TENSOR]
    self._rate = sharing * machine.peak_flops(arch.compute_dtype) * machine.utilisation  # of a node's devices

  def useful_operations(self, stage: int | None) -> float:
    """Of one round, what training on everybody's tokens takes."""
    made = schedule.steps_per_round(self._federation, stage)
    found = 0.0
    for member in self._federation.members:
      micro = min(self._config.optimizer.microbatch_size or member.settings.batch_size, member.settings.batch_size)
      tokens = made[member.path] * member.settings.batch_size * self.length
      found += tokens * operations(self._arch, micro, self.length).training
    return found

  def seconds(self, stage: int | None, traffic: Sequence[Traffic]) -> list[Seconds]:
    """Of the rounds of a stage, in which everybody takes part; `traffic` is what crosses every edge in each of them."""
    steps = schedule.round_steps(self._federation, stage)
    inside = self._inside(steps)
    return [inside._replace(links=self._links(steps, row)) for row in traffic]

  def _inside(self, steps: Sequence[schedule.Step]) -> Seconds:
    received, personalised = schedule.evaluations(self._federation, list(steps))
    total = Seconds(0, 0, 0, 0, 0)
    for step, *masks in zip(steps, received, personalised, strict=True):
      scored = sum((mask & self._has_text(step.level) for mask in masks), np.zeros(len(masks[0]), bool))
      evaluation = self._scoring(step.level, scored, self._config.evaluation.valid_windows)
      if step.kind == "train":
        if self._algorithm.trusts and step.level:
          windows = len(trust.TRUSTS) * self._config.evaluation.acceptance_windows
          evaluation += self._scoring(step.level, step.active, windows)
        moved = 2 * self._share(step.level) * self._held if self._on_host else 0
        here = Seconds(self._training(step), 0, moved / (self._machine.host_link_gb_per_s * GB), evaluation, 0)
      else:
        here = Seconds(0, self._exchange(step), 0, evaluation, 0)
      total = Seconds(*(a + b for a, b in zip(total, here, strict=True)))
    return total

  def waves(self, level: int) -> list[np.ndarray]:
    """The rows of a level (ghosts included) that train at once, wave by wave."""
    size = partition.padded_size(len(self._federation.levels[level]), self._mesh)
    return [rows[new] for _, rows, new in partition.waves(size, self._nodes_at_once, self._mesh)]

  def _training(self, step: schedule.Step) -> float:
    members = self._federation.levels[step.level]
    micro = self._config.optimizer.microbatch_size
    whole = feed.workload_shape(self._federation, step.level, micro, self.length)[1]
    micro = min(micro or whole, whole)
    per_token = operations(self._arch, micro, self.length).training
    total = 0.0
    for rows in self.waves(step.level):
      active = [members[row].settings for row in rows if row < len(members) and step.active[row]]
      # A wave takes as long as its longest member, and computes all its places in every step.
      steps = max((own.local_steps for own in active), default=0)
      batches = max((-(-own.batch_size // micro) for own in active), default=0)
      side_by_side = len(rows) / self._mesh.shape[partition.NODE]
      total += steps * batches * micro * self.length * per_token * side_by_side / self._rate
    return total

  def _scoring(self, level: int, mask: np.ndarray, windows: int) -> float:
    per_window = self.length * operations(self._arch, self.score_batch, self.length).forward
    padded = -(-windows // self.score_batch) * self.score_batch
    waves = sum(bool(mask[rows[rows < len(mask)]].any()) for rows in self.waves(level))
    return waves * self._nodes_at_once * padded * per_window / self._rate

  def _exchange(self, step: schedule.Step) -> float:
    """Reading both sides, and writing one; and what comes from other devices."""
    level = step.level
    nodes = self._share(level if step.kind == "down" else min(level + 1, len(self._federation.levels) - 1))
    if step.kind == "down" and level == 0:
      return 0.0
    own = nodes * (self._shared + len(self._algorithm.tracks) * self._key_layers)
    moved = nodes * self._shared if self._mesh.shape[partition.NODE] > 1 else 0
    return (3 * own / self._machine.memory_gb_per_s + moved / self._machine.device_link_gb_per_s) / GB

  def _links(self, steps: Sequence[schedule.Step], traffic: Traffic) -> float:
    """Every node has one link, both ways: a parent's carries what all its members get or send, one after the other."""
    rate = self._machine.node_link_gbit_per_s * GB / 8
    total = 0.0
    repeats = {m.path: 0 for m in self._federation.members}
    for step in steps:
      if step.kind == "down":
        for m, active in zip(self._federation.levels[step.level], step.active, strict=True):
          repeats[m.path] += int(active)
    for step in steps:
      level = step.level if step.kind == "down" else step.level + 1
      if step.kind == "train" or level == 0:
        continue
      parents, way = self._federation.parents[level], 0 if step.kind == "down" else 1
      busy = np.zeros(len(self._federation.levels[level - 1]))
      active = step.active if step.kind == "down" else step.active[parents]
      for m, parent, there in zip(self._federation.levels[level], parents, active, strict=True):
        busy[parent] += there * traffic[m.path][way] / max(1, repeats[m.path])
      if busy.any():
        total += busy.max() / rate + self._machine.node_latency_ms / 1e3
    return total

  def _share(self, level: int) -> int:
    """Nodes of a level per place on the mesh's node axis."""
    return partition.padded_size(len(self._federation.levels[level]), self._mesh) // self._mesh.shape[partition.NODE]

  def _has_text(self, level: int) -> np.ndarray:
    return np.array([member.data is not None for member in self._federation.levels[level]])


def score_batch(config: Config, arch: model.Architecture) -> int:
  """Windows per forward pass when scoring."""
  logits = config.data.sequence_length * arch.vocab_size
  return int(np.clip(engine.SCORE_LOGITS // logits, 1, engine.SCORE_BATCH))

