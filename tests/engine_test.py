"""Law 6: the vectorised engine equals the plain Python loop over nodes; and the same on 8 devices."""

import contextlib
import logging
import math

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


def check_against_oracle(rounds, config, num_rounds=2, absent=(), atol=2e-5):
  harness = rounds.run(config, num_rounds, absent=absent)
  oracle = harness.oracle()
  index = 0
  for stage in schedule.stages(harness.federation, config.schedule):
    for _ in range(num_rounds):
      oracle.round(index, stage, absent[index] if index < len(absent) else ())
      index += 1
  for path, params in harness.params().items():
    rounds.assert_trees_close(params, oracle.params(path), atol, f"node {path}: ")


@pytest.mark.parametrize("key_layers", [
  {"values": "layers", "similarity": "param_cosine"},
  {"values": "layers", "similarity": "scaled_dot", "granularity": "tensor"},
  {"values": "layers", "similarity": "centered_cosine", "prior": "weights"},
  {"values": "layers", "similarity": "update_cosine", "granularity": "all", "residuals_per_layer": 2},
  {"values": "layers", "similarity": "validation_loss", "residuals_received": 2},
  {"values": "updates", "update_threshold": -0.2},
  {"values": "updates", "granularity": "tensor", "update_strength": 2.0, "residuals_per_layer": 2},
  {"values": "updates", "granularity": "all", "residuals_per_layer": 0},
], ids=lambda options: " ".join(map(str, options.values())))
def test_engine_equals_the_loop(rounds, key_layers):
  check_against_oracle(rounds, rounds.tiny_config(ragged(rounds), **key_layers))


@pytest.mark.parametrize("change", [
  "sequential", "absent", "server", "acceptance", "acceptance of updates", "moments", "no key layers", "tokens",
  "independence",
])
def test_engine_equals_the_loop_in_every_mode(rounds, change):
  config = rounds.tiny_config(ragged(rounds), values="layers", similarity="param_cosine")
  absent = ()
  if change == "sequential":
    config.schedule = "sequential"
  elif change == "absent":
    absent = [("a/q", "b"), ("a",), ("a/p", "a/q", "a/r", "b/t")]
  elif change == "server":
    config.backbone.weights, config.backbone.server_optimizer = "uniform", "nesterov"
    config.backbone.server_learning_rate = 0.7
  elif change.startswith("acceptance"):
    if change.endswith("updates"):
      config.key_layers = config_lib.KeyLayerConfig(update_threshold=-1.0)
    config.node.acceptance = "validated"
    config.federation.overrides = {"b": {"acceptance": "always"}}
  elif change == "moments":
    config.optimizer.moments, config.optimizer.microbatch_size = "reset", 2
  elif change == "tokens":
    config.backbone.weights = "tokens"
  elif change.startswith("independence"):  # some take their parent's for one round more than others, or one part of it
    config.key_layers = config_lib.KeyLayerConfig(update_threshold=-1.0)
    config.node.backbone_independence, config.node.key_layer_independence = 40.0, 12.0
    config.federation.overrides = {"c": {"backbone_independence": math.inf}, "b": {"key_layer_independence": 0.0}}
  else:
    config.model.key_layer_share = 0.0
  num_rounds = 3 if absent or change.startswith("independence") else 2
  check_against_oracle(rounds, config, num_rounds=num_rounds, absent=absent)


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


@pytest.mark.parametrize("similarity", ["param_cosine", "centered_cosine", "update_cosine"])
def test_down_temperature_zero_keeps_ones_own_layers(rounds, similarity):
  """By any cosine, also for federations without text, and although rounding may favour another."""
  config = rounds.tiny_config(ragged(rounds), values="layers", similarity=similarity)
  config.node.down_temperature = 0.0
  harness = rounds.run(config, rounds=2)
  down = [log["weights"] for kind, level, log in harness.logs if kind == "down" and level]
  assert down
  for weights in down:
    np.testing.assert_array_equal(weights[:, 0], 1)
    np.testing.assert_array_equal(weights[:, 1:], 0)


@pytest.mark.slow
@hypothesis.settings(
  max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(root=random_trees(), values=st.sampled_from(["layers", "updates"]), data=st.data(),
                  independence=st.sampled_from([(0.0, math.inf), (30.0, 10.0)]))
def test_engine_equals_the_loop_on_random_trees(rounds, root, values, data, independence):
  config = rounds.tiny_config(root, values=values, update_threshold=-0.1)
  config.node.backbone_independence, config.node.key_layer_independence = independence
  paths = [m.path for m in federation_lib.resolve(config).members[1:]]
  absent = [data.draw(st.lists(st.sampled_from(paths), max_size=2)) for _ in range(2)] if paths else ()
  check_against_oracle(rounds, config, absent=absent)


@pytest.mark.parametrize("values", ["layers", "updates"])
def test_eight_devices_give_the_result_of_one(rounds, values):
  config = rounds.tiny_config(ragged(rounds), values=values)
  one, eight = rounds.run(config), rounds.run(config, num_devices=8)
  leaf = eight.state[2].params["backbone"]["embedding"]
  assert len({shard.device for shard in leaf.addressable_shards}) == 8
  assert leaf.addressable_shards[0].data.shape[0] == 1  # 5 nodes and 3 ghosts, one per device
  for path, params in eight.params().items():
    rounds.assert_trees_close(params, one.params()[path], 1e-5, f"node {path}: ")


def test_waves_give_the_result_of_all_at_once(rounds):
  config = rounds.tiny_config(ragged(rounds))
  results = []
  for nodes_at_once in (1, 2):  # 2 does not divide the 5 nodes of the lowest level
    config.nodes_at_once = nodes_at_once
    results.append(rounds.run(config, rounds=1).params())
  for other in results[1:]:
    for path, params in results[0].items():
      rounds.assert_trees_close(other[path], params, 1e-6, f"node {path}: ")


def test_round_two_compiles_nothing(rounds):
  config = rounds.tiny_config(ragged(rounds))
  harness = rounds.run(config, rounds=1)
  compiled = dict(harness.engine._compiled)
  lowered = []
  with jax_log_compiles(lowered):
    harness.round(1)
    harness.round(2, absent=("a", "b/t"))
  assert harness.engine._compiled == compiled
  assert not lowered


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


def test_permuting_siblings_permutes_the_result(rounds):
  node = rounds.node
  a, b, c = node("a", node("p"), node("q", local_steps=3), data=False), node("b", node("s"), node("t")), node("c")
  one = rounds.run(rounds.tiny_config(node("world", a, b, c)))
  a.children, b.children = a.children[::-1], b.children[::-1]
  other = rounds.run(rounds.tiny_config(node("world", c, b, a)))
  for path, params in one.params().items():
    rounds.assert_trees_close(other.params()[path], params, 1e-5, f"node {path}: ")


def test_renaming_nodes_changes_nothing_but_names(rounds):
  node = rounds.node
  config = rounds.tiny_config(node("w", node("a", node("p"), node("q"), data=False), node("b", node("s"), node("t"))))
  renamed = rounds.tiny_config(node("w", node("y", node("q"), node("p"), data=False), node("x", node("s"), node("1"))))
  former = {"y": "a", "y/q": "a/p", "y/p": "a/q", "x": "b", "x/s": "b/s", "x/1": "b/t"}
  one, other = rounds.run(config), rounds.Harness(renamed, former=former)
  for index in range(2):
    other.round(index)
  for path, params in other.params().items():
    rounds.assert_trees_close(params, one.params()[former.get(path, path)], 1e-6, f"node {path}: ")


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


def test_attention_weights_sum_to_one_and_skip_the_absent(rounds):
  config = rounds.tiny_config(ragged(rounds), values="layers", similarity="centered_cosine")
  harness = rounds.run(config, rounds=2, absent=[(), ("a/q", "c")])
  seen = 0
  for kind, level, log in harness.logs:
    if "weights" in log:
      total = log["weights"].sum(axis=1)
      taking_part = harness.federation.is_federation(level) if kind == "up" else np.ones(len(total), bool)
      np.testing.assert_allclose(total[taking_part], 1, atol=1e-6)
      seen += 1
  assert seen == 2 * 6  # per round: down to level 1, down to level 2 and up from it twice, up to the root
  kind, level, log = harness.logs[-1]
  assert (kind, level) == ("up", 0)
  np.testing.assert_array_equal(log["weights"][0, 3], 0)  # candidates: itself, a, b and c, which is absent
