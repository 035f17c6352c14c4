"""Relevance: the cosine of a node's update and everybody else's."""

import numpy as np

from worldlm_jax.exchange.relevance import UNKNOWN, relevance

UPDATES = np.random.default_rng(3).normal(size=(3, 7))


def measured(updates, moved, shares):
  def tree(rows):
    rows = np.asarray(rows, np.float32)
    return {"a": rows[:, :4].reshape(len(rows), 2, 2), "b": rows[:, 4:]}

  return np.asarray(relevance(tree(updates), tree(moved), np.float32(shares)))


def cosine(a, b):
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_it_is_the_cosine_with_the_mean_of_the_others():
  weights = np.array([3, 1, 2]) / 6
  mean = weights @ UPDATES
  found = measured(UPDATES, [mean] * 3, weights)
  rest = [np.delete(weights, q) @ np.delete(UPDATES, q, axis=0) for q in range(3)]
  np.testing.assert_allclose(found, [cosine(UPDATES[q], rest[q]) for q in range(3)], atol=1e-5)


def test_those_who_learn_the_same_agree_fully_and_those_who_unlearn_it_not_at_all():
  found = measured([UPDATES[0], UPDATES[1]], [3 * UPDATES[0], -UPDATES[1]], [0.5, 0.25])
  np.testing.assert_allclose(found, [1, -1], atol=1e-5)


def test_nothing_is_known_where_nobody_else_moved_or_oneself_did_not():
  found = measured([UPDATES[0], 0 * UPDATES[1], UPDATES[2]], [0.5 * UPDATES[0], UPDATES[1], UPDATES[2]], [0.5, 0.1, 0])
  np.testing.assert_allclose(found, [UNKNOWN, UNKNOWN, 1], atol=1e-5)
