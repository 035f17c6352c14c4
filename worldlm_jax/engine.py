"""The phases of a round, each compiled once per level of the tree.

Phases are compiled ahead of time at their first use and the time is booked; a later call with other
shapes is an error rather than a silent second compilation.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldlm_jax import links, local, model, partition, rngs, schedule, scoring, settling, state as state_lib, trees
from worldlm_jax.algorithms import rules
from worldlm_jax.config import Config
from worldlm_jax.data.evaluation import Evaluation
from worldlm_jax.exchange import trust as trust_lib
from worldlm_jax.federation import Federation
from worldlm_jax.privacy import examples as examples_lib, policy, release

SCORE_BATCH = 32  # windows per forward pass when scoring, unless their logits are too many
SCORE_LOGITS = 2**26


class WaveLog(NamedTuple):
  """The training of one wave: which rows of the level, and how they fared."""

  rows: np.ndarray  # int [w]
  losses: jax.Array  # float32 [w, S], nats per token
  steps: jax.Array  # int32 [w]: steps taken
  tokens: jax.Array  # int32 [w]: predicted in these steps


class Engine:
  """Runs phases on the state of a federation.

  Args:
    config: a validated config.
    federation: the resolved tree, as the algorithm arranges it.
    arch: the model.
    mesh: the devices that train.
    algorithm: what is exchanged; see `algorithms.make`.
    text_tokens: how much text each node with data has to train on, by path.
    validation: per level, int32 `[n, E, W]` validation batches and int32 `[n]` counts, for algorithms
      that look at them (`needs_validation`).
    home: where the nodes' state lies while they wait, and where they meet; as `config.waiting` says if None.
    initial: the parameters to start from, on the host and the same in all processes; None: random ones.
  """

  def __init__(
    self, config: Config, federation: Federation, arch: model.Architecture, mesh: jax.sharding.Mesh,
    algorithm: rules.Algorithm, text_tokens: Mapping[str, int],
    validation: Sequence[tuple[np.ndarray, np.ndarray]] | None = None, home: jax.sharding.Mesh | None = None,
    initial: model.Params | None = None,
  ):
    self.config, self.federation, self.arch, self.mesh = config, federation, arch, mesh
    self.home, self._lanes = home or mesh, mesh.shape[partition.NODE]
    self.algorithm, self._initial = algorithm, initial
    self.topologies = self._topologies()
    if home is None:
      self.home = partition.choose_home(config.waiting, trees.num_bytes(self.abstract_state()), mesh)
      self.topologies = self._topologies()
    self.validation = validation
    self._text_tokens = text_tokens
    self._epochs = schedule.epochs(config, federation, text_tokens)
    self._num_rounds = config.rounds * len(schedule.stages(federation, config.schedule))
    self.nodes_at_once = config.nodes_at_once or partition.choose_nodes_at_once(
      max(len(level) for level in federation.levels), model.abstract_params(arch), self.abstract_state(), mesh,
      self.home,
    )
    logits_per_window = config.data.sequence_length * arch.vocab_size
    self._score_batch = int(np.clip(SCORE_LOGITS // logits_per_window, 1, SCORE_BATCH))
    self._nodes = [self._constants(level) for level in range(len(federation.levels))]
    self._protects = policy.any_updates(federation) or policy.any_examples(federation)
    levels = range(len(federation.levels)) if self._protects else ()
    self._guards = [policy.guards(federation, level, config.seed) for level in levels]
    self.compile_seconds = 0.0
    self._compiled: dict[tuple, Callable] = {}

  def _topologies(self) -> list[state_lib.Topology]:
    levels = range(len(self.federation.levels))
    governance = self.algorithm.governance
    return [state_lib.topology(self.federation, level, self.mesh, self.home, governance) for level in levels]

  def init(self) -> state_lib.State:
    """The state before the first round; every node starts from the same parameters."""
    key = rngs.key(self.config.seed, "init")
    spread = partition.shardings(jax.eval_shape(self._init, key), self.home)
    return jax.jit(self._init, out_shardings=spread)(key, self._initial)

  def initial_params(self) -> model.Params:
    """The parameters from which every node starts, those of one model."""
    return self._initial or jax.jit(functools.partial(model.init, self.arch))(rngs.key(self.config.seed, "init"))

  def abstract_state(self) -> state_lib.State:
    """The shapes, dtypes and shardings of the state, without computing it."""
    shapes = jax.eval_shape(self._init, rngs.key(self.config.seed, "init"))
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      shapes, partition.shardings(shapes, self.home),
    )

  def _init(self, key: jax.Array, initial: model.Params | None = None) -> state_lib.State:
    params = initial or model.init(self.arch, key)
    return state_lib.init(
      self.config, self.federation, self.topologies, params, self.algorithm.tracks, self.algorithm.governance
    )

  def down(
    self, state: state_lib.State, step: schedule.Step, round_index: int
  ) -> tuple[state_lib.State, rules.Log]:
    """The down-phase of `step.level`: the new state and the exchange's log."""
    level, topology = step.level, self.topologies[step.level]
    deeper = {j: r for j in topology.eligible if j > level and (r := state[j].residuals) is not None}
    above = state[level - 1] if level else None

    heard = {j: self._heard(step, j) for j in deeper}

    def phase(own, above, deeper, heard, nodes, phase):
      deeper = {j: sent._replace(present=sent.present & heard[j][:, None, None]) for j, sent in deeper.items()}
      return rules.down(self.algorithm, topology, own, above, deeper, nodes, phase)

    new, log = self._call(
      ("down", level), phase, state[level], above, deeper, heard, self._inputs(level, step, "down"),
      self._phase(step, round_index), mesh=self.home,
    )
    return state_lib.with_level(state, level, new), log

  def up(
    self, state: state_lib.State, step: schedule.Step, round_index: int
  ) -> tuple[state_lib.State, rules.Log]:
    """The up-phase of `step.level`."""
    level = step.level

    def phase(own, below, arrived, nodes, phase, guards):
      return rules.up(
        self.algorithm, self.topologies[level], own, below, arrived, self.topologies[level + 1], nodes, phase,
        guards and rules.Guards(*guards),
      )

    guards = None
    if self.algorithm.shares and policy.any_central(self.federation):
      guards = [jax.tree.map(functools.partial(self._pad, i), self._guards[i]) for i in (level, level + 1)]
    arrived = np.ones(len(self.federation.levels[level + 1]), np.float32) if step.arrived is None else step.arrived
    new, log = self._call(
      ("up", level), phase, state[level], state[level + 1], self._pad(level + 1, arrived),
      self._inputs(level, step, "up"),
      self._phase(step, round_index), guards, mesh=self.home,
    )
    return state_lib.with_level(state, level, new), log

  def move(self, state: state_lib.State, moves: Sequence[tuple[str, str]]) -> state_lib.State:
    """Copies all that nodes hold from one place to another; pairs of paths, from and to."""
    places = {m.path: (d, i) for d, members in enumerate(self.federation.levels) for i, m in enumerate(members)}
    for before, after in moves:
      (old, row), (new, to) = places[before], places[after]
      moved = self._call(("move", old, new), state_lib.with_copied, state[new], state[old], np.int32(to), np.int32(row),
                         mesh=self.home, donate=False, logs=False)
      state = state_lib.with_level(state, new, moved)
    return state

  def train(self, state: state_lib.State, level: int, work: local.Workload) -> tuple[state_lib.State, list[WaveLog]]:
    """Local training of a level, wave by wave; `work` has leaves `[n, ...]`.

    All levels share one compiled program as long as their waves and workloads have the same shape. Where nodes wait on
    the host, the last wave leaves and then the next one comes while a wave trains: two are on the device at a time.
    """
    whole = state[level]
    # What training does not touch stays behind.
    slim = whole._replace(server=(), handed=None, errors=None, residuals=None, received=None, kept=None)
    work = jax.tree.map(functools.partial(self._pad_host, level), work)
    guards = jax.tree.map(functools.partial(self._pad_host, level), self._guards[level]) if self._protects else None
    waves, logs = list(self._waves(level)), []
    ahead = self.home is not self.mesh
    fetched, trained = None, None
    for place, (start, rows, new) in enumerate(waves):
      wave = fetched or self._fetch(("take state", level), slim, start, len(rows))
      wave_work = jax.tree.map(lambda leaf, rows=rows: leaf[rows], work)
      wave_work = wave_work._replace(steps=np.where(new, wave_work.steps, 0))
      name = ("train", *wave_work.windows.shape)
      wave_guards = jax.tree.map(lambda leaf, rows=rows: leaf[rows], guards)
      wave, found = self._call(name, self._train_phase, wave, *self._put((wave_work, wave_guards), self.mesh))
      wave = self._settled(state_lib.handed(state, level), level, wave, start, rows, wave_work.steps > 0)
      # Only the last wave can hold rows of one before, and picking some costs as much as a short phase.
      logs.append(WaveLog(rows[new], *(found if new.all() else (array[new] for array in found))))
      if trained:
        slim = self._store(level, slim, *trained)
      fetched, trained = None, (wave, start)
      del wave
      if ahead and place + 1 < len(waves) and waves[place + 1][2].all():  # otherwise it holds rows of this one
        fetched = self._fetch(("take state", level), slim, waves[place + 1][0], len(rows))
      else:
        slim, trained = self._store(level, slim, *trained), None
    own = slim._replace(
      server=whole.server, handed=whole.handed, errors=whole.errors, residuals=whole.residuals, received=whole.received,
      kept=whole.kept,
    )
    return state_lib.with_level(state, level, own), logs

  def _fetch(self, name: tuple, tree: trees.PyTree, start: int, num_rows: int) -> trees.PyTree:
    """A wave of a tree that lies at home, on the mesh that trains."""
    size = num_rows // self._lanes
    take = functools.partial(partition.take_wave, size=size, lanes=self._lanes, mesh=self.home)
    return self._moved(self._call((*name, size), take, tree, np.int32(start), mesh=self.home, donate=False, logs=False))

  def _store(
    self, level: int, tree: state_lib.LevelState, wave: state_lib.LevelState, start: int
  ) -> state_lib.LevelState:
    """The inverse of `_fetch`: a level with the rows of a wave replaced."""
    wave = wave if self.home is self.mesh else partition.move(wave, self.home)
    put = functools.partial(partition.put_wave, lanes=self._lanes, mesh=self.home)
    return self._call(("put", level, len(wave.weight)), put, tree, wave, np.int32(start), mesh=self.home, logs=False)

  def _moved(self, wave: trees.PyTree) -> trees.PyTree:
    return wave if self.home is self.mesh else partition.move(wave, self.mesh)

  def _settled(
    self, handed: trees.PyTree, level: int, wave: state_lib.LevelState, start: int, rows: np.ndarray,
    trained: np.ndarray,
  ) -> state_lib.LevelState:
    """A wave with new trust for those who `trained` (bool `[w]`) and have a validation text to go by.

    `handed` is what `_handed` gives.
    """
    measures = wave.gain is not None
    if not ((self.algorithm.trusts or measures) and level and self.validation is not None):
      return wave
    windows, counts = (self._pad_host(level, array)[rows] for array in self.validation[level])
    may_trust = settling.may_trust(self.federation, level, self.topologies[level], self.algorithm.governance)
    validated = self._pad_host(level, may_trust)[rows]
    settles = trained & validated & (counts > 0)

    def parents_of_wave(handed: trees.PyTree, start: jax.Array) -> model.Params:
      return self._parents_of_wave(level, handed, start, len(rows) // self._lanes)

    parents = self._moved(self._call(("parents", level, len(rows)), parents_of_wave, handed, np.int32(start),
                                     mesh=self.home, donate=False, logs=False))

    def measured(function: Callable, what: str, before: jax.Array | None, who: np.ndarray) -> jax.Array:
      inputs = self._put((windows, counts, who), self.mesh)
      return self._call((what, len(rows)), function, before, wave.params, parents, *inputs, logs=False)

    if measures:
      gain = functools.partial(settling.gain, self.arch, self.mesh, self.algorithm.shares)
      wave = wave._replace(gain=measured(gain, "gain", wave.gain, trained & (counts > 0)))
    if self.algorithm.trusts:
      trust = functools.partial(settling.trust, self.arch, self.mesh)
      wave = wave._replace(trust=measured(trust, "settle", wave.trust, settles))
    return wave

  def _parents_of_wave(self, level: int, handed: trees.PyTree, start: jax.Array, size: int) -> model.Params:
    """Within a phase at home: the parents' models, as one wave of a level knows them; see `_handed`."""
    if self.algorithm.payload != "float32":
      return partition.take_wave(handed, start, size, self._lanes, self.home)
    topology = self.topologies[level]
    parent = partition.take_wave(jnp.asarray(topology.parent), start, size, self._lanes, self.home)
    return links.take_parents(handed, parent, topology.num_parents, self.home)

  def _used(self, state: state_lib.State, level: int, start: int, num_rows: int) -> model.Params:
    """The models in use of one wave of a level."""
    own, size = state[level], num_rows // self._lanes
    if not (self.algorithm.trusts and level):
      return self._fetch(("take params", level), own.params, start, num_rows)

    def used(own: trees.PyTree, handed: trees.PyTree, start: jax.Array) -> model.Params:
      params, trust = partition.take_wave(own, start, size, self._lanes, self.home)
      return trust_lib.used(params, self._parents_of_wave(level, handed, start, size), trust)

    found = self._call(("used", level, size), used, (own.params, own.trust), state_lib.handed(state, level),
                       np.int32(start), mesh=self.home, donate=False, logs=False)
    return self._moved(found)

  def _train_phase(
    self, own: state_lib.LevelState, work: local.Workload, guards: release.Guard | None
  ) -> tuple[state_lib.LevelState, tuple[jax.Array, jax.Array, jax.Array]]:
    examples = None
    if guards is not None and own.private is not None and policy.any_examples(self.federation):
      examples = examples_lib.of(guards, own.private)
    trained = local.train_nodes(self.arch, self.config.optimizer, self.mesh, own.params, own.opt_state, work, examples)
    took_part = trained.steps > 0
    if self.config.guards.failing == "leave_out":  # whose training failed stays as if it had not trained
      took_part &= trained.steps == work.steps
      before = own.params, own.opt_state
      params, opt_state = trees.where(took_part, (trained.params, trained.opt_state), before)
      trained = trained._replace(params=params, opt_state=opt_state)
    moved = {part: trees.subtract(trained.params[part], own.params[part]) for part in self.algorithm.tracks}
    if guards is not None and own.private is not None:
      params, moved, private = release.after_training(
        own.params, trained.params, moved, took_part, own.private, guards, self.mesh
      )
      trained = trained._replace(params=params)
      own = own._replace(private=trees.where(took_part, private, own.private))
    weight = work.weight if self.algorithm.weights == "text" else jnp.float32(trained.tokens)
    weight = jnp.where(took_part, weight, 0.0)
    new = own._replace(
      params=trained.params, opt_state=trained.opt_state, update=trees.where(took_part, moved, own.update),
      own_weight=own.own_weight + weight, weight=own.weight + weight,
      trained=own.trained | took_part, fresh=own.fresh | took_part,
    )
    return new, (trained.losses, trained.steps, trained.tokens)

  def score(
    self, state: state_lib.State, level: int, evaluation: Evaluation, mask: np.ndarray
  ) -> list[tuple[np.ndarray, jax.Array]]:
    """Scores the models in use of a level's nodes, where `mask` (bool `[n]`) holds, on all evaluation windows.

    Returns pairs of (rows, summed losses of these rows), to be added up by `scores_by_row`.
    """
    counts = self._pad_host(level, np.where(mask, evaluation.counts, 0))
    score = functools.partial(scoring.score_nodes, self.arch, self.mesh)
    size, found = min(self._score_batch, max(1, int(evaluation.counts.max(initial=0)))), []
    for start, rows, new in self._waves(level):
      wanted = np.where(new, counts[rows], 0)
      if not wanted.any():
        continue
      params = self._used(state, level, start, len(rows))
      for begin in range(0, int(wanted.max()), size):
        here = np.clip(wanted - begin, 0, size).astype(np.int32)
        arguments = params, *self._put((evaluation.take(rows, begin, here, size), here), self.mesh)
        found.append((rows, self._call(("score", len(rows), size), score, *arguments, donate=False, logs=False)))
    return found

  def _waves(self, level: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    size = partition.padded_size(len(self.federation.levels[level]), self.mesh)
    return partition.waves(size, self.nodes_at_once, self.mesh)

  def is_compiled(self, step: schedule.Step) -> bool:
    """Whether this step's program has been compiled before."""
    return any(name[0] == step.kind and (step.kind == "train" or name[1] == step.level) for name in self._compiled)

  def _inputs(self, level: int, step: schedule.Step, phase: str) -> rules.NodeInputs:
    return self._nodes[level][phase]._replace(active=self._pad(level, step.active), heard=self._heard(step, level))

  def _heard(self, step: schedule.Step, level: int) -> jax.Array:
    heard = (step.heard or {}).get(level)
    return self._pad(level, np.ones(len(self.federation.levels[level]), bool) if heard is None else heard)

  def _phase(self, step: schedule.Step, round_index: int) -> rules.PhaseInputs:
    return rules.PhaseInputs(np.int32(round_index), np.bool_(step.first_repeat), np.int32(self._num_rounds))

  def _constants(self, level: int) -> dict[str, rules.NodeInputs]:
    """What a level's nodes bring to the down- and the up-phase, but for who is active."""
    members = self.federation.levels[level]
    windows = np.zeros((len(members), 0, self.config.data.sequence_length + 1), np.int32)
    counts = np.zeros(len(members), np.int32)
    if self.validation is not None:
      windows, counts = self.validation[level]
    validated = np.array([m.settings.acceptance == "validated" for m in members])
    backbone = np.array([m.settings.backbone_independence for m in members], np.float32)
    key_layers = np.array([m.settings.key_layer_independence for m in members], np.float32)
    text = {m.path: self._text_tokens[m.path] for m in self.federation.members
            if m.path in self._text_tokens and not m.moved_from}
    behind = {m.path: set(text) for m in members}
    if self.algorithm.governance is not None:
      behind = self.algorithm.governance.behind(text)
    text_share, num_others = np.zeros((2, len(members)), np.float32)
    for i, m in enumerate(members):
      num_others[i] = len(behind[m.path] - {m.path})
      if m.path in self._text_tokens and behind[m.path]:
        text_share[i] = self._text_tokens[m.path] / sum(text[path] for path in behind[m.path])
    arrays = self._epochs[level], backbone, key_layers, text_share, num_others, validated, windows, counts
    shared = [self._pad(level, array) for array in arrays]
    temperatures = {
      "down": [m.settings.down_temperature for m in members], "up": [m.settings.up_temperature for m in members]
    }
    return {
      phase: rules.NodeInputs(None, None, self._pad(level, np.array(values, np.float32)), *shared)
      for phase, values in temperatures.items()
    }

  def _pad(self, level: int, array: np.ndarray) -> jax.Array:
    return self._put(self._pad_host(level, array), self.home)

  def _pad_host(self, level: int, array: np.ndarray) -> np.ndarray:
    assert len(array) == len(self.federation.levels[level])
    return partition.pad_nodes(array, self.mesh)

  def _put(self, tree: trees.PyTree, mesh: jax.sharding.Mesh) -> trees.PyTree:
    return partition.put(tree, mesh)

  def _call(
    self, name: tuple, phase: Callable, *args: Any, mesh: jax.sharding.Mesh | None = None, donate: bool = True,
    logs: bool = True,
  ) -> Any:
    """Calls the compiled phase; unless told otherwise, its first argument is given up to its first result.

    `mesh` is where it runs, that of training if None. `logs` says that the result is a pair, of which only the first
    is spread over the node axis.
    """
    if name not in self._compiled:
      begin = time.perf_counter()
      found = jax.eval_shape(phase, *args)
      spread = partition.shardings(found[0] if logs else found, mesh or self.mesh)
      jitted = jax.jit(phase, donate_argnums=0 if donate else (), out_shardings=(spread, None) if logs else spread)
      self._compiled[name] = jitted.lower(*args).compile()
      self.compile_seconds += time.perf_counter() - begin
    return self._compiled[name](*args)


def scores_by_row(found: list[tuple[np.ndarray, jax.Array]], num_nodes: int) -> np.ndarray:
  """Adds up what `Engine.score` found: float64 `[n]` summed losses in nats."""
  total = np.zeros(num_nodes)
  for rows, losses in jax.device_get(found):
    inside = rows < num_nodes
    np.add.at(total, rows[inside], np.asarray(losses, np.float64)[inside])
  return total
