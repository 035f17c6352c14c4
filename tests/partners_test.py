"""Partners that fail and partners that harm, in whole rounds: engine and loop agree, and what is rejected never was."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldlm_jax import config as c, engine as engine_lib, metrics, plain, progress, train

pytestmark = pytest.mark.usefixtures("on_one_device")
ATTACKS: dict[str, Callable[[Any], Any]] = {
  "nan": lambda x: math.nan * x, "100x": lambda x: 100.0 * x, "flip": lambda x: -1.0 * x,
  "huge": lambda x: 1e15 * x,  # with it, a model's loss is not finite
}


def tree(rounds: Any) -> c.Node:
  node = rounds.node
  return node(
    "world", node("a", node("p"), node("q", local_steps=3), node("r"), data=False, rounds_per_parent_round=2),
    node("b", node("s"), node("t", batch_size=3)), node("d"), data=False,
  )


class Hostile:
  """Makes what some nodes send something else than what they learned, in a harness and in its oracle alike."""

  def __init__(self, harness: Any, attacks: dict[str, str]):
    self.harness, self.attacks = harness, {path: ATTACKS[name] for path, name in attacks.items()}
    real = harness.engine.train
    harness.engine.train = lambda state, level, work: self._tampered(level, *real(state, level, work))

  def _tampered(self, level: int, state: Any, log: Any) -> Any:
    for i, member in enumerate(self.harness.federation.levels[level]):
      if member.path in self.attacks:
        own = state[level]
        update = jax.tree.map(lambda leaf, i=i, m=member: leaf.at[i].set(self.attacks[m.path](leaf[i])), own.update)
        update = jax.device_put(update, jax.tree.map(lambda leaf: leaf.sharding, own.update))
        state = (*state[:level], own._replace(update=update), *state[level + 1 :])
    return state, log

  def oracle(self) -> Any:
    oracle = self.harness.oracle()
    real = oracle._train

    def train_and_tamper(q: Any) -> None:
      real(q)
      if attack := self.attacks.get(q.path):
        node = oracle.nodes[q.path]
        node.update = [[attack(layer) for layer in tensor] for tensor in node.update]
        node.backbone_update = jax.tree.map(attack, node.backbone_update)

    oracle._train = train_and_tamper
    return oracle


def fails(config: c.Config) -> None:
  """Everything at once: over three rounds each of it happens to somebody."""
  config.seed = 4
  config.node.loss_before, config.node.loss_after, config.node.member_share = 0.15, 0.2, 0.8
  config.node.step_seconds, config.node.step_seconds_spread, config.node.deadline_seconds = 1.0, 0.8, 4.0
  config.node.late_weight, config.node.quorum = 0.3, 0.3
  config.federation.overrides = {"d": {"joins_round": 1}, "b/t": {"loses_data_round": 2}, "a/r": {"leaves_round": 2}}


@pytest.mark.parametrize("change", ["updates", "layers", "hostile", "moves"])
def test_engine_equals_the_loop_when_partners_fail_and_harm(rounds: Any, change: str) -> None:
  config, attacks = rounds.tiny_config(tree(rounds), values="updates", update_threshold=-0.2), {}
  if change in ("updates", "layers"):
    fails(config)
  if change == "moves":  # a leaf to another depth and on, then a federation with what has moved into it
    config.federation.moves = [c.Move("a/q", ".", 1), c.Move("d", "b", 1), c.Move("b", "a", 2)]
  if change == "layers":
    config.key_layers = c.KeyLayerConfig(values="layers", similarity="param_cosine", prior="weights")
  if change == "hostile":
    config.guards = c.GuardConfig(norm_ratio=4.0, opposition=0.02)
    config.backbone.aggregate, config.backbone.weights = "trimmed_mean", "uniform"
    attacks = {"a/q": "flip", "b/s": "100x", "d": "nan"}
  harness = rounds.Harness(config)
  hostile = Hostile(harness, attacks)
  oracle = hostile.oracle()
  for index in range(3):
    harness.round(index)
    oracle.round(index)
  if change == "moves":
    assert {"a/b/d", "q", "b/d", "a/b/s"} < harness.federation.by_path.keys()
  for path, params in harness.params().items():
    if attacks.get(path) != "nan":
      rounds.assert_trees_close(params, oracle.params(path), 3e-5, f"node {path}: ")
  if attacks:
    verdicts = next(log["verdict"] for kind, level, log in harness.logs if (kind, level) == ("up", 1))
    assert [int(v) for v in verdicts] == [0, 3, 0, 2, 0]
    assert [int(v) for v in harness.logs[-1][2]["verdict"]][:3] == [0, 0, 1]
  elif change != "moves":
    assert harness.engine._compiled.keys() == {*_programs(harness)}


def _programs(harness: Any) -> list[tuple]:
  """One for each phase and level, and one for all training: nothing has been compiled on the way."""
  phases = [("down", 0), ("down", 1), ("down", 2), ("up", 0), ("up", 1)]
  return phases + [name for name in harness.engine._compiled if name[0] in ("train", "take state", "put")]


def test_what_is_rejected_is_as_if_it_had_been_lost(rounds: Any) -> None:
  """So is a node whose training fails, if such nodes are left out; and guards that reject nothing change no bit."""
  found = {}
  for name in ("lost", "nan", "failing"):
    config = rounds.tiny_config(tree(rounds))
    config.node.backbone_independence = config.node.key_layer_independence = 2.0
    if name == "lost":
      config.federation.overrides = {"a/q": {"loss_after": 1.0}}
    if name == "failing":
      config.guards = c.GuardConfig(failing="leave_out")
      config.federation.overrides = {"a/q": {"learning_rate": 1e30}}
    harness = rounds.Harness(config)
    Hostile(harness, {"a/q": "nan"} if name == "nan" else {})
    for index in range(3):
      harness.round(index)
    found[name] = harness.params()
  for path, params in found["lost"].items():
    if path != "a/q":
      for name in ("nan", "failing"):
        rounds.assert_trees_close(found[name][path], params, 0, f"{name}, node {path}: ")
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found["failing"]))


def test_guards_that_reject_nothing_change_no_bit(rounds: Any) -> None:
  found = []
  for guards in (c.GuardConfig(), c.GuardConfig(norm_ratio=1e3, opposition=0.9, failing="leave_out")):
    config = rounds.tiny_config(tree(rounds))
    config.guards = guards
    found.append(rounds.run(config).params())
  rounds.assert_trees_close(found[1], found[0], 0)


def test_a_federation_that_loses_everybody_keeps_its_state(rounds: Any) -> None:
  config = rounds.tiny_config(tree(rounds))
  harness = rounds.run(config, rounds=1)
  before = harness.params()
  harness.round(1, absent=("a/p", "a/q", "a/r"))
  after = harness.params()
  for path in ("a/p", "a/q", "a/r"):
    rounds.assert_trees_close(after[path], before[path], 0)
  handed = jax.device_get(jax.tree.map(lambda leaf: leaf[0], harness.state[0].params["backbone"]))
  assert not np.array_equal(after["."]["backbone"]["embedding"], before["."]["backbone"]["embedding"])  # b and d go on
  assert np.isfinite(handed["embedding"]).all()
  rounds.assert_trees_close(after["a"]["backbone"], before["."]["backbone"], 0)  # what it received is what it has


def test_nobody_takes_over_a_model_that_is_not_finite(rounds: Any) -> None:
  harness = rounds.run(rounds.tiny_config(tree(rounds)), rounds=1)
  root = harness.state[0]
  broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, math.nan), root.params)
  before = harness.params()["d"]
  harness.state = (root._replace(params=broken), *harness.state[1:])
  step = engine_lib.schedule.round_steps(harness.federation, None)[1]
  harness.state, log = harness.engine.down(harness.state, step, 1)
  assert np.asarray(log["refused"]).all()
  rounds.assert_trees_close(harness.params()["d"], before, 0)


def test_validated_acceptance_protects_key_layers(rounds: Any) -> None:
  """Of two nodes that attend to a hostile sibling's update, the one that checks keeps its own layers."""
  node = rounds.node
  config = rounds.tiny_config(
    node("world", node("a", acceptance="validated"), node("b"), node("evil"), data=False), update_threshold=-1.0,
    update_norm_cap=math.inf, candidates="siblings",
  )
  harness = rounds.Harness(config)
  Hostile(harness, {"evil": "huge"})
  harness.round(0)
  before = harness.params()
  step = engine_lib.schedule.round_steps(harness.federation, None)[1]
  harness.state, log = harness.engine.down(harness.state, step, 1)
  after = harness.params()
  assert np.asarray(log["accepted"]).tolist()[:2] == [False, True]
  rounds.assert_trees_close(after["a"]["key_layers"], before["a"]["key_layers"], 0)
  assert np.linalg.norm(plain.flat(after["b"]["key_layers"])) > 1e9


class Stops(progress.Silent):
  """Sends SIGTERM at the n-th phase."""

  def __init__(self, at: int):
    self.left = at

  def phase(self, round_index: int, text: str, fraction: float) -> None:
    self.left -= 1
    if self.left == 0:
      os.kill(os.getpid(), signal.SIGTERM)


def run_config(texts: Path) -> c.Config:
  leaf = {name: c.Node(name, c.Files(str(texts / name))) for name in "pqrs"}
  a, b = (c.Node(name, None, [leaf[child] for child in children]) for name, children in (("a", "pq"), ("b", "rs")))
  config = c.Config(
    rounds=4, federation=c.FederationConfig(root=c.Node("world", None, [a, b]), moves=[c.Move("a/p", "b", 2)]),
    node=c.NodeSettings(local_steps=2, batch_size=3, warmup_steps=1),
    model=c.ModelConfig(num_layers=2, d_model=12, num_heads=3, num_kv_heads=1, d_ff=17, key_layer_share=0.5),
    data=c.DataConfig(sequence_length=13), logging=c.LoggingConfig(tensorboard=False),
    evaluation=c.EvaluationConfig(valid_windows=3, test_windows=3, matrix_windows=0), mesh=c.MeshConfig(fsdp=1),
  )
  fails(config)
  config.seed = 5  # with which everything happens
  config.federation.overrides = {"a/q": {"joins_round": 1, "learning_rate": 1e30}, "b/r": {"leaves_round": 3}}
  config.guards = c.GuardConfig(norm_ratio=10.0, failing="leave_out")
  return config


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("texts")
  for i, name in enumerate("pqrs"):
    (folder / name).mkdir()
    for split, size in (("train", 400), ("valid", 60), ("test", 60)):
      words = np.random.default_rng(i).choice(["lo", "rem ", "ip", "sum "], size)
      (folder / name / f"{split}.txt").write_text("".join(words))
  return folder


def test_a_run_goes_on_and_resumes_to_the_same_bits(texts: Path, tmp_path: Path) -> None:
  config = run_config(texts)
  whole = train.run(config, tmp_path / "whole")
  with pytest.raises(train.Interrupted):
    train.run(config, tmp_path / "parts", reporter=Stops(7))
  parts = train.run(config, tmp_path / "parts")
  rows = metrics.read_jsonl(tmp_path / "whole" / "metrics.jsonl")
  assert rows == metrics.read_jsonl(tmp_path / "parts" / "metrics.jsonl")
  for summary in (whole, parts):
    del summary["seconds"], summary["waiting_for_data_share"]
  assert whole == parts
  own = {(row["node"], row["round"]): row for row in rows}
  assert own["a/q", 0]["turnout"] == {"no_member": 1} == own["b/r", 3]["turnout"]
  assert own["b/p", 0]["turnout"] == {"no_member": 1} == own["a/p", 2]["turnout"]
  assert "data" in whole["nodes"]["b/p"] and "data" not in whole["nodes"]["a/p"]
  failing = [row for row in rows if "failed" in row]
  assert failing and {row["node"] for row in failing} == {"a/q"}
  assert "not finite" in failing[0]["failed"] and "stopped.json" not in os.listdir(tmp_path / "whole")
  happened = {what for row in rows for what in row.get("turnout", ())}
  everything = {"lost_before_training", "lost_after_training", "late", "merged_late", "no_quorum", "no_member"}
  assert happened >= everything
  merged = [row for row in rows if "merged_late" in row.get("turnout", ())]
  assert all(row["counts"] == pytest.approx(0.3 ** row["rounds_late"]) for row in merged)
  totals = {path: dict(node["turnout"]) for path, node in whole["nodes"].items() if "turnout" in node}
  for path, counts in totals.items():
    own_turnouts = [row["turnout"] for row in rows if row["node"] == path and "turnout" in row]
    assert counts == {what: sum(turnout.get(what, 0) for turnout in own_turnouts) for what in counts}
  scores = [node["personalised"]["loss_nats"] for node in whole["nodes"].values() if "personalised" in node]
  assert len(scores) == 4 and np.isfinite(scores).all()
