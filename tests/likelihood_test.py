"""Likelihoods of texts against the model's own logits, and the laws of probability."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from worldlm_jax import config, likelihood, model

LENGTH = 37
ARCH = model.architecture(
  config.ModelConfig(num_layers=2, d_model=12, num_heads=2, num_kv_heads=1, d_ff=17, key_layer_share=0.5), 11
)


@pytest.fixture(scope="module")
def scorer() -> likelihood.Scorer:
  return likelihood.Scorer(ARCH, _params(), LENGTH, tokens_at_once=64)


_apply = jax.jit(functools.partial(model.apply, ARCH))


@functools.cache
def _params() -> model.Params:
  """Larger than a model begins with, so that tokens differ in likelihood."""
  return jax.tree.map(lambda leaf: 3 * leaf, model.init(ARCH, jax.random.key(3)))


def _tokens(length: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, ARCH.vocab_size, length)


def _log_probabilities(tokens: np.ndarray) -> np.ndarray:
  """Of every token but the first, each given all before it: float64 `[n - 1, V]`."""
  padded = np.zeros((1, LENGTH), np.int64)  # of one length, to be compiled once; what comes after is not seen
  padded[0, : len(tokens) - 1] = tokens[:-1]
  logits = np.asarray(_apply(_params(), padded)[0, : len(tokens) - 1], np.float64)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_a_text_is_as_likely_as_the_logits_say(scorer: likelihood.Scorer) -> None:
  """Of all lengths that are padded in one way or another, in one call, and whatever their order."""
  sequences = [(_tokens(n, n), first) for n, first in ((2, 1), (9, 3), (33, 1), (34, 33), (38, 5), (38, 37))]
  found = scorer.score(sequences)
  for (tokens, first), (value, greedy) in zip(sequences, found, strict=True):
    rows = _log_probabilities(tokens)[first - 1 :]
    assert value == pytest.approx(rows[np.arange(len(rows)), tokens[first:]].sum(), abs=1e-4)
    assert greedy == np.array_equal(rows.argmax(axis=-1), tokens[first:])
  assert scorer.score(sequences[::-1]) == [pytest.approx(each, abs=1e-5) for each in found[::-1]]


def test_the_likeliest_continuation_is_greedy_and_no_other(scorer: likelihood.Scorer) -> None:
  tokens = _tokens(4)
  for _ in range(5):
    following = _log_probabilities(np.append(tokens, 0))[-1].argmax()
    tokens = np.append(tokens, following)
  other = np.append(tokens[:-1], (tokens[-1] + 1) % ARCH.vocab_size)
  assert [each.greedy for each in scorer.score([(tokens, 4), (other, 4), (tokens, len(tokens))])] == [True, False, True]


def test_probabilities_of_all_next_tokens_add_up_to_one(scorer: likelihood.Scorer) -> None:
  start = _tokens(6)
  found = scorer.score([(np.append(start, token), 6) for token in range(ARCH.vocab_size)])
  assert sum(np.exp(each.log_probability) for each in found) == pytest.approx(1, abs=1e-5)
  assert sum(each.greedy for each in found) == 1


def test_a_text_is_as_likely_as_its_parts_one_after_the_other(scorer: likelihood.Scorer) -> None:
  tokens = _tokens(20)
  whole, head, tail = scorer.score([(tokens, 2), (tokens[:11], 2), (tokens, 11)])
  assert whole.log_probability == pytest.approx(head.log_probability + tail.log_probability, abs=1e-4)


@pytest.mark.parametrize(("length", "first"), [(38, 1), (39, 1), (75, 1), (76, 20), (112, 70), (200, 3)])
def test_windows_predict_each_token_once_and_see_what_fits(length: int, first: int) -> None:
  tokens = np.arange(length)
  windows = list(likelihood._windows(tokens, first, LENGTH))
  predicted = [part[1 + skipped :] for part, skipped in windows]
  assert list(itertools.chain(*predicted)) == list(range(first, length))
  assert all(len(part) <= LENGTH + 1 and list(part) == list(range(part[0], part[0] + len(part))) for part, _ in windows)
  assert len(windows) == -(-(length - first) // LENGTH)
  assert windows[-1][0][0] == max(0, length - 1 - LENGTH)  # the last sees as much as fits
  assert list(likelihood._windows(tokens, length, LENGTH)) == []


def test_a_longer_text_is_scored_window_by_window(scorer: likelihood.Scorer) -> None:
  tokens = _tokens(100)
  found = scorer.score([(tokens, 9)])[0].log_probability
  parts = scorer.score([(part, skipped + 1) for part, skipped in likelihood._windows(tokens, 9, LENGTH)])
  assert len(parts) == 3 and found == pytest.approx(sum(part.log_probability for part in parts), abs=1e-4)


def test_attention_stays_within_documents() -> None:
  """What stands before the separator changes nothing, and padding after the text neither."""
  arch = dataclasses.replace(ARCH, document_separator=10)
  scorer = likelihood.Scorer(arch, _params(), LENGTH, tokens_at_once=64)
  own = np.append(10, _tokens(7) % 10)
  alone, after = scorer.score([(own, 1), (np.append(_tokens(5, 1) % 10, own), 6)])
  assert alone.log_probability == pytest.approx(after.log_probability, abs=1e-4)
