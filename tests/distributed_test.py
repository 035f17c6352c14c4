"""How processes meet and what they tell each other, as far as one process can show it; see multihost_test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldlm_jax import checks, distributed, partition


@pytest.mark.parametrize(("flags", "message"), [
  ((True, "host:1", 2, 0), "--distributed=True: expected one of --distributed and --coordinator; leave one"),
  ((False, "", 2, -1), "--num_processes=2: expected to come with --coordinator=HOST:PORT"),
  ((True, "", 0, 1), "--process_id=1: expected to come with --coordinator=HOST:PORT"),
  ((False, "host", 2, 0), "--coordinator='host': expected HOST:PORT"),
  ((False, "host:1", 0, 0), "--num_processes=0: expected how many processes there are, at least 1"),
  ((False, "host:1", 2, -1), "--process_id=-1: expected which process this is, from 0 to 1"),
  ((False, "host:1", 2, 2), "--process_id=2: expected which process this is, from 0 to 1"),
])
def test_flags_that_do_not_go_together_are_bad_input(flags: tuple[bool, str, int, int], message: str) -> None:
  with pytest.raises(checks.InputError) as caught:
    distributed.connect(*flags)
  assert str(caught.value).startswith(message)


def test_without_flags_nothing_happens() -> None:
  distributed.connect(False, "", 0, -1)
  assert not jax.distributed.is_initialized()
  assert distributed.is_lead() and distributed.leave(3) == 3


def test_one_process_agrees_with_itself() -> None:
  assert distributed.gather({"a": [1, None]}) == [{"a": [1, None]}]
  assert np.isnan(distributed.gather(float("nan"))[0])
  arrays = {"a/b c": np.arange(3), "file": np.zeros((0, 2), np.uint64)}
  assert distributed.gather_arrays(arrays).keys() == arrays.keys()
  with pytest.raises(KeyError, match="gone"), distributed.agreed():
    raise KeyError("gone")
  assert [bool(distributed.any_says(says, partition.make_mesh())) for says in (True, False)] == [True, False]


def test_a_snapshot_outlives_the_arrays_it_was_taken_of() -> None:
  mesh = partition.make_mesh()
  spread = partition.put({"x": np.arange(16.0, dtype=np.float32)}, mesh)
  copies = distributed.snapshot(spread, mesh)
  assert copies["x"].is_fully_replicated
  add = functools.partial(jax.tree.map, lambda x: x + 1)
  jax.block_until_ready(jax.jit(add, donate_argnums=0)(spread))
  assert spread["x"].is_deleted()
  np.testing.assert_array_equal(jax.device_get(copies)["x"], np.arange(16.0))
  whole = jax.device_put(jnp.ones(3), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
  copy = distributed.snapshot(whole, mesh)
  whole.delete()
  np.testing.assert_array_equal(np.asarray(copy), np.ones(3))
