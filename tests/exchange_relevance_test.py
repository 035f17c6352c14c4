"""Relevance: the cosine of a node's update and everybody else's."""

import numpy as np

from worldlm_jax.exchange.relevance import UNKNOWN, relevance, shares

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


def sharing(relevances, epochs, independence, num_rounds=20):
  """For how many rounds each shares, from the first on."""
  arrays = [np.asarray(values, np.float32) for values in (relevances, epochs, independence)]
  by_round = np.array([shares(*arrays, np.int32(i), np.int32(num_rounds)) for i in range(num_rounds + 1)])
  counts = by_round.sum(axis=0)
  assert (by_round == (np.arange(num_rounds + 1)[:, None] < counts)).all()  # who has gone does not come back
  return counts.tolist()


def test_how_long_nodes_share():
  """20 e^2 / (e^2 + c^2), rounded up; one round more, that is for ever, for c = 0 and for infinite e."""
  assert sharing([0.76, 0.5, 0.31, 0.88], [3.0, 4.0, 4.5, 6.0], [3.0] * 4) == [10, 13, 14, 16]
  assert sharing([0.5] * 4, [3.0, 3.0, np.inf, np.inf], [0.0, np.inf, 5.0, np.inf]) == [21, 0, 21, 0]
  assert sharing([-0.4, 0.29, 1.0, UNKNOWN], [3.0] * 4, [3.0] * 4) == [3, 3, 10, 10]


def test_nobody_leaves_at_once_and_nobody_who_may_leave_shares_to_the_end():
  assert sharing([0.7] * 2, [0.01, 1000.0], [3.0] * 2) == [3, 18]
  assert sharing([0.7] * 2, [0.01, 1000.0], [3.0] * 2, num_rounds=8) == [2, 8]


def test_less_text_and_less_independence_share_longer():
  grid = sharing([0.6] * 3, [2.0, 4.0, 4.0], [3.0, 3.0, 2.0])
  assert grid == sorted(grid) and len(set(grid)) == 3
