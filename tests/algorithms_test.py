"""Law 4: the algorithms meet where they should. And what each shares, and with whom."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from worldlm_jax import algorithms, config as config_lib, federation as federation_lib, plain, schedule, train

pytestmark = pytest.mark.usefixtures("on_one_device")


def leaves_only(rounds, **settings):
  """Two federations without text of their own; unequal texts, steps and batches."""
  node = rounds.node
  return node(
    "world",
    node("a", node("p"), node("q", local_steps=3, batch_size=3), data=False),
    node("b", node("s"), node("t", local_steps=1), node("u"), data=False),
    data=False, **settings,
  )


def with_inner_text(rounds):
  node = rounds.node
  return node("world", node("a", node("p"), node("q", local_steps=3), rounds_per_parent_round=2), node("b"))


def trained(rounds, root, algorithm, **key_layers):
  config = rounds.tiny_config(root, **key_layers)
  config.algorithm = algorithm
  return config


def same_everywhere(rounds, one, other, paths, atol=1e-6, part=None):
  """Runs both for three rounds and compares the models of some nodes (path here -> path there)."""
  here, there = (after_three_rounds(rounds, config) for config in (one, other))
  for path, path_there in paths.items():
    a, b = here[path], there[path_there]
    rounds.assert_trees_close(*((a[part], b[part]) if part else (whole(a), whole(b))), atol, f"node {path}: ")


FOUND = {}  # by config: what several tests compare with is trained once


def after_three_rounds(rounds, config):
  key = json.dumps(config_lib.to_dict(config), sort_keys=True)
  if key not in FOUND:
    FOUND[key] = rounds.run(config, rounds=3).params()
  return FOUND[key]


def whole(params):
  """A model's parameters with all blocks in one stack, however they are split."""
  blocks = [stack for stack in (params["backbone"]["blocks"], params["key_layers"]) if stack]
  return params["backbone"] | {"blocks": jax.tree.map(lambda *leaves: np.concatenate(leaves), *blocks)}


def test_worldlm_without_key_layers_is_hierfavg(rounds):
  worldlm, hierfavg = (trained(rounds, with_inner_text(rounds), name) for name in ("worldlm", "hierfavg"))
  worldlm.model.key_layer_share = 0.0
  for config in (worldlm, hierfavg):
    config.backbone = dataclasses.replace(config.backbone, weights="uniform", server_optimizer="nesterov",
                                          server_learning_rate=0.5)
  same_everywhere(rounds, worldlm, hierfavg, {path: path for path in (".", "a", "a/p", "a/q", "b")})


def test_over_one_level_worldlm_without_key_layers_is_fedavg(rounds):
  root = rounds.node("world", rounds.node("p"), rounds.node("q", local_steps=3), data=False)
  worldlm, fedavg = (trained(rounds, root, name) for name in ("worldlm", "fedavg"))
  worldlm.model.key_layer_share = 0.0
  for config in (worldlm, fedavg):
    config.backbone = dataclasses.replace(config.backbone, server_learning_rate=0.5)
  same_everywhere(rounds, worldlm, fedavg, {".": "..", "p": "p", "q": "q"})


def test_without_inner_texts_and_weighted_by_text_hierfavg_is_fedavg(rounds):
  hierfavg, fedavg = (trained(rounds, leaves_only(rounds), name) for name in ("hierfavg", "fedavg"))
  same_everywhere(rounds, hierfavg, fedavg, {".": "..", "a/p": "a/p", "b/t": "b/t"})


def test_worldlm_that_keeps_its_key_layers_is_fedper(rounds):
  options = {"values": "layers", "similarity": "param_cosine", "residuals_per_layer": 0}
  worldlm = trained(rounds, leaves_only(rounds, down_temperature=0.0), "worldlm", **options)
  fedper = trained(rounds, leaves_only(rounds), "fedper")
  same_everywhere(rounds, worldlm, fedper, {path: path for path in ("a/p", "a/q", "b/s", "b/t", "b/u")})
  same_everywhere(rounds, worldlm, fedper, {path: path for path in (".", "a", "b")}, part="backbone")


def test_independent_from_the_start_and_deaf_worldlm_is_training_alone(rounds):
  worldlm = trained(rounds, with_inner_text(rounds), "worldlm", update_strength=0.0, residuals_per_layer=0)
  worldlm.node.backbone_independence = worldlm.node.key_layer_independence = math.inf
  local = trained(rounds, with_inner_text(rounds), "local")
  same_everywhere(rounds, worldlm, local, {path: path for path in ("a/p", "a/q", "b")})


@pytest.mark.parametrize("candidates", ["everybody", "siblings"])
def test_a_twin_changes_nothing(rounds, candidates):
  """What it learned is one's own update again: the step that follows both has the length of one."""
  found = []
  for strength in (1.0, 0.0):
    tree = rounds.node("world", rounds.node("a"), rounds.node("b"), data=False)
    config = trained(rounds, tree, "worldlm", update_strength=strength)
    config.node.backbone_independence = config.node.key_layer_independence = math.inf
    config.key_layers.candidates = candidates
    harness = rounds.Harness(config, former={"b": "a"})
    for index in range(3):
      harness.round(index)
    found.append(harness.params()["a"])
  rounds.assert_trees_close(*found, 2e-6)


def test_everybodys_mean_moves_a_node_that_is_on_its_own_way(rounds):
  """By the equation, from what the nodes' updates were: the backbone and the key layers as one."""
  tree = rounds.node("world", rounds.node("a"), rounds.node("b", local_steps=3), rounds.node("c"), data=False)
  config = trained(rounds, tree, "worldlm", update_threshold=-1.0, update_norm_cap=math.inf, residuals_per_layer=0)
  config.node.backbone_independence = config.node.key_layer_independence = math.inf
  harness = rounds.Harness(config)
  begin = harness.params()["a"]
  harness.round(0)
  update = {path: plain.flat(params) - plain.flat(begin) for path, params in harness.params().items() if path != "."}
  down = [step for step in schedule.round_steps(harness.federation, None, harness.attends, 1) if step.kind == "down"]
  for step in down:
    harness.state, _ = harness.engine.down(harness.state, step, 1)
  text = harness.text_tokens
  for path, own in update.items():
    rest = sum(text[x] * update[x] for x in update if x != path) / sum(text[x] for x in update if x != path)
    beta = 2 * (own @ rest / (own @ own) + 1)
    np.testing.assert_allclose(plain.flat(harness.params()[path]), plain.flat(begin) + own + beta * rest, atol=1e-5)


def test_the_key_layers_of_worldlm_that_never_goes_its_own_way_are_averaged_too(rounds):
  worldlm = trained(rounds, leaves_only(rounds), "worldlm")
  worldlm.node.key_layer_independence = 0.0
  hierfavg = trained(rounds, leaves_only(rounds), "hierfavg")
  same_everywhere(rounds, worldlm, hierfavg, {path: path for path in (".", "a", "b", "a/p", "b/t")})


def test_fedprox_holds_a_node_near_to_where_its_round_began(rounds):
  moved = []
  for proximal in (0.0, 30.0):
    config = trained(rounds, rounds.node("alone", local_steps=3), "local")
    config.node.clip_norm = math.inf
    config.optimizer = dataclasses.replace(config.optimizer, name="sgd", proximal=proximal)
    begin = jax.tree.map(lambda leaf: leaf[0], rounds.Harness(config).state[0].params)
    change = jax.tree.map(np.subtract, rounds.run(config, rounds=1).params()["."], jax.device_get(begin))
    moved.append(math.sqrt(sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(change))))
  assert 0 < moved[1] < 0.8 * moved[0]


@pytest.mark.parametrize(("name", "shares"), [
  ("worldlm", {"backbone", "key_layers"}), ("worldlm_paper", {"backbone", "key_layers"}), ("fedavg", {"backbone"}),
  ("hierfavg", {"backbone"}), ("fedper", {"backbone"}), ("local", set()), ("centralized", set()),
])
def test_what_crosses_an_edge(rounds, name, shares):
  config = trained(rounds, with_inner_text(rounds), name)
  federation = algorithms.arranged(config, federation_lib.resolve(config))
  algorithm = algorithms.make(config, None, federation)
  assert set(algorithm.shares) == shares
  assert algorithms.num_key_layers(config) == (2 if name in ("worldlm", "worldlm_paper", "fedper") else 0)
  assert len(federation.levels) == (2 if name in ("fedavg", "centralized") else 3)


def test_the_paper_s_choices_replace_the_config_s():
  config = config_lib.Config(algorithm="worldlm_paper")
  adapted = algorithms.adapted(config)
  assert (adapted.key_layers.values, adapted.key_layers.similarity) == ("layers", "scaled_dot")
  assert adapted.node.up_temperature == 1 and adapted.node.backbone_independence == 0
  assert config.key_layers.values == "updates" and config.node.up_temperature != 1  # the config stays as it was
  assert algorithms.adapted(config_lib.Config()) == config_lib.Config()


def test_a_node_alone_is_the_pool_of_itself(tmp_path):
  """On real text: the windows, rates and steps of both are the same, whatever the path of the root is."""
  (tmp_path / "text.txt").write_text("\n\n".join(f"{i} times {i} is {i * i}, and so on" for i in range(400)))
  found = {}
  for name in ("worldlm", "centralized", "fedavg"):
    config = config_lib.Config(
      algorithm=name, rounds=2,
      node=config_lib.NodeSettings(local_steps=3, batch_size=2),
      model=config_lib.ModelConfig(num_layers=2, d_model=12, num_heads=2, num_kv_heads=1, d_ff=17, key_layer_share=0.5),
      data=config_lib.DataConfig(sequence_length=16),
      logging=config_lib.LoggingConfig(tensorboard=False),
    )
    config.federation.root = config_lib.Node("alone", config_lib.Files(str(tmp_path / "text.txt")))
    found[name] = train.run(config, tmp_path / name)
  for name in ("centralized", "fedavg"):
    for kind in ("received", "personalised") if name == "fedavg" else ("received",):  # a pool's members begin afresh
      losses = [found[a]["nodes"]["."][kind]["loss_nats"] for a in ("worldlm", name)]
      assert losses[0] == pytest.approx(losses[1], abs=1e-5), (name, kind)
    assert found[name]["tokens"] == found["worldlm"]["tokens"]
    assert found[name]["fairness"] == found["worldlm"]["fairness"]
