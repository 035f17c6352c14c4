"""Residual layers: what is selected, where it is routed, and that its origin travels with it.

Shapes: S = 5 members (or P pooled layers), M = 3 layers, R selected ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldlm_jax.exchange import residuals

S, M = 5, 3
ORIGIN = np.array([13, 2, 7, 5, 11], np.int32)
MASK = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], bool)

select = functools.partial(jax.jit, static_argnames="count")(residuals.select)
route = functools.partial(jax.jit, static_argnames="count")(residuals.route)


def labelled(mask_SxM=None):
  """Layers of members that are 10 s + m throughout; NaN where absent."""
  label = 10.0 * np.arange(S)[:, None] + np.arange(M)[None, :]
  label = label if mask_SxM is None else np.where(mask_SxM, label, np.nan)
  return {
    "matrix": np.broadcast_to(label[..., None, None], (S, M, 2, 3)).astype(np.float32),
    "vector": np.broadcast_to(label[..., None], (S, M, 7)).astype(np.float32),
  }


def pool_of(mask_PxM):
  labels = np.arange(S * M).reshape(S, M)
  return residuals.Residuals(labelled(mask_PxM), np.int32(100 + labels), np.int32(200 + labels), mask_PxM)


def picked(found):
  """For every layer, the members found, in order; None where there is none."""
  for leaf in jax.tree.leaves(found.layers):
    assert leaf.dtype == jnp.float32
    flat = np.asarray(leaf).reshape(*leaf.shape[:2], -1)
    first = np.where(found.present, flat[..., 0], 0)
    present = np.asarray(found.present)
    assert np.all((flat == first[..., None])[present])
    assert np.all((first % 10 == np.arange(M)[None, :])[present]), "a layer index was mixed up with another"
  return [[int(first[r, m] // 10) if present[r, m] else None for r in range(len(present))] for m in range(M)]


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_select_takes_the_least_used_of_every_layer_by_itself(count):
  use = np.random.default_rng(1).permutation(S * M).reshape(S, M).astype(np.float32) / 17
  use = np.where(MASK, use, np.nan).astype(np.float32)
  found = select(labelled(MASK), use, MASK, ORIGIN, jnp.int32(19), count=count)
  expected = []
  for m in range(M):
    there = sorted((s for s in range(S) if MASK[s, m]), key=lambda s: use[s, m])[:count]
    expected.append(there + [None] * (count - len(there)))
  assert picked(found) == expected
  for m, members in enumerate(expected):
    for r, s in enumerate(members):
      if s is not None:
        assert found.origin[r, m] == ORIGIN[s]
        assert found.round[r, m] == 19
  assert found.present.shape == found.origin.shape == found.round.shape == (count, M)
  assert (found.present.dtype, found.origin.dtype, found.round.dtype) == (bool, jnp.int32, jnp.int32)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_route_takes_the_best_eligible_with_its_origin_and_round(count):
  scores = np.random.default_rng(2).permutation(S * M).reshape(S, M).astype(np.float32) / 17 - 0.4
  scores = np.where(MASK, scores, np.nan).astype(np.float32)
  eligible = np.array([True, True, False, True, True])
  pool = pool_of(MASK)
  found = route(pool, eligible[:, None], scores, count=count)
  expected = []
  for m in range(M):
    there = sorted((s for s in range(S) if MASK[s, m] and eligible[s]), key=lambda s: -scores[s, m])[:count]
    expected.append(there + [None] * (count - len(there)))
  assert picked(found) == expected
  for m, members in enumerate(expected):
    for r, s in enumerate(members):
      if s is not None:
        assert (found.origin[r, m], found.round[r, m]) == (pool.origin[s, m], pool.round[s, m])
  assert found.present.shape == (count, M)


def test_nothing_is_routed_where_nothing_is_eligible():
  found = route(pool_of(MASK), np.zeros((S, 1), bool), np.ones((S, M), np.float32), count=2)
  assert not np.any(found.present)


def test_nothing_is_selected_where_nobody_is_there():
  found = select(labelled(MASK & False), np.ones((S, M), np.float32), MASK & False, ORIGIN, jnp.int32(19), count=2)
  assert not np.any(found.present)


def test_permuting_members_selects_the_same():
  """Law 2."""
  use = np.random.default_rng(1).permutation(S * M).reshape(S, M).astype(np.float32)
  order = np.array([3, 0, 4, 2, 1])
  found = select(labelled(), use, MASK, ORIGIN, jnp.int32(19), count=2)
  permuted = jax.tree.map(lambda leaf: leaf[order], labelled())
  again = select(permuted, use[order], MASK[order], ORIGIN[order], jnp.int32(19), count=2)
  np.testing.assert_array_equal(found.present, again.present)
  np.testing.assert_array_equal(np.where(found.present, found.origin, -1), np.where(again.present, again.origin, -1))
  assert picked(found) == picked(again)


def test_empty_has_the_shapes_of_count_layers_and_none_of_them():
  key_layers = {"matrix": jnp.ones((M, 2, 3)), "vector": jnp.ones((M, 7))}
  nothing = residuals.empty(key_layers, 2)
  assert jax.tree.map(jnp.shape, nothing.layers) == {"matrix": (2, M, 2, 3), "vector": (2, M, 7)}
  assert nothing.present.shape == (2, M) and not np.any(nothing.present)
  assert residuals.empty(key_layers, 0).present.shape == (0, M)
