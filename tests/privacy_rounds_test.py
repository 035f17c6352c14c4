"""Laws of rounds in which text is protected: engine and oracle agree, nothing changes without noise and clip, and what
others see of a node is what it has released.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest

from worldlm_jax import algorithms, checks, config as config_lib, federation as federation_lib, schedule
from worldlm_jax.privacy import policy

NUM_ROUNDS = 2
ABSENT = (("a/q",), ("a",))


def ragged(rounds):
  """Three levels; the root and `a` have text and train before their members; unequal steps; `b` without privacy."""
  node = rounds.node
  return node(
    "world",
    node("a", node("p"), node("q", local_steps=3, batch_size=3), rounds_per_parent_round=2),
    node("b", privacy="none"), node("c", privacy_clip_by="layer", privacy_quantile=0.5),
  )


def flat_tree(rounds):
  node = rounds.node
  return node("world", node("a"), node("b", local_steps=3), node("c", privacy_noise=0.1), data=False)


def private_config(rounds, root, values="updates", algorithm="worldlm", **settings):
  options: dict[str, Any] = {"update_threshold": -0.5} if values == "updates" else {"similarity": "update_cosine"}
  config = rounds.tiny_config(root, values=values, **options)
  config.algorithm = algorithm
  config.node = dataclasses.replace(config.node, **{
    "backbone_independence": 3.0, "key_layer_independence": 1.0, "privacy": "local", "privacy_clip": 0.05,
    "privacy_noise": 0.3,
  } | settings)
  return config


def check_against_oracle(rounds, config, absent=()):
  harness = rounds.run(config, NUM_ROUNDS, absent=absent)
  oracle = harness.oracle()
  for index in range(NUM_ROUNDS):
    oracle.round(index, None, absent[index] if absent else ())
  for path, params in harness.params().items():
    rounds.assert_trees_close(params, oracle.params(path), 2e-5, f"node {path}: ")
  return harness


def flat(params):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


@pytest.fixture(scope="module")
def local_run(rounds):
  """Everything at once, local, as in the test of law 6."""
  return check_against_oracle(rounds, private_config(rounds, ragged(rounds)), ABSENT)


def test_engine_equals_the_loop(local_run):
  """Law 6; the fixture has compared them."""
  clips = np.asarray(local_run.state[1].private.clip)
  assert clips[0] == clips[1] == np.float32(0.05) != clips[2]
  assert np.asarray(local_run.state[1].private.draws).tolist() == [1, 2, 2]  # `a` was absent once


@pytest.mark.slow
@pytest.mark.parametrize("change", [
  pytest.param("layers", marks=pytest.mark.exhaustive), pytest.param("int8", marks=pytest.mark.exhaustive), "central",
  "examples",
])
def test_engine_equals_the_loop_in_every_mode(rounds, change):
  if change == "layers":
    check_against_oracle(rounds, private_config(rounds, ragged(rounds), "layers"), ABSENT)
  elif change == "int8":
    config = private_config(rounds, ragged(rounds))
    config.payload = "int8"
    harness = rounds.run(config, NUM_ROUNDS, absent=ABSENT)
    oracle = harness.oracle()
    for index in range(NUM_ROUNDS):
      oracle.round(index, None, ABSENT[index])
    for path, params in harness.params().items():
      off = np.abs(flat(params) - flat(oracle.params(path)))
      assert np.median(off) < 1e-6 and off.max() < 2e-3, path
  elif change == "central":
    config = private_config(rounds, flat_tree(rounds), privacy="central", privacy_quantile=0.5)
    config.key_layers.update_strength, config.key_layers.residuals_per_layer = 0.0, 0
    config.federation.root.children[2].settings = {}
    harness = check_against_oracle(rounds, config)
    assert len({float(c) for c in np.asarray(harness.state[1].private.clip)}) == 1
  else:
    config = private_config(rounds, flat_tree(rounds), privacy="none", example_clip=0.5, example_noise=0.4)
    config.federation.root.children[0].settings = {"example_clip": math.inf, "example_noise": 0.0}
    check_against_oracle(rounds, config)


def again(harness, config):
  """The same programs from the start, with the settings of another config of the same shapes."""
  federation = federation_lib.resolve(config)
  harness.engine._guards = [policy.guards(federation, level, config.seed) for level in range(len(federation.levels))]
  harness.state = harness.engine.init()
  sizes = [len(level.weight) for level in harness.state]
  harness.state = tuple(
    level._replace(private=level.private._replace(clip=jax.device_put(
      np.resize(np.array([m.settings.privacy_clip for m in members], np.float32), size), level.private.clip.sharding)))
    for level, members, size in zip(harness.state, federation.levels, sizes, strict=True)
  )
  harness.positions = dict.fromkeys(harness.positions, 0)
  for index in range(NUM_ROUNDS):
    harness.round(index, None, ABSENT[index])
  return harness.params()


def test_no_noise_and_no_clip_change_no_bit(rounds, local_run):
  """Law 7, by the compiled programs of the private run."""
  noisy = local_run.params()
  root = ragged(rounds)
  root.children[2].settings = {}
  open_config = private_config(rounds, root, privacy_clip=math.inf, privacy_noise=0.0)
  compiled = len(local_run.engine._compiled)
  found = again(local_run, open_config)
  assert len(local_run.engine._compiled) == compiled
  open_config.node.privacy = "none"
  plain = rounds.run(open_config, NUM_ROUNDS, absent=ABSENT)
  assert plain.state[0].private is None
  for path, params in plain.params().items():
    np.testing.assert_array_equal(flat(found[path]), flat(params), err_msg=path)
    assert path == "a/q" or np.abs(flat(noisy[path]) - flat(params)).max() > 1e-3  # which was never there


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [
  "fedavg", "worldlm_paper", pytest.param("fedper", marks=pytest.mark.exhaustive),
  pytest.param("hierfavg", marks=pytest.mark.exhaustive),
])
def test_no_noise_and_no_clip_change_no_bit_of_any_algorithm(rounds, algorithm):
  config = private_config(rounds, flat_tree(rounds), algorithm=algorithm, privacy_clip=math.inf, privacy_noise=0.0)
  config.federation.root.children[2].settings = {}
  private = rounds.run(config, NUM_ROUNDS)
  config.node.privacy = "none"
  plain = rounds.run(config, NUM_ROUNDS)
  assert private.state[0].private is not None and plain.state[0].private is None
  for path, params in plain.params().items():
    np.testing.assert_array_equal(flat(private.params()[path]), flat(params), err_msg=path)


def test_round_two_compiles_nothing(rounds):
  """Law 9, and what a federation merges is what its members have released, clipped."""
  config = private_config(rounds, flat_tree(rounds), algorithm="hierfavg", privacy_noise=0.0)
  config.federation.root.children[2].settings = {}
  harness = rounds.Harness(config)
  begun = flat(harness.params()["."])
  harness.round(0)
  compiled = len(harness.engine._compiled)
  moved = flat(harness.params()["."]) - begun
  assert 0 < np.linalg.norm(moved) <= 0.05 * (1 + 1e-5)  # a mean of updates of norm 0.05 at most
  assert np.linalg.norm(flat(harness.params()["a"]) - begun) > 0.06  # its own model goes further
  harness.round(1)
  assert len(harness.engine._compiled) == compiled
  assert np.asarray(harness.state[1].private.draws).tolist() == [2, 2, 2]


def test_nothing_but_the_release_of_a_nodes_text_reaches_the_others(rounds, local_run):
  """With updates clipped to next to nothing and no noise, others do not notice whose text a node has."""

  def others(text):
    root = ragged(rounds)
    root.children[2].settings = {}
    config = private_config(rounds, root, privacy_clip=1e-12, privacy_noise=0.0)
    local_run.former = {"a/p": text, ".": text}
    params = again(local_run, config)
    return {path: value for path, value in params.items() if path not in ("a/p", ".")}, params

  try:
    (here, all_here), (there, all_there) = others("one text"), others("quite another")
  finally:
    local_run.former = {}
  for path, params in here.items():
    np.testing.assert_allclose(flat(params), flat(there[path]), atol=1e-7, err_msg=path)
  assert np.abs(flat(all_here["a/p"]) - flat(all_there["a/p"])).max() > 1e-3  # the node itself does


def test_examples_alone_keep_no_updates(rounds):
  """FedAvg with DP-SGD: every phase can be traced, and there is nothing to withhold."""
  config = private_config(rounds, flat_tree(rounds), algorithm="fedavg", privacy="none", example_clip=1.0)
  harness = rounds.Harness(config)
  harness.engine._call = lambda name, phase, *args, **_: jax.eval_shape(phase, *args)
  for step in schedule.round_steps(harness.federation, None):
    if step.kind == "up":
      new, _ = harness.engine.up(harness.state, step, 0)
      assert new[0].params["backbone"].keys() == harness.state[0].params["backbone"].keys()
  assert not harness.state[1].private.withheld and not harness.state[1].update


# What is refused.


def change_of(**fields):
  def change(config):
    for name, value in fields.items():
      owner, _, field = name.rpartition("__")
      setattr(getattr(config, owner) if owner else config, field, value)
  return change


@pytest.mark.parametrize(("change", "complaint"), [
  (change_of(algorithm="centralized"), r"config.algorithm='centralized'.*leaves texts where they are"),
  (change_of(backbone__weights="tokens"), r"config.backbone.weights='tokens'"),
  (change_of(node__privacy="central"), r"privacy='central'.*means alone.*candidates=everybody"),
  (change_of(node__acceptance="validated", key_layers__values="layers"), r"acceptance='validated'"),
  (change_of(key_layers__values="layers", key_layers__similarity="validation_loss"), r"similarity='validation_loss'"),
  (change_of(node__rounds_per_parent_round=2, node__key_layer_independence=math.inf), r"independence=inf.*finite"),
  (change_of(node__privacy_clip=math.inf), r"privacy_clip=inf.*finite norm with privacy_noise=0.3"),
  (change_of(node__example_noise=1.0), r"example_clip=inf.*finite norm with example_noise=1.0"),
  (change_of(node__privacy_delta=0.0), r"privacy_delta=0.0.*between 0 and 1"),
  (change_of(node__privacy="secret"), r"privacy='secret'.*'local'"),
])
def test_what_would_not_hold_is_refused(rounds, change, complaint):
  config = private_config(rounds, flat_tree(rounds))
  change(config)
  with pytest.raises(checks.InputError, match=complaint):
    federation = algorithms.arranged(config, federation_lib.resolve(config))
    policy.check(config, federation, ("backbone", "key_layers"))


def test_central_noise_needs_members_that_agree_where_the_clip_adapts(rounds):
  config = private_config(rounds, flat_tree(rounds), privacy="central", privacy_quantile=0.5)
  config.key_layers = config_lib.KeyLayerConfig(update_strength=0.0, residuals_per_layer=0)
  policy.check(config, federation_lib.resolve(config), ("backbone", "key_layers"))
  config.federation.overrides = {"b": {"privacy_clip": 2.0}}
  with pytest.raises(checks.InputError, match=r"node 'b': privacy_clip=2.0.*one clip for all its members"):
    policy.check(config, federation_lib.resolve(config), ("backbone", "key_layers"))
  config.federation.root = ragged(rounds)
  config.federation.overrides, config.node.privacy_quantile = {}, 0.0
  with pytest.raises(checks.InputError, match=r"node '.': privacy='central'.*inner_text=beside"):
    policy.check(config, federation_lib.resolve(config), ("backbone", "key_layers"))
