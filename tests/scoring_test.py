"""Scores as a monoid, their units, and the batched scoring of nodes."""

import functools
import math

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from worldlm_jax import model, partition, scoring
from worldlm_jax.config import ModelConfig

VOCAB, E, W = 11, 3, 8
ARCH = model.architecture(
  ModelConfig(num_layers=2, d_model=12, num_heads=3, num_kv_heads=1, d_ff=17, key_layer_share=0.0), VOCAB
)
SCORES = st.builds(scoring.Score, st.integers(0, 2**40).map(lambda n: n / 1024), st.integers(0, 2**40))


@hypothesis.given(SCORES, SCORES, SCORES)
def test_scores_are_a_commutative_monoid(a, b, c):
  assert a.merge(b).merge(c) == a.merge(b.merge(c))
  assert a.merge(b) == b.merge(a)
  assert a.merge(scoring.Score()) == scoring.Score().merge(a) == a
  assert a.merge(b) == scoring.Score(a.loss_sum_nats + b.loss_sum_nats, a.tokens + b.tokens)


def test_units_of_scores():
  score = scoring.Score(7 * math.log(3), 7)
  assert score.loss_nats == pytest.approx(math.log(3))
  assert score.perplexity == pytest.approx(3)
  assert scoring.Score(10 * math.log(2), 5).bits_per_byte(bytes_per_token=4) == pytest.approx(0.5)


def test_a_merged_mean_is_weighted_by_tokens():
  merged = scoring.Score(3 * 2.0, 3).merge(scoring.Score(5.0, 1))
  assert merged.loss_nats == pytest.approx(11 / 4)


def test_scores_without_tokens_are_nan():
  assert math.isnan(scoring.Score().loss_nats)
  assert math.isnan(scoring.Score().perplexity)
  assert math.isnan(scoring.Score().bits_per_byte(1.0))


@pytest.mark.parametrize("loss", [701.0, 1e6, math.inf])
def test_perplexity_overflows_to_infinity(loss):
  assert scoring.Score(loss, 1).perplexity == math.inf


def test_the_perplexity_of_a_diverged_model_is_nan():
  assert math.isnan(scoring.Score(math.nan, 7).perplexity)


init = jax.jit(model.init, static_argnums=0)
apply = jax.jit(model.apply, static_argnums=0)


@functools.cache
def params_of(seed):
  return jax.tree.map(lambda leaf: 10 * np.asarray(leaf), init(ARCH, jax.random.key(seed)))


def nats(params, windows):
  """Cross-entropy of each token from the logits, in float64: `[B, T]`."""
  logits = np.asarray(apply(ARCH, params, windows[:, :-1]), np.float64)
  picked = np.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
  return np.log(np.exp(logits).sum(axis=-1)) - picked


def windows_of(*shape):
  return np.random.default_rng(shape).integers(0, VOCAB, (*shape, W)).astype(np.int32)


def test_mean_loss_is_over_the_first_windows():
  windows, params = windows_of(E), params_of(0)
  mean_loss = jax.jit(functools.partial(scoring.mean_loss, ARCH))
  for count in (1, 2, 3):
    expected = nats(params, windows)[:count].mean()
    np.testing.assert_allclose(mean_loss(params, windows, np.int32(count)), expected, rtol=1e-5)
  assert mean_loss(params, windows, np.int32(0)) == 0


@pytest.mark.parametrize("num_devices", [1, 2])
def test_score_nodes_scores_each_node_on_its_own_windows(num_devices):
  windows, counts = windows_of(4, E), np.array([3, 0, 1, 2], np.int32)
  params = jax.tree.map(lambda *leaves: np.stack(leaves), *(params_of(n) for n in range(4)))
  mesh = partition.make_mesh(jax.devices()[:num_devices])
  found = jax.jit(functools.partial(scoring.score_nodes, ARCH, mesh))(params, windows, counts)
  expected = [nats(params_of(n), windows[n])[:count].sum() for n, count in enumerate(counts)]
  assert found.shape == (4,) and found.dtype == np.float32
  np.testing.assert_allclose(found, expected, rtol=1e-5)
