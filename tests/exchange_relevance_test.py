"""Relevance: the cosine of a node's update and its siblings'."""

import numpy as np
import pytest

from worldlm_jax.exchange.relevance import UNKNOWN, relevance


def measured(updates, weights, parents, num_parents=2):
  tree = {"a": np.asarray(updates, np.float32)[:, :2].reshape(len(updates), 2, 1), "b": np.asarray(updates)[:, 2:]}
  tree = {name: np.float32(leaf) for name, leaf in tree.items()}
  return np.asarray(relevance(tree, np.float32(weights), np.int32(parents), num_parents))


UPDATES = np.random.default_rng(3).normal(size=(5, 7))


def test_it_is_the_cosine_with_the_siblings_weighted_mean():
  found = measured(UPDATES, [3, 1, 2, 5, 4], [0, 0, 0, 1, 1])
  rest = (1 * UPDATES[1] + 2 * UPDATES[2]) / 3
  expected = UPDATES[0] @ rest / np.linalg.norm(UPDATES[0]) / np.linalg.norm(rest)
  np.testing.assert_allclose(found[0], expected, atol=1e-5)
  pair = UPDATES[3] @ UPDATES[4] / np.linalg.norm(UPDATES[3]) / np.linalg.norm(UPDATES[4])
  np.testing.assert_allclose(found[3:], pair, atol=1e-5)  # of two siblings each is the other's rest


def test_identical_siblings_agree_fully_and_opposite_ones_not_at_all():
  found = measured([UPDATES[0], UPDATES[0], UPDATES[1], -UPDATES[1]], [1, 2, 1, 1], [0, 0, 1, 1])
  np.testing.assert_allclose(found, [1, 1, -1, -1], atol=1e-5)


@pytest.mark.parametrize(("weights", "unknown"), [
  ([1, 1, 1, 1, 0], [3, 4]), ([0, 0, 1, 1, 1], [0, 1, 2]), ([0, 1, 1, 1, 1], [0]),
])
def test_nothing_is_known_without_a_sibling_that_counts(weights, unknown):
  updates = UPDATES.copy()
  updates[np.array(weights) == 0] = np.nan  # what does not count may hold anything
  found = measured(updates, weights, [0, 0, 0, 1, 1])
  assert np.flatnonzero(found == UNKNOWN).tolist() == unknown
  assert np.all(np.abs(np.delete(found, unknown)) <= 1 + 1e-5)
