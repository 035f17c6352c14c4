"""Robust aggregation: bounded by what honest members send, equal to the mean where it should be, anywhere."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from worldlm_jax import config as c, oracle_guards, partition
from worldlm_jax.exchange import backbone, robust

KINDS = ("mean", "trimmed_mean", "median", "norm_bounded")
PARENTS = np.array([0, 0, 0, 1, 1, 1, 1, 2])


def members(seed: int = 0) -> dict[str, np.ndarray]:
  draw = np.random.default_rng(seed)
  return {"norm": draw.standard_normal((8, 5)).astype(np.float32),
          "blocks": draw.standard_normal((8, 2, 3, 7)).astype(np.float32)}


def combined(config: c.BackboneConfig, tree: dict[str, np.ndarray], weights: np.ndarray, own: np.ndarray,
             devices: int = 1) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """The federations' differences, and the shares."""
  mesh = partition.make_mesh(jax.devices()[:devices])
  rows = partition.padded_size(3, mesh)
  own = np.pad(np.float32(own), (0, rows - 3))

  @jax.jit
  def run(tree, weights, own):
    shares = backbone.shares(PARENTS, weights, own, 3)
    return robust.combiner(config)(tree, shares, rows, mesh), shares

  found, shares = run(partition.put(tree, mesh), partition.put(np.float32(weights), mesh), own)
  return jax.tree.map(lambda leaf: np.asarray(leaf)[:3], found), np.asarray(shares)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_a_plain_loop_makes_of_those_who_are_there(kind: str, devices: int) -> None:
  tree, weights, own = members(), np.array([1, 2, 3, 1, 0, 2, 2, 0]), np.array([0.0, 1.5, 0.0])
  tree["norm"][4] = tree["blocks"][7] = np.nan  # of no weight
  config = c.BackboneConfig(aggregate=kind, trim=0.15, norm_bound=0.9)
  found, shares = combined(config, tree, weights, own, devices)
  for p in range(3):
    here = np.flatnonzero(shares[:, p])
    if not len(here):
      assert all((leaf[p] == 0).all() for leaf in found.values())
      continue
    expected = oracle_guards.combined(
      config, [{name: leaf[i] for name, leaf in tree.items()} for i in here], shares[here, p].tolist()
    )
    for name, leaf in found.items():
      np.testing.assert_allclose(leaf[p], expected[name], atol=2e-4 if kind == "median" else 2e-6)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(seed=st.integers(0, 99), scale=st.sampled_from([-1e6, 1e3, 1e9]), who=st.integers(3, 6))
def test_one_of_four_cannot_lead_further_than_the_others_go(seed: int, scale: float, who: int) -> None:
  tree = members(seed)
  honest = [i for i in range(3, 7) if i != who]
  for leaf in tree.values():
    leaf[who] *= scale
  for kind in ("trimmed_mean", "median"):
    found, _ = combined(c.BackboneConfig(aggregate=kind, trim=0.26), tree, np.ones(8), np.zeros(3))
    for name, leaf in tree.items():
      assert (found[name][1] <= leaf[honest].max(axis=0) + 1e-5).all()
      assert (found[name][1] >= leaf[honest].min(axis=0) - 1e-5).all()
  found, _ = combined(c.BackboneConfig(aggregate="norm_bounded"), tree, np.ones(8), np.zeros(3))
  longest = max(np.sqrt(sum(np.square(leaf[i]).sum() for leaf in tree.values())) for i in honest)
  assert np.sqrt(sum(np.square(leaf[1]).sum() for leaf in found.values())) <= longest * (1 + 1e-5)


def test_of_identical_members_each_kind_makes_the_member_itself() -> None:
  tree = jax.tree.map(lambda leaf: np.repeat(leaf[:1], 8, axis=0), members())
  for kind in KINDS:
    found, _ = combined(c.BackboneConfig(aggregate=kind), tree, np.arange(1.0, 9.0), np.zeros(3))
    for name, leaf in tree.items():
      np.testing.assert_allclose(found[name], leaf[:3], rtol=1e-5, atol=1e-6)


def test_nothing_cut_off_is_the_mean() -> None:
  arguments = members(), np.arange(1.0, 9.0), np.array([2.0, 0.0, 0.0])
  mean, _ = combined(c.BackboneConfig(), *arguments)
  trimmed, _ = combined(c.BackboneConfig(aggregate="trimmed_mean", trim=0.0), *arguments)
  for name, leaf in mean.items():
    np.testing.assert_allclose(trimmed[name], leaf, atol=1e-5)


@pytest.mark.parametrize(("weights", "expected"), [
  ([1, 1, 1], 2.0), ([1, 1, 3], 5.0), ([2, 1, 1], 1.5), ([1, 0, 1], 3.0),
])
def test_the_median_goes_by_weight(weights: list[float], expected: float) -> None:
  tree = {"x": np.pad(np.float32([[1], [2], [5]]), [(0, 5), (0, 0)])}
  found, _ = combined(c.BackboneConfig(aggregate="median"), tree, np.array([*weights, 0, 0, 0, 0, 0]), np.zeros(3))
  assert found["x"][0, 0] == pytest.approx(expected, abs=1e-3)
