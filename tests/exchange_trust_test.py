"""Trust: between a parent's model and one's own, by the loss on one's own validation batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldlm_jax import engine as engine_lib, model
from worldlm_jax.data.evaluation import Evaluation
from worldlm_jax.data.windows import Windows
from worldlm_jax.exchange import trust

OWN = {"a": np.float32([[1.0, 0.1], [3.0, 0.3]]), "b": np.float32([5.0, 7.0])}
PARENTS = {"a": np.float32([[0.0, 0.7], [1.0, 0.9]]), "b": np.float32([1.0, 1.0])}


def test_full_trust_is_exactly_ones_own_and_none_is_the_parent_s():
  used = trust.used(OWN, PARENTS, jnp.float32([1.0, 0.0]))
  np.testing.assert_array_equal(used["a"], [OWN["a"][0], PARENTS["a"][1]])
  np.testing.assert_array_equal(used["b"], [5.0, 1.0])
  half = trust.used(OWN, PARENTS, jnp.float32([0.5, 0.25]))
  np.testing.assert_allclose(half["a"], [[0.5, 0.4], [1.5, 0.75]], rtol=1e-6)


@pytest.mark.parametrize(("best", "expected"), [(2.0, 1.0), (0.9, 1.0), (0.6, 0.5), (0.2, 0.25), (-1.0, 0.0)])
def test_the_trust_with_the_least_loss_is_taken(best, expected):
  own, parents = {"x": jnp.float32([4.0])}, {"x": jnp.float32([2.0])}
  found = trust.validated(lambda params: jnp.sum(jnp.square((params["x"] - 2) / 2 - best)), own, parents)
  assert float(found) == expected


def test_without_a_difference_training_is_trusted():
  assert float(trust.validated(lambda params: jnp.float32(1), OWN, PARENTS)) == 1


def _config(rounds, **settings):
  node = rounds.node
  inner = node("a", node("p", learning_rate=0.3), node("q", local_steps=3), rounds_per_parent_round=2)
  config = rounds.tiny_config(node("world", inner, node("b", trust="full", learning_rate=0.3), node("c")))
  config.node.trust, config.node.backbone_independence = "validated", 3.0
  for name, value in settings.items():
    setattr(config, name, value)
  return config


@pytest.mark.parametrize("settings", [
  {"inner_text": "before"}, {"inner_text": "beside"}, pytest.param({"nodes_at_once": 2}, marks=pytest.mark.exhaustive),
], ids=lambda settings: " ".join(map(str, settings.values())))
def test_engine_equals_the_loop(rounds, settings):
  harness = rounds.run(_config(rounds, **settings), rounds=2)
  oracle = harness.oracle()
  for index in range(2):
    oracle.round(index)
  found = {m.path: float(harness.state[d].trust[i]) for d, level in enumerate(harness.federation.levels)
           for i, m in enumerate(level)}
  assert found == {path: node.trust for path, node in oracle.nodes.items()}
  assert found["b"] == 1 and min(found.values()) < 1  # steps this large overshoot; b does not ask
  text = Windows(np.random.default_rng(0).integers(0, rounds.vocab, 25), 7)
  windows, everything = jnp.array([text[i] for i in range(3)]), jnp.ones(3, bool)
  for d, level in enumerate(harness.federation.levels):
    losses = harness.engine.score(harness.state, d, Evaluation([text] * len(level), 3, 8), np.ones(len(level), bool))
    for m, total in zip(level, engine_lib.scores_by_row(losses, len(level)), strict=True):
      expected = model.loss_sum(harness.arch, oracle.used(m.path), windows, everything)
      assert total == pytest.approx(float(expected), rel=1e-3)


def test_what_is_sent_and_trained_on_is_the_whole_of_ones_training(rounds):
  """Trust changes the models in use and nothing else."""
  with_trust, without = (rounds.run(_config(rounds), rounds=3), _config(rounds))
  without.node.trust = "full"
  jax.tree.map(np.testing.assert_array_equal, with_trust.params(), rounds.run(without, rounds=3).params())
