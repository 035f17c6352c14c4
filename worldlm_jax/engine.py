"""The phases of a round, each compiled once per level of the tree.

Phases are compiled ahead of time at their first use and the time is booked; a later call with other
shapes is an error rather than a silent second compilation.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldlm_jax import local, model, partition, rngs, schedule, scoring, state as state_lib, trees
from worldlm_jax.algorithms import rules, worldlm
from worldlm_jax.config import Config
from worldlm_jax.federation import Federation

SCORE_BATCH = 32  # windows per forward pass when scoring

State = tuple[state_lib.LevelState, ...]


class Engine:
  """Runs phases on the state of a federation.

  Args:
    config: a validated config.
    federation: the resolved tree.
    arch: the model.
    mesh: the devices.
    validation: per level, int32 `[n, E, W]` validation batches and int32 `[n]` counts, for rules that
      look at them (`needs_validation`).
  """

  def __init__(
    self, config: Config, federation: Federation, arch: model.Architecture, mesh: jax.sharding.Mesh,
    validation: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
  ):
    self.config, self.federation, self.arch, self.mesh = config, federation, arch, mesh
    self.algorithm = worldlm.make(config, arch, any_validated=any_validated(federation))
    self.topologies = [state_lib.topology(federation, level, mesh) for level in range(len(federation.levels))]
    self.validation = validation
    self.nodes_at_once = config.nodes_at_once or partition.choose_nodes_at_once(
      max(len(level) for level in federation.levels), model.abstract_params(arch), mesh
    )
    self.compile_seconds = 0.0
    self._compiled: dict[tuple, Callable] = {}

  def init(self) -> State:
    """The state before the first round; every node starts from the same parameters."""
    params = jax.jit(functools.partial(model.init, self.arch))(rngs.key(self.config.seed, "init"))
    build = functools.partial(state_lib.init, self.config, self.federation, self.mesh)
    return jax.jit(build, out_shardings=partition.node_sharding(self.mesh))(params)

  def down(self, state: State, step: schedule.Step, round_index: int) -> tuple[State, dict[str, jax.Array]]:
    """The down-phase of `step.level`: the new state and the exchange's log."""
    level, topology = step.level, self.topologies[step.level]
    deeper = {j: r for j in topology.eligible if j > level and (r := state[j].residuals) is not None}
    above = state[level - 1] if level else None

    def phase(own, above, deeper, nodes, phase):
      return rules.down(self.algorithm, topology, own, above, deeper, nodes, phase)

    new, log = self._call(
      ("down", level), phase, state[level], above, deeper, self._inputs(level, step.active, "down_temperature"),
      rules.PhaseInputs(np.int32(round_index), np.bool_(step.first_repeat)),
    )
    return _with_level(state, level, new), log

  def up(
    self, state: State, step: schedule.Step, members_active: np.ndarray, round_index: int
  ) -> tuple[State, dict[str, jax.Array]]:
    """The up-phase of `step.level`; `members_active` says who of the level below took part."""
    level = step.level

    def phase(own, below, members_active, nodes, phase):
      return rules.up(
        self.algorithm, self.topologies[level], own, below, members_active, self.topologies[level + 1], nodes, phase
      )

    new, log = self._call(
      ("up", level), phase, state[level], state[level + 1], self._pad(level + 1, members_active),
      self._inputs(level, step.active, "up_temperature"),
      rules.PhaseInputs(np.int32(round_index), np.bool_(step.first_repeat)),
    )
    return _with_level(state, level, new), log

  def train(self, state: State, level: int, work: local.Workload) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """Local training of a level: the new state, and losses `[N, S]` and steps taken `[N]`."""

    def phase(own, work):
      trained = local.train_level(
        self.arch, self.config.optimizer, self.nodes_at_once, self.mesh, own.params, own.opt_state, work
      )
      took_part = trained.steps > 0
      moved = trees.subtract(trained.params["key_layers"], own.params["key_layers"])
      tokens = jnp.float32(trained.steps * work.batch_size * (work.windows.shape[-1] - 1))
      new = own._replace(
        params=trained.params, opt_state=trained.opt_state, update=trees.where(took_part, moved, own.update),
        step=own.step + trained.steps, own_tokens=own.own_tokens + tokens, tokens=own.tokens + tokens,
        trained=own.trained | took_part, fresh=own.fresh | took_part,
      )
      return new, (trained.losses, trained.steps)

    padded = jax.tree.map(functools.partial(self._pad, level), work)
    new, log = self._call(("train", level), phase, state[level], padded)
    return _with_level(state, level, new), log

  def score(self, state: State, level: int, windows: np.ndarray, counts: np.ndarray) -> jax.Array:
    """Summed losses `[N]` of a level's nodes on their windows `[n, E, W]`, of which `counts[n]` count."""
    batch = min(SCORE_BATCH, windows.shape[1])
    rows = -(-windows.shape[1] // batch) * batch
    windows = np.pad(windows, [(0, 0), (0, rows - windows.shape[1]), (0, 0)])
    phase = functools.partial(scoring.score_level, self.arch, self.mesh, batch)
    return self._call(
      ("score", level, rows), phase, state[level].params, self._pad(level, windows), self._pad(level, counts),
      donate=False,
    )

  def _inputs(self, level: int, active: np.ndarray, temperature: str) -> rules.NodeInputs:
    members = self.federation.levels[level]
    windows = np.zeros((len(members), 0, self.config.data.sequence_length + 1), np.int32)
    counts = np.zeros(len(members), np.int32)
    if self.validation is not None:
      windows, counts = self.validation[level]
    return rules.NodeInputs(
      self._pad(level, active),
      self._pad(level, np.array([getattr(m.settings, temperature) for m in members], np.float32)),
      self._pad(level, np.array([m.settings.acceptance == "validated" for m in members])),
      self._pad(level, windows),
      self._pad(level, counts),
    )

  def _pad(self, level: int, array: np.ndarray) -> jax.Array:
    assert len(array) == len(self.federation.levels[level])
    return partition.put_nodes(array, self.mesh)

  def _call(self, name: tuple, phase: Callable, *args: Any, donate: bool = True) -> Any:
    """Calls the compiled phase; its first argument is a level's state, given up to the new one."""
    if name not in self._compiled:
      begin = time.perf_counter()
      nodes = partition.node_sharding(self.mesh)
      jitted = jax.jit(phase, donate_argnums=0 if donate else (), out_shardings=(nodes, None) if donate else None)
      self._compiled[name] = jitted.lower(*args).compile()
      self.compile_seconds += time.perf_counter() - begin
    return self._compiled[name](*args)


def any_validated(federation: Federation) -> bool:
  """Whether some node's acceptance is "validated"."""
  return any(member.settings.acceptance == "validated" for member in federation.members)


def needs_validation(config: Config, federation: Federation) -> bool:
  """Whether the exchange needs the nodes' validation batches."""
  return worldlm.needs_validation_batch(config.key_layers, any_validated(federation))


def _with_level(state: State, level: int, new: state_lib.LevelState) -> State:
  return (*state[:level], new, *state[level + 1 :])
