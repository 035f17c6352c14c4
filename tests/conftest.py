"""Shared fixtures: 8 virtual CPU devices, strict numerics, tiny federations and a harness for their rounds."""

import importlib.metadata
import os

# Tests compile far longer than they run: the compiler is to be quick (its newer emitters alone take twice as long as
# those before them, which are gone in 0.11), and whatever it has made once is kept. The same holds for the processes
# that tests start, but for the number of devices.
os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys([
  *os.environ.get("XLA_FLAGS", "").split(), "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true", "--xla_cpu_parallel_codegen_split_count=1",
  *["--xla_cpu_use_fusion_emitters=false"] * importlib.metadata.version("jaxlib").startswith("0.10."),
]))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# XLA gives its CPU devices as many threads in all as there are devices, and a device that waits for the others in a
# collective keeps its thread: two collectives that do not depend on each other can wait for each other for ever.
os.environ["NPROC"] = "32"

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest

from worldlm_jax import (
  algorithms,
  attendance,
  checkpoint as checkpoint_lib,
  config as config_lib,
  engine as engine_lib,
  federation as federation_lib,
  feed,
  ledger as ledger_lib,
  local,
  model,
  oracle as oracle_lib,
  partition,
  schedule,
  train,
  workdir as workdir_lib,
)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A loaded machine is slow, which is no failure.
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tests")

VOCAB = 11
MAX_BATCH = 3


def tiny_config(root: config_lib.Node, **key_layers: Any) -> config_lib.Config:
  """A model of 3 small blocks, 2 of them key layers, over windows of 7 + 1 tokens."""
  config = config_lib.Config(
    model=config_lib.ModelConfig(num_layers=3, d_model=12, num_heads=3, num_kv_heads=1, d_ff=17, key_layer_share=0.6),
    data=config_lib.DataConfig(sequence_length=7),
    key_layers=config_lib.KeyLayerConfig(**key_layers),
    # A large epsilon keeps Adam from blowing rounding errors of tiny gradients up to whole steps.
    optimizer=config_lib.OptimizerConfig(epsilon=1e-3),
    inner_text="before",
  )
  config.federation.root = root
  config.node = config_lib.NodeSettings(
    local_steps=2, batch_size=2, learning_rate=0.01, warmup_steps=1,
    backbone_independence=0.0, key_layer_independence=math.inf, trust="full",  # shared for ever, and never
  )
  return config


def node(name: str, *children: config_lib.Node, data: bool = True, **settings: Any) -> config_lib.Node:
  """A node of a test tree; its text is never read."""
  return config_lib.Node(name, config_lib.Files("unread") if data else None, list(children), settings)


def windows_of(path: str, step: int) -> np.ndarray:
  """The batch of a node's step: int32 `[MAX_BATCH, 8]`, from the path and the step alone."""
  seed = [*path.encode(), step]
  return np.random.default_rng(seed).integers(0, VOCAB, (MAX_BATCH, 8)).astype(np.int32)


def text_tokens_of(path: str) -> int:
  """How much text a node has, as far as weights and epochs go; its batches come from `windows_of`."""
  return 40 + sum(path.encode()) % 97


@dataclasses.dataclass
class Harness:
  """Runs rounds of the engine, and of the oracle, on the same synthetic batches."""

  config: config_lib.Config
  num_devices: int = 1
  former: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> the path whose text the node has
  fsdp: int = 1
  tensor: int = 1
  on_host: bool = False  # nodes wait on the last device

  def __post_init__(self) -> None:
    self.config = algorithms.adapted(self.config)
    self.federation = algorithms.arranged(self.config, federation_lib.resolve(self.config))
    self.arch = model.architecture(self.config.model, VOCAB, num_key_layers=algorithms.num_key_layers(self.config))
    self.text_tokens = {m.path: text_tokens_of(self.former.get(m.path, m.identity)) for m in self.federation.members
                        if m.data}
    mesh = partition.make_mesh(jax.devices()[: self.num_devices], self.fsdp, self.tensor)
    self.validation = {
      m.path: windows_of("validation of " + self.former.get(m.path, m.identity), 0)
      for m in self.federation.members if m.data
    }
    self.engine = engine_lib.Engine(
      self.config, self.federation, self.arch, mesh, algorithms.make(self.config, self.arch, self.federation),
      self.text_tokens, self._validation_arrays(), partition.make_mesh(jax.devices()[-1:]) if self.on_host else None,
    )
    self.state = self.engine.init()
    self.logs: list[tuple[str, int, Any]] = []
    self.positions = dict.fromkeys((m.identity for m in self.federation.members), 0)
    self.attends = attendance.Attendance(self.config.seed, self.federation)

  def _validation_arrays(self) -> list[tuple[np.ndarray, np.ndarray]]:
    empty = np.zeros((MAX_BATCH, 8), np.int32)
    return [
      (np.stack([self.validation.get(m.path, empty) for m in level]),
       np.array([MAX_BATCH * (m.path in self.validation) for m in level], np.int32))
      for level in self.federation.levels
    ]

  def rate(self, path: str, step: int) -> float:
    """The learning rate of a step: the node's peak, falling a little."""
    peak = next(m.settings.learning_rate for m in self.federation.members if m.path == path)
    return peak / (1 + 0.1 * step)

  def workload(self, step: schedule.Step) -> local.Workload:
    """What the nodes of a training step are to do."""
    members = self.federation.levels[step.level]
    taken = [self.positions[m.identity] for m in members]
    for m, active in zip(members, step.active, strict=True):
      self.positions[m.identity] += int(active) * m.settings.local_steps
    most, batch, _ = feed.workload_shape(self.federation, step.level, self.config.optimizer.microbatch_size, 7)
    texts = [self.former.get(m.path, m.identity) for m in members]
    windows = np.array([[windows_of(text, taken[i] + s) for s in range(most)] for i, text in enumerate(texts)])
    windows = np.pad(windows, [(0, 0), (0, 0), (0, max(0, batch - MAX_BATCH)), (0, 0)])[:, :, :batch]
    return local.Workload(
      windows,
      np.array([[self.rate(m.path, taken[i] + s) for s in range(most)] for i, m in enumerate(members)], np.float32),
      np.array([m.settings.local_steps for m in members], np.int32) * step.active,
      np.array([m.settings.batch_size for m in members], np.int32),
      np.array([m.settings.weight_decay for m in members], np.float32),
      np.array([m.settings.clip_norm for m in members], np.float32),
      np.array([self.text_tokens.get(m.path, 0) for m in members], np.float32),
    )

  def round(self, index: int, stage: int | None = None, absent: Collection[str] = ()) -> None:
    """One round of the engine."""
    self.attends.absent = absent
    self.state = self.engine.move(self.state, self.federation.moves(index))
    for step in schedule.round_steps(self.federation, stage, self.attends, index):
      if step.kind == "down":
        self.state, log = self.engine.down(self.state, step, index)
      elif step.kind == "train":
        self.state, log = self.engine.train(self.state, step.level, self.workload(step))
      else:
        self.state, log = self.engine.up(self.state, step, index)
      self.logs.append((step.kind, step.level, jax.device_get(log)))

  def oracle(self) -> oracle_lib.Oracle:
    """The oracle with the same start, batches and rates."""
    params = jax.device_get(jax.tree.map(lambda leaf: leaf[0], self.engine.init()[0].params))
    return oracle_lib.Oracle(
      self.config, self.federation, self.arch, params, windows_of, self.rate, self.text_tokens, self.validation
    )

  def params(self) -> dict[str, model.Params]:
    """Each node's parameters by path."""
    fetched = [jax.device_get(level.params) for level in self.state]
    return {
      m.path: jax.tree.map(lambda leaf, i=i: leaf[i], fetched[d])
      for d, level in enumerate(self.federation.levels) for i, m in enumerate(level)
    }


def run(
  config: config_lib.Config, rounds: int = 2, num_devices: int = 1, absent: Sequence[Collection[str]] = (),
  **mesh: int,
) -> Harness:
  """A harness after some rounds; `absent[r]` are the nodes missing in round r."""
  harness = Harness(config, num_devices, **mesh)
  index = 0
  for stage in schedule.stages(harness.federation, config.schedule):
    for _ in range(rounds):
      harness.round(index, stage, absent[index] if index < len(absent) else ())
      index += 1
  return harness


def write_run(folder: Path, **settings: Any) -> Harness:
  """A work directory as an unfinished run leaves it after two rounds, with arbitrary numbers for a state.

  Bytes are its tokens. The harness has the state; some nodes lie between their parents and their own training.
  """
  config = tiny_config(
    node("world", node("a"), node("b", node("p"), node("q"), data=False), trust="validated")
  )
  config.model.vocab_size = 257
  for name, value in settings.items():
    setattr(config, name, value)
  harness = Harness(config, num_devices=2)
  federation, draw, trusts = harness.federation, np.random.default_rng(0), np.float32([1.0, 0.25, 0.0, 0.75, 0.5])

  def arbitrary(leaf: jax.Array) -> jax.Array:
    return jax.device_put(draw.normal(size=leaf.shape).astype(np.float32), leaf.sharding)

  levels = []
  for number, level in enumerate(harness.state):
    level = level._replace(params=jax.tree.map(arbitrary, level.params), handed=jax.tree.map(arbitrary, level.handed))
    if harness.engine.algorithm.trusts and number:
      level = level._replace(trust=jax.device_put(np.resize(trusts, level.trust.shape), level.trust.sharding))
    levels.append(level)
  harness.state = tuple(levels)
  workdir_lib.claim(folder, workdir_lib.describe(harness.config, federation, {}), overwrite=False)
  checkpoints = checkpoint_lib.Checkpoints(folder / "checkpoints", config.checkpoint, federation)
  for index in (1, 2):
    record = ledger_lib.Progress(index, 0, tokens={m.path: 7 * index for m in federation.members})
    checkpoints.save(10_000 * index, harness.state, vars(record), None)
  checkpoints.wait()
  checkpoints.close()
  return harness


def assert_trees_close(actual: Any, expected: Any, atol: float, message: str = "") -> None:
  """Leaf by leaf, naming the leaf."""
  for (path, a), (_, e) in zip(
    jax.tree_util.tree_leaves_with_path(actual), jax.tree_util.tree_leaves_with_path(expected), strict=True
  ):
    np.testing.assert_allclose(a, e, atol=atol, rtol=0, err_msg=f"{message}{jax.tree_util.keystr(path)}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  """Leaves out what is not asked for; files with slow tests come first, lest a worker has one left at the end."""
  if "exhaustive" not in config.getoption("markexpr"):
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
  slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
  items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
  """Tokenised texts are kept away from the user's own."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield


@pytest.fixture(scope="module")
def share_programs() -> Iterator[None]:
  """Engines of the same config and mesh share what they have compiled, as long as a module's tests run."""
  programs: dict[str, dict] = {}
  begin = engine_lib.Engine.__init__

  def begin_with_programs(self: engine_lib.Engine, config: config_lib.Config, *others: Any, **named: Any) -> None:
    begin(self, config, *others, **named)
    key = json.dumps(config_lib.to_dict(config), sort_keys=True) + str(self.mesh) + str(self.home)
    self._compiled = programs.setdefault(key, self._compiled)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine_lib.Engine, "__init__", begin_with_programs)
    yield


@pytest.fixture(scope="module")
def on_one_device(share_programs: None) -> Iterator[None]:
  """Runs in this process are on one device, as those in others are, and runs of one config compile once.

  Runs on more devices are multihost_test's and plan_test's.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "_mesh", lambda *_: partition.make_mesh(jax.devices()[:1]))
    yield


@pytest.fixture(scope="session")
def rounds() -> Any:
  """The helpers above as one namespace (tests cannot import each other)."""
  import types

  names: list[Callable] = [tiny_config, node, run, Harness, write_run, assert_trees_close, windows_of]
  return types.SimpleNamespace(**{f.__name__: f for f in names}, vocab=VOCAB)


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Harness]:
  """What `write_run` makes, for tests that read only."""
  folder = tmp_path_factory.mktemp("stored") / "run"
  return folder, write_run(folder)
