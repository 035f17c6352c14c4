"""Random draws are named: the names alone decide, and what they decide never changes."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from worldlm_jax import rngs

# Names have neither control characters nor halves of surrogate pairs (`tree_sources.is_name`).
NAMES = st.text(st.characters(exclude_characters="\x1f", exclude_categories=["Cs"]), max_size=7)
PARTS = st.lists(st.integers() | NAMES, max_size=5)


@pytest.mark.parametrize(("parts", "value"), [
  ((), 1910006305),
  (("init",), 1137480706),
  (("world/a", 3, "shuffle"), 1478354825),
])
def test_draws_of_old_runs_can_be_drawn_again(parts, value):
  """These numbers must never change: checkpoints and published results depend on them."""
  assert rngs.stable_int(*parts) == value


@hypothesis.given(PARTS, PARTS)
def test_different_names_give_different_integers(a, b):
  typed = lambda parts: [(type(part), part) for part in parts]
  assert (rngs.stable_int(*a) == rngs.stable_int(*b)) == (typed(a) == typed(b))
  assert 0 <= rngs.stable_int(*a) < 2**31


@pytest.mark.parametrize(("a", "b"), [
  ((1,), ("1",)), (("a", "b"), ("b", "a")), (("a", "b"), ("ab",)), ((12, 3), (1, 23)),
])
def test_type_order_and_boundaries_of_the_parts_matter(a, b):
  assert rngs.stable_int(*a) != rngs.stable_int(*b)


def test_keys_depend_on_the_seed_and_on_the_name():
  draw = lambda *parts: np.asarray(jax.random.key_data(rngs.key(*parts))).tolist()
  assert draw(0, "init") == draw(0, "init")
  found = [draw(0, "init"), draw(1, "init"), draw(0, "noise"), draw(0, "init", 0), draw(0, 0, "init")]
  assert all(found[i] != found[j] for i in range(5) for j in range(i))
  assert jax.numpy.issubdtype(rngs.key(0, "init").dtype, jax.dtypes.prng_key)


def test_a_key_is_the_folded_seed():
  expected = jax.random.fold_in(jax.random.key(7), rngs.stable_int("world", 3))
  np.testing.assert_array_equal(jax.random.key_data(rngs.key(7, "world", 3)), jax.random.key_data(expected))
