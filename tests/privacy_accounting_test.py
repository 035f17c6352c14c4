"""What releases amount to: dp-accounting's own numbers, budgets, and what is claimed in words."""

import math

import dp_accounting
import pytest
from dp_accounting import pld, rdp

from worldlm_jax.config import NodeSettings
from worldlm_jax.privacy import accounting

ZERO_OUT = dp_accounting.NeighboringRelation.REPLACE_SPECIAL


def settings_of(**fields):
  return NodeSettings(**({"privacy": "local", "privacy_clip": 1.0, "privacy_noise": 4.0} | fields))


@pytest.mark.parametrize(("noise", "quantile", "releases"), [(4.0, 0.0, 10), (4.0, 0.5, 10), (9.0, 0.0, 1)])
def test_epsilon_of_updates_is_that_of_dp_accounting(noise, quantile, releases):
  settings = settings_of(privacy_noise=noise, privacy_quantile=quantile, privacy_quantile_noise=6.0)
  events = [dp_accounting.GaussianDpEvent(z) for z in [noise] + [6.0] * bool(quantile)]
  by_pld, by_rdp = pld.PLDAccountant(ZERO_OUT, 1e-3), rdp.RdpAccountant(neighboring_relation=ZERO_OUT)
  for event in events:
    by_pld.compose(event, releases)
    by_rdp.compose(event, releases)
  found = accounting.update_epsilon(settings, releases)
  assert found == pytest.approx(by_pld.get_epsilon(1e-5), rel=1e-3)
  assert accounting.update_epsilon_rdp(settings, releases) == pytest.approx(by_rdp.get_epsilon(1e-5), rel=1e-9)
  assert found <= by_rdp.get_epsilon(1e-5)
  sigma = 1 / math.sqrt(releases * sum(1 / event.noise_multiplier**2 for event in events))
  replaced = accounting.update_epsilon(settings, releases, replaced=True)
  assert replaced == pytest.approx(dp_accounting.get_epsilon_gaussian(sigma / 2, 1e-5))


def test_no_release_costs_nothing_and_no_noise_has_no_bound():
  assert accounting.update_epsilon(settings_of(), 0) == accounting.update_epsilon_rdp(settings_of(), 0) == 0
  assert accounting.update_epsilon(settings_of(privacy_noise=0.0), 1) == math.inf
  assert accounting.update_epsilon_rdp(settings_of(privacy_noise=0.0), 1) == math.inf
  silent = settings_of(privacy_quantile=0.5, privacy_quantile_noise=0.0)
  assert accounting.update_epsilon(silent, 1) == math.inf


EXAMPLES = accounting.Examples(number=400, batch_size=8, capacity=24)


def test_epsilon_of_examples_is_that_of_dp_accounting():
  settings = NodeSettings(example_clip=1.0, example_noise=1.5)
  accountant = pld.PLDAccountant(ZERO_OUT, 2e-4)
  accountant.compose(dp_accounting.TruncatedSubsampledGaussianDpEvent(400, 0.02, 24, 1.5), 60)
  found = accounting.example_epsilon(settings, EXAMPLES, 60)
  assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=2e-3)
  assert found == pytest.approx(accounting.example_epsilon_rdp(settings, EXAMPLES, 60), rel=0.5)
  assert accounting.example_epsilon(settings, EXAMPLES, 0) == 0
  assert accounting.example_epsilon(NodeSettings(example_clip=1.0), EXAMPLES, 1) == math.inf


def test_a_budget_is_never_exceeded_and_used_as_far_as_it_goes():
  settings = settings_of(privacy_budget=2.0)
  allowed = accounting.allowed(settings, None, True, 1000)
  assert 0 < allowed < 1000
  assert accounting.update_epsilon(settings, allowed) <= 2.0 < accounting.update_epsilon(settings, allowed + 1)
  assert accounting.allowed(settings, None, True, 3) == 3
  assert accounting.allowed(settings, None, False, 1000) == 1000  # nothing leaves the node
  assert accounting.allowed(settings_of(), None, True, 1000) == 1000
  enough = settings_of(privacy_budget=2.0, privacy_noise=accounting.lasting_noise(settings, 1000) * 1.0001)
  assert accounting.allowed(enough, None, True, 1000) == 1000


def test_no_finite_number_of_very_weak_releases_needs_much_memory():
  """A privacy loss distribution at this noise would not fit."""
  weak = NodeSettings(example_clip=1.0, example_noise=0.05)
  assert accounting.example_epsilon(weak, EXAMPLES, 10) > 100
  assert accounting.update_epsilon(settings_of(privacy_noise=1e-3), 20) > 1e6


def test_what_is_claimed_names_unit_relation_and_place():
  settings = settings_of(example_clip=1.0, example_noise=1.5)
  found = accounting.report(settings, EXAMPLES, "document", 3, 0)
  assert found["organisation"]["where"] == "local" and found["organisation"]["releases"] == 3
  assert found["organisation"]["epsilon"] == accounting.update_epsilon(settings, 3)
  assert found["example"]["unit"].startswith("document") and "zero-out" in found["example"]["relation"]
  assert accounting.report(NodeSettings(), None, "window", 0, 0) == {}
