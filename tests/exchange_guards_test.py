"""Guards: what cannot be honest is rejected, and what differs honestly is not."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldlm_jax import config as c, links, oracle_guards, partition
from worldlm_jax.exchange import guards

DIMENSION = 211


def judged(updates: np.ndarray, config: c.GuardConfig, there: np.ndarray | None = None, devices: int = 1) -> list[str]:
  """The verdicts on rows `[n, DIMENSION]`, all siblings: in two leaves, one of them of stacked layers."""
  mesh, count = partition.make_mesh(jax.devices()[:devices]), len(updates)
  size = partition.padded_size(count, mesh)
  siblings = np.array([[j for j in range(count) if j != i] for i in range(count)], np.int32).reshape(count, count - 1)
  siblings = np.pad(siblings, [(0, size - count), (0, max(0, 1 - siblings.shape[1]))])
  mask = np.zeros(siblings.shape, bool)
  mask[:count, : count - 1] = True
  there = np.ones(count, bool) if there is None else there
  rows = np.pad(np.float32(updates), [(0, size - count), (0, 0)])
  tree = {"norm": rows[:, :11], "blocks": rows[:, 11:].reshape(size, 2, 4, 25)}
  judge = jax.jit(lambda tree, there: guards.judge(
    config, tree, there, jnp.asarray(siblings), jnp.asarray(mask), links.neighbours(siblings, mask, mesh), mesh
  ))
  verdict = judge(partition.put(tree, mesh), partition.put(np.pad(there, (0, size - count)), mesh))
  return [guards.VERDICTS[code] for code in np.asarray(verdict)[:count]]


def related(count: int, share: float, seed: int = 0) -> np.ndarray:
  """Updates with `share` of their squared length in common: pairwise cosines of about `share`."""
  draw = np.random.default_rng(seed)
  common = draw.standard_normal(DIMENSION)
  return np.sqrt(share) * common + np.sqrt(1 - share) * draw.standard_normal((count, DIMENSION))


ALL = c.GuardConfig(norm_ratio=5.0, opposition=0.1)


@pytest.mark.parametrize("devices", [1, 8])
def test_each_attack_has_its_verdict(devices: int) -> None:
  updates = related(6, 0.5)
  updates[0] *= 100
  updates[2] *= -1
  updates[4, 3] = math.nan
  found = judged(updates, ALL, devices=devices)
  assert found == ["too_large", "", "opposed", "", "not_finite", ""]
  assert {str(i): what for i, what in enumerate(found) if what} == oracle_guards.rejected(
    ALL, {str(i): update for i, update in enumerate(updates)}
  )


def test_only_what_is_not_finite_is_rejected_unless_limits_are_set() -> None:
  updates = related(4, 0.9)
  updates[0] *= -1e6
  updates[1, -1] = math.inf
  updates[2] = 1e30  # finite, but its length is not
  assert judged(updates, c.GuardConfig()) == ["", "not_finite", "not_finite", ""]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.95])
def test_honest_updates_pass_however_related(share: float) -> None:
  lengths = np.array([0.5, 1, 1, 2, 3, 1])[:, None]
  assert judged(lengths * related(6, share), ALL) == [""] * 6


def test_honest_updates_pass_where_the_federation_has_converged() -> None:
  """There they cancel, so that each is the opposite of the others' mean."""
  for count in (2, 3, 6):
    updates = related(count, 0.0)
    updates -= updates.mean(axis=0)
    assert judged(updates, ALL) == [""] * count


def test_one_of_another_kind_passes() -> None:
  updates = related(5, 0.5)
  updates[0] = np.random.default_rng(9).standard_normal(DIMENSION)
  assert judged(updates, ALL) == [""] * 5


def test_nobody_is_compared_with_those_who_are_not_there() -> None:
  updates = related(5, 0.5)
  updates[0] *= 100
  updates[1:3] *= math.nan
  there = np.array([True, False, False, True, True])
  assert judged(updates, ALL, there) == ["too_large", "", "", "", ""]
  assert judged(updates, ALL, np.eye(5, dtype=bool)[0]) == [""] * 5  # alone, nothing is too large


def test_of_two_the_longer_one_is_too_large() -> None:
  assert judged(related(2, 0.5) * np.array([[1], [100]]), ALL) == ["", "too_large"]
