"""Linear algebra on stacked rows, piece by piece, against NumPy in one go.

Shapes: X = 7 rows (5 of one source, 2 of another), M = 3 layers, T = 2 tensors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldlm_jax import partition
from worldlm_jax.exchange import rows

M = 3
SHAPES = {"matrix": (M, 6, 5), "vector": (M, 7)}


def draw(seed, count):
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=(count, *shape)).astype(np.float32) for name, shape in SHAPES.items()}


def whole(rows_):
  return rows_


@pytest.fixture(params=[1, 200, 2**21], ids=["row by row", "a few rows at a time", "at once"])
def piece_bytes(request, monkeypatch):
  monkeypatch.setattr(partition, "piece_bytes", lambda: request.param)


@pytest.mark.usefixtures("piece_bytes")
def test_gram_is_all_inner_products_per_tensor_and_layer():
  first, second = draw(1, 5), draw(2, 2)
  found = jax.jit(lambda a, b: rows.gram([rows.Source(a, whole), rows.Source(b, lambda own: own[::-1])]))(first, second)
  total = rows.total(found)
  for t, name in enumerate(sorted(SHAPES)):
    joined = np.concatenate([first[name], second[name][::-1]]).reshape(7, M, -1).astype(np.float64)
    np.testing.assert_allclose(found[t], np.einsum("xmc,ymc->mxy", joined, joined), atol=1e-5)
    total -= np.einsum("xmc,ymc->xy", joined, joined)
  assert [table.shape for table in found] == [(M, 7, 7)] * 2 and found[0].dtype == jnp.float32
  np.testing.assert_allclose(total, 0.0, atol=2e-5)


@pytest.mark.usefixtures("piece_bytes")
def test_combine_adds_weighted_rows_but_those_that_do_not_count():
  base, first, second = draw(3, 4), draw(1, 5), draw(2, 2)
  coefficients = np.random.default_rng(4).normal(size=(2, M, 4, 7)).astype(np.float32)
  counts = np.array([1, 1, 0, 1, 1, 1, 1], bool)
  poisoned = {name: np.where(np.arange(5).reshape(-1, *[1] * (leaf.ndim - 1)) == 2, np.nan, leaf)
              for name, leaf in first.items()}
  found = jax.jit(lambda b, c, f, s: rows.combine(b, c, [rows.Source(f, whole), rows.Source(s, whole)], counts))(
    base, coefficients, poisoned, second
  )
  for t, name in enumerate(sorted(SHAPES)):
    joined = np.concatenate([first[name], second[name]])
    weights = coefficients[t] * counts
    expected = base[name] + np.einsum("mnx,xm...->nm...", weights, joined)
    np.testing.assert_allclose(found[name], expected, atol=1e-5)


@pytest.mark.usefixtures("piece_bytes")
def test_what_is_taken_instead_is_taken_as_it_is():
  base, other, source = draw(3, 4), draw(5, 2), draw(1, 5)
  coefficients = np.full((2, M, 4, 5), 7, np.float32)
  place, takes = np.array([1, 0, 1, 0], np.int32), np.array([True, False, False, True])
  run = jax.jit(lambda b, s, o: rows.combine(
    b, jnp.asarray(coefficients), [rows.Source(s, whole)], jnp.ones(5, bool),
    rows.Instead(rows.Source(o, whole), jnp.asarray(place), jnp.asarray(takes)),
  ))
  found = run(base, source, other)
  for name in SHAPES:
    np.testing.assert_array_equal(np.asarray(found[name])[takes], other[name][place][takes])
    assert not np.any(np.isclose(np.asarray(found[name])[~takes], other[name][place][~takes]))


def test_without_coefficients_the_base_comes_back_bit_by_bit():
  base, source = draw(3, 4), draw(1, 5)
  found = jax.jit(lambda b, s: rows.combine(b, jnp.zeros((2, M, 4, 5)), [rows.Source(s, whole)], jnp.ones(5, bool)))(
    base, source
  )
  for name in SHAPES:
    np.testing.assert_array_equal(found[name], base[name])
