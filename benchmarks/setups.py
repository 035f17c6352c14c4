"""What the benchmarks run: federations of random text on the engine, and the bare training loop that is their rival."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from worldlm_jax import algorithms, config as c, engine, federation as federation_lib, local, model, partition, schedule

VOCABULARY = 257  # of bytes
MODELS: dict[str, Callable[[], c.ModelConfig]] = {
  **model.PRESETS,
  "10m": lambda: c.ModelConfig(num_layers=8, d_model=320, num_heads=8, num_kv_heads=8, d_ff=864, vocab_size=1024),
}

LocalSteps = Callable[[model.Params, Any, jax.Array, jax.Array], tuple[model.Params, Any, jax.Array]]


def config(
  size: str, branching: tuple[int, ...], *, local_steps: int, batch_size: int, sequence_length: int, rounds: int = 100,
  algorithm: str = "worldlm", trust: str = "full",
) -> c.Config:
  """A tree whose leaves have artificial text. Nothing is scored beyond one window per node."""
  return c.Config(
    algorithm=algorithm, rounds=rounds, model=MODELS[size](), data=c.DataConfig(sequence_length=sequence_length),
    federation=c.FederationConfig(synthetic=c.SyntheticTree(branching, train_bytes=200_000, eval_bytes=20_000)),
    node=c.NodeSettings(local_steps=local_steps, batch_size=batch_size, trust=trust),
    evaluation=c.EvaluationConfig(valid_windows=1, test_windows=1, matrix_windows=0),
    checkpoint=c.CheckpointConfig(every_rounds=rounds, keep_last=1, keep_best=0),
    logging=c.LoggingConfig(tensorboard=False),
  )


class Rounds:
  """A federation on one device: rounds as the training program makes them, without its files, logs and scores.

  Texts are random tokens of `VOCABULARY`; every node with text has a different amount of it.
  """

  def __init__(self, config: c.Config):
    self.config = config = algorithms.adapted(config)
    self.federation = algorithms.arranged(config, federation_lib.resolve(config))
    self.arch = model.architecture(config.model, VOCABULARY, num_key_layers=algorithms.num_key_layers(config))
    algorithm = algorithms.make(config, self.arch, self.federation)
    texts = [m.path for m in self.federation.members if m.data]
    self.text_tokens = {path: 1000 * (i + 1) for i, path in enumerate(texts)}
    self.engine = engine.Engine(
      config, self.federation, self.arch, partition.make_mesh(jax.devices()[:1]), algorithm, self.text_tokens,
      [self._validation(level) for level in self.federation.levels] if algorithm.needs_validation else None,
    )
    self.steps = schedule.round_steps(self.federation, None)
    self.index = 0
    spread = jax.tree.map(lambda leaf: leaf.sharding, self.engine.abstract_state())
    self._init = jax.jit(self.engine.init, out_shardings=spread)
    self.begin()

  def begin(self) -> None:
    """Starts from the initial state; compiles the first time only."""
    self.state: Any = self._init()

  def end(self) -> None:
    """Lets go of all arrays but validation windows."""
    self.state = None

  @property
  def tokens(self) -> int:
    """How many are trained on in a round."""
    settings = self.config.node
    return len(self.text_tokens) * settings.local_steps * settings.batch_size * self.config.data.sequence_length

  def round(self) -> Any:
    """One round; gives the new state of the federation."""
    for _ in self.phases():
      pass
    return self.state

  def phases(self) -> Iterator[str]:
    """One round, phase by phase: the kind of each as soon as it is on its way."""
    for step in self.steps:
      if step.kind == "down":
        self.state, _ = self.engine.down(self.state, step, self.index)
      elif step.kind == "train":
        self.state, _ = self.engine.train(self.state, step.level, self.workload(step))
      else:
        self.state, _ = self.engine.up(self.state, step, self.index)
      yield step.kind
    self.index += 1

  def workload(self, step: schedule.Step) -> local.Workload:
    """What the nodes of a training step do in every round: leaves `[n, ...]`."""
    settings, members = self.config.node, self.federation.levels[step.level]
    full = lambda value, dtype: np.full(len(members), value, dtype)
    return local.Workload(
      random_windows(self.config, len(members)), np.tile(rates(self.config), (len(members), 1)),
      settings.local_steps * step.active.astype(np.int32), full(settings.batch_size, np.int32),
      full(settings.weight_decay, np.float32), full(settings.clip_norm, np.float32),
      np.array([self.text_tokens.get(m.path, 0) for m in members], np.float32),
    )

  def _validation(self, level: tuple[federation_lib.Member, ...]) -> tuple[np.ndarray, np.ndarray]:
    count = self.config.evaluation.acceptance_windows
    windows = np.random.default_rng(1).integers(
      0, VOCABULARY, (len(level), count, self.config.data.sequence_length + 1), np.int32
    )
    return windows, np.array([count * (m.data is not None) for m in level], np.int32)


def random_windows(config: c.Config, num_nodes: int) -> np.ndarray:
  """A round's windows of some nodes: int32 `[n, S, B, W]`."""
  shape = num_nodes, config.node.local_steps, config.node.batch_size, config.data.sequence_length + 1
  return np.random.default_rng(0).integers(0, VOCABULARY, shape, np.int32)


def rates(config: c.Config) -> np.ndarray:
  """The learning rates of a node's first round: float32 `[S]`."""
  return local.learning_rates(config.node, config.rounds * config.node.local_steps)[: config.node.local_steps]


def adamw(config: c.Config) -> optax.GradientTransformation:
  """The nodes' optimizer, as one would write it in Optax: up to the learning rate."""
  settings, own = config.node, config.optimizer
  matrices = lambda params: jax.tree_util.tree_map_with_path(
    lambda path, _: "norm" not in jax.tree_util.keystr(path), params)
  return optax.chain(
    optax.clip_by_global_norm(settings.clip_norm), optax.scale_by_adam(own.b1, own.b2, own.epsilon),
    optax.add_decayed_weights(settings.weight_decay, mask=matrices),
  )


def local_steps(arch: model.Architecture, config: c.Config) -> LocalSteps:
  """A plain Optax loop: (params, state, windows `[S, B, W]`, rates `[S]`) -> params, state and losses `[S]`.

  The least that training takes: one scan over the steps, all windows full, nothing checked and nothing counted.
  """
  tx, all_rows = adamw(config), jnp.ones(config.node.batch_size, bool)
  tokens = config.node.batch_size * config.data.sequence_length

  def step(carry: tuple[model.Params, Any], batch: tuple[jax.Array, jax.Array]) -> tuple[tuple, jax.Array]:
    (params, state), (windows, rate) = carry, batch
    loss, grads = jax.value_and_grad(lambda p: model.loss_sum(arch, p, windows, all_rows) / tokens)(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates)), state), loss

  def loop(params: model.Params, state: Any, windows: jax.Array, rates: jax.Array) -> tuple:
    (params, state), losses = jax.lax.scan(step, (params, state), (windows, rates))
    return params, state, losses

  return loop


class BareLoop:
  """One node that trains alone: jitted, donated, its windows on the device already."""

  def __init__(self, arch: model.Architecture, config: c.Config, windows: np.ndarray):
    self.windows, self.rates = jnp.asarray(windows), jnp.asarray(rates(config))
    self._loop: Any = jax.jit(local_steps(arch, config), donate_argnums=(0, 1))
    self._init = jax.jit(lambda key: (params := model.init(arch, key), adamw(config).init(params)))
    self.begin()

  def begin(self) -> None:
    """Starts from initial parameters; compiles the first time only."""
    self.params, self.state = self._init(jax.random.key(0))

  def end(self) -> None:
    """Lets go of parameters and moments."""
    self.params = self.state = None

  def compile(self) -> None:
    """Compiles the loop, ahead of its first round."""
    self._loop = self._loop.lower(self.params, self.state, self.windows, self.rates).compile()

  def round(self) -> jax.Array:
    """As many steps as a node makes in a round; gives their losses."""
    self.params, self.state, losses = self._loop(self.params, self.state, self.windows, self.rates)
    return losses
