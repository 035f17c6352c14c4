"""Law 6: the vectorised engine equals the plain Python loop over nodes; and the same on 8 devices."""

import contextlib
import logging
import math
from typing import NamedTuple

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from worldlm_jax import config as config_lib, federation as federation_lib, model, schedule


def ragged(rounds, **root):
  """Three levels, ragged, data at the root and at one inner node, unequal steps and batches."""
  node = rounds.node
  return node(
    "world",
    node("a", node("p"), node("q", local_steps=3, batch_size=3), node("r", learning_rate=0.02), data=False,
         rounds_per_parent_round=2),
    node("b", node("s"), node("t", local_steps=1, weight_decay=0.0)),
    node("c", clip_norm=0.1),
    **root,
  )


ABSENT = (("a/q", "b"), ("a",), ("a/p", "a/q", "a/r", "b/t"))
PRESENT = ([True, False, True], [False, True, True], [False, True, True])  # a, b and c: who counts at the root then
KEEPERS = ("a", "a/p", "c")  # whose temperature is zero on the way down, where layers are compared by a cosine


def with_mode(config, mode):
  """Changes a config by what a case of `test_engine_equals_the_loop` tests beside its key layers."""
  if mode == "sequential":
    config.schedule = "sequential"
  elif mode == "server":
    config.backbone.weights, config.backbone.server_optimizer = "uniform", "nesterov"
    config.backbone.server_learning_rate = 0.7
  elif mode == "acceptance":
    config.node.acceptance = "validated"
    config.federation.overrides["b"] = {"acceptance": "always"}
  elif mode == "moments, tokens":
    config.optimizer.moments, config.optimizer.microbatch_size = "reset", 2
    config.backbone.weights = "tokens"
  elif mode == "independence":  # some take their parent's for one round more than others, or one part of it
    config.node.backbone_independence, config.node.key_layer_independence = 3.0, 1.0
    config.federation.overrides |= {"c": {"backbone_independence": math.inf}, "b": {"key_layer_independence": 0.0}}
  elif mode == "no key layers":
    config.model.key_layer_share = 0.0


def check_against_oracle(rounds, config, num_rounds=2, absent=(), num_devices=1):
  """Runs both; gives the harness of the engine."""
  harness = rounds.run(config, num_rounds, num_devices, absent)
  oracle = harness.oracle()
  index = 0
  for stage in schedule.stages(harness.federation, config.schedule):
    for _ in range(num_rounds):
      oracle.round(index, stage, absent[index] if index < len(absent) else ())
      index += 1
  for path, params in harness.params().items():
    rounds.assert_trees_close(params, oracle.params(path), 2e-5, f"node {path}: ")
  return harness


@pytest.mark.parametrize(("key_layers", "mode", "num_devices"), [
  ({"values": "layers", "similarity": "param_cosine"}, "sequential", 1),
  pytest.param({"values": "layers", "similarity": "scaled_dot", "granularity": "tensor"}, "moments, tokens", 8,
               marks=pytest.mark.exhaustive),
  ({"values": "layers", "similarity": "centered_cosine", "prior": "weights"}, "absent", 1),
  ({"values": "layers", "similarity": "update_cosine", "granularity": "all", "residuals_per_layer": 2}, "server", 1),
  ({"values": "layers", "similarity": "validation_loss", "residuals_received": 2}, "acceptance", 1),
  ({"candidates": "both", "update_threshold": -0.2}, "acceptance", 1),
  ({"candidates": "siblings", "granularity": "tensor", "update_strength": 2.0, "residuals_per_layer": 2}, "absent", 1),
  ({"candidates": "both", "granularity": "all", "residuals_per_layer": 0, "update_threshold": -1.0}, "independence", 1),
  ({"update_threshold": -1.0}, "independence", 1),
  ({}, "no key layers", 1),
], ids=str)
def test_engine_equals_the_loop(rounds, key_layers, mode, num_devices):
  """Each way of comparing and mixing key layers, each together with something else that is not the default."""
  config = rounds.tiny_config(ragged(rounds), **key_layers)
  with_mode(config, mode)
  by_cosine = key_layers.get("similarity", "").endswith("cosine")
  if by_cosine:
    usual = {"down_temperature": config.node.down_temperature}
    config.federation.overrides |= {path: {"down_temperature": 0.0} for path in KEEPERS} | {"a/q": usual, "a/r": usual}
  absent = ABSENT if mode == "absent" else ()
  num_rounds = 3 if mode in ("absent", "independence") else 2
  harness = check_against_oracle(rounds, config, num_rounds, absent, num_devices)
  if key_layers.get("values") == "layers":
    check_attention_sums_to_one(harness, mode not in ("absent", "sequential"), PRESENT if absent else ())
  if by_cosine:
    check_keepers_keep_their_own(harness)
  if num_devices == 8:
    leaf = harness.state[2].params["backbone"]["embedding"]
    assert len({shard.device for shard in leaf.addressable_shards}) == 8
    assert leaf.addressable_shards[0].data.shape[0] == 1  # 5 nodes and 3 ghosts, one per device


def check_attention_sums_to_one(harness, everybody, present):
  """Or to zero where not `everybody` takes part; `present` says for each round who gets anything at the root."""
  at_the_root = []
  for kind, level, log in harness.logs:
    if "weights" in log:
      total = log["weights"].sum(axis=1)
      taking_part = np.zeros(len(total), bool)
      federations = harness.federation.is_federation(level)
      taking_part[: len(federations)] = federations if kind == "up" else True
      np.testing.assert_allclose(total[taking_part], 1 if everybody else total[taking_part] > 0.5, atol=1e-6)
      at_the_root += [log["weights"][0]] if (kind, level) == ("up", 0) else []
  assert at_the_root
  for weights, there in zip(at_the_root, present, strict=bool(present)):  # candidates: itself, a, b and c
    assert [bool(np.any(w)) for w in weights[1:]] == there


def check_keepers_keep_their_own(harness):
  """By any cosine, also federations without text, and although rounding may favour another."""
  down = [(level, log["weights"]) for kind, level, log in harness.logs if kind == "down" and level]
  assert down
  for level, weights in down:
    for row, member in enumerate(harness.federation.levels[level]):
      if member.path in KEEPERS:
        np.testing.assert_array_equal(weights[row, 0], 1)
        np.testing.assert_array_equal(weights[row, 1:], 0)


def random_trees():
  """Trees of up to three levels below the root with settings that differ from node to node."""
  def settings(draw):
    return {
      "local_steps": draw(st.integers(0, 3)), "batch_size": draw(st.integers(1, 3)),
      "rounds_per_parent_round": draw(st.integers(1, 2)),
      "down_temperature": draw(st.sampled_from([0.0, 0.3, math.inf])),
    }

  def grow(draw, name, depth):
    size = draw(st.integers(0, 3 if depth else 2)) if depth < 3 else 0
    children = [grow(draw, f"n{i}", depth + 1) for i in range(size)]
    data = config_lib.Files("unread") if not children or draw(st.booleans()) else None
    return config_lib.Node(name, data, children, settings(draw))

  return st.composite(lambda draw: grow(draw, "root", 0))()


@pytest.mark.slow
@hypothesis.settings(
  max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(root=random_trees(), values=st.sampled_from(["layers", "updates"]), data=st.data(),
                  independence=st.sampled_from([(0.0, math.inf), (3.0, 1.0)]))
def test_engine_equals_the_loop_on_random_trees(rounds, root, values, data, independence):
  config = rounds.tiny_config(root, values=values, update_threshold=-0.1)
  config.node.backbone_independence, config.node.key_layer_independence = independence
  paths = [m.path for m in federation_lib.resolve(config).members[1:]]
  absent = [data.draw(st.lists(st.sampled_from(paths), max_size=2)) for _ in range(2)] if paths else ()
  check_against_oracle(rounds, config, absent=absent)


class Usual(NamedTuple):
  """What came of the usual config on `ragged`."""

  params: dict  # of every node, after two rounds
  compiled: list[str]  # in the second round, and in a third from which some were absent


@pytest.fixture(scope="module")
def usual(rounds):
  harness, compiled = rounds.run(rounds.tiny_config(ragged(rounds)), rounds=1), []
  before = set(harness.engine._compiled)
  with jax_log_compiles(compiled):
    harness.round(1)
  params = harness.params()
  with jax_log_compiles(compiled):
    harness.round(2, absent=("a", "b/t"))
  return Usual(params, compiled + [str(name) for name in set(harness.engine._compiled) - before])


def test_round_two_compiles_nothing(usual):
  assert not usual.compiled


def test_waves_give_the_result_of_all_at_once(rounds, usual):
  """On CPUs one node trains at a time; 2 does not divide the 5 nodes of the lowest level."""
  config = rounds.tiny_config(ragged(rounds))
  config.nodes_at_once = 2
  for path, params in rounds.run(config).params().items():
    rounds.assert_trees_close(params, usual.params[path], 1e-6, f"node {path}: ")


@contextlib.contextmanager
def jax_log_compiles(found):
  """Collects the name of every XLA compilation."""
  class Handler(logging.Handler):
    def emit(self, record):
      if "Compiling" in record.getMessage():
        found.append(record.getMessage()[:80])

  handler, logger = Handler(), logging.getLogger("jax")
  logger.addHandler(handler)
  try:
    with jax.log_compiles():
      yield
  finally:
    logger.removeHandler(handler)


def test_other_names_and_another_order_of_siblings_change_nothing_else(rounds, usual):
  node = rounds.node
  config = rounds.tiny_config(node(
    "w",
    node("x", clip_norm=0.1),
    node("y", node("1", local_steps=1, weight_decay=0.0), node("2")),
    node("z", node("q", learning_rate=0.02), node("r"), node("p", local_steps=3, batch_size=3), data=False,
         rounds_per_parent_round=2),
  ))
  former = {"x": "c", "y": "b", "y/1": "b/t", "y/2": "b/s", "z": "a", "z/q": "a/r", "z/r": "a/p", "z/p": "a/q"}
  other = rounds.Harness(config, former=former)
  for index in range(2):
    other.round(index)
  assert {former.get(path, path) for path in other.params()} == set(usual.params)
  for path, params in other.params().items():
    rounds.assert_trees_close(params, usual.params[former.get(path, path)], 1e-5, f"node {path}: ")


def test_one_sgd_step_of_fedavg_is_one_step_on_the_joint_batch(rounds):
  """Law 5: plain SGD, one step, token-weighted mean of unequal batches."""
  node = rounds.node
  config = rounds.tiny_config(node("server", node("a", batch_size=1), node("b", batch_size=3), node("c"), data=False))
  config.model.key_layer_share, config.backbone.weights = 0.0, "tokens"
  config.optimizer.name = "sgd"
  config.node.local_steps, config.node.learning_rate, config.node.clip_norm = 1, 0.5, math.inf
  harness = rounds.Harness(config)
  before = harness.params()["."]
  harness.round(0)
  joint = np.concatenate([rounds.windows_of(path, 0)[:size] for path, size in (("a", 1), ("b", 3), ("c", 2))])

  def loss(params):
    return model.loss_sum(harness.arch, params, joint, np.ones(6, bool)) / (6 * 7)

  expected = jax.tree.map(lambda p, g: p - 0.5 * g, before, jax.grad(loss)(before))
  rounds.assert_trees_close(harness.params()["."], expected, 1e-6)


def test_identical_siblings_stay_identical_and_their_federation_joins_them(rounds):
  """Law 1 through a whole round: with the same data everywhere, exchange changes nothing."""
  node = rounds.node
  tree = node("world", node("a"), node("b"), data=False)
  harness = rounds.Harness(rounds.tiny_config(tree, values="layers", similarity="param_cosine"))
  real = harness.workload
  harness.workload = lambda step: jax.tree.map(lambda leaf: np.stack([leaf[0]] * len(leaf)), real(step))
  harness.round(0)
  params = harness.params()
  rounds.assert_trees_close(params["a"], params["b"], 0)
  rounds.assert_trees_close(params["."], params["a"], 1e-6)
