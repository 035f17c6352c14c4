"""What a node's releases amount to: epsilon at delta, with `dp-accounting`.

Two ledgers for each node, since they are of different units; each composes what happened, and nothing else:

  organisation   all of the node's text. Its updates: Gaussian releases, and those of the clip's quantile where it
                 adapts
  example        a window or, with packing=documents, a document. The steps of DP-SGD: Gaussians of truncated Poisson
                 samples (arXiv:2508.15089)

The neighbouring relation is "zero-out" (P. Kairouz et al., arXiv:2103.00039, definition 1.1): the unit gives way to
none, while the sizes of all texts, who takes part and when stay known. Gaussians compose to a Gaussian, whose epsilon
is exact; the steps of DP-SGD go by privacy loss distributions. Renyi's bound stands beside both, to compare.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from worldlm_jax import checks
from worldlm_jax.config import NodeSettings

RELATION = "zero-out: the unit gives way to none; sizes of texts and who takes part are known"
UNITS = {
  "organisation": "organisation: all text of the node",
  "window": "window: one training window of tokens; a document may span several windows, and a window documents",
  "document": "document: all windows of one",
}
POINTS = 50_000  # of a privacy loss distribution, about


class Examples(NamedTuple):
  """What DP-SGD samples from."""

  number: int  # of windows or documents
  batch_size: int  # how many a step has on average
  capacity: int  # and at most: of more, a random subset is taken


def require_library() -> Any:
  """The `dp_accounting` package. Raises `InputError` where it is not installed."""
  try:
    import dp_accounting

    return dp_accounting
  except ImportError:
    checks.fail("privacy", "on", "the package dp-accounting", "pip install 'worldlm_jax[privacy]'")


def update_epsilon(settings: NodeSettings, releases: int, replaced: bool = False) -> float:
  """Epsilon of so many releases of a node's update, at its delta; inf without noise.

  With `replaced`, the text gives way to any other text and not to none, which makes all sensitivities twice as large.
  """
  if not releases:
    return 0.0
  squared = _release_squared(settings) * releases * (4 if replaced else 1)
  if math.isinf(squared):
    return math.inf
  return float(require_library().get_epsilon_gaussian(1 / math.sqrt(squared), settings.privacy_delta))


def lasting_noise(settings: NodeSettings, releases: int) -> float:
  """The noise multiplier with which a node's budget suffices for so many releases of updates with a fixed clip."""
  sigma = require_library().get_sigma_gaussian(settings.privacy_budget, settings.privacy_delta)
  return float(sigma * math.sqrt(releases))


def update_epsilon_rdp(settings: NodeSettings, releases: int) -> float:
  """The same by Renyi's differential privacy."""
  if not releases or not all(_multipliers(settings)):
    return math.inf if releases else 0.0
  return _rdp(lambda library: [
    (library.GaussianDpEvent(z), releases) for z in _multipliers(settings)
  ], settings.privacy_delta)


def _multipliers(settings: NodeSettings) -> list[float]:
  """The noise multipliers of one release."""
  return [settings.privacy_noise] + [settings.privacy_quantile_noise] * bool(settings.privacy_quantile)


def _release_squared(settings: NodeSettings) -> float:
  return sum(1 / z**2 if z else math.inf for z in _multipliers(settings))


def example_epsilon(settings: NodeSettings, examples: Examples, steps: int) -> float:
  """Epsilon of so many steps of DP-SGD, at the node's delta; inf without noise."""
  if not steps:
    return 0.0
  if not settings.example_noise:
    return math.inf
  one = _step(settings.example_noise, examples, _interval(settings, examples, steps))
  return float(one.self_compose(steps).get_epsilon_for_delta(settings.privacy_delta))


def example_epsilon_rdp(settings: NodeSettings, examples: Examples, steps: int) -> float:
  """By Renyi's differential privacy, as if no batch were ever full: close, but no bound."""
  if not steps or not settings.example_noise:
    return math.inf if steps else 0.0
  rate = min(1.0, examples.batch_size / examples.number)
  return _rdp(lambda library: [
    (library.PoissonSampledDpEvent(rate, library.GaussianDpEvent(settings.example_noise)), steps)
  ], settings.privacy_delta)


def _rdp(events: Callable[[Any], list[tuple[Any, int]]], delta: float) -> float:
  library = require_library()
  from dp_accounting import rdp

  accountant = rdp.RdpAccountant(neighboring_relation=library.NeighboringRelation.REPLACE_SPECIAL)
  for event, count in events(library):
    accountant.compose(event, count)
  return float(accountant.get_epsilon(delta))


def _interval(settings: NodeSettings, examples: Examples, steps: int) -> float:
  """How finely privacy losses are told apart: as finely as `POINTS` allow. It errs to the safe side."""
  z = settings.example_noise
  widest = max(example_epsilon_rdp(settings, examples, steps), 1 / (2 * z * z) + 10 / z)
  return max(1e-4, 2.0 ** math.ceil(math.log2(widest / POINTS)))


@functools.lru_cache(maxsize=64)
def _step(noise: float, examples: Examples, interval: float) -> Any:
  library = require_library()
  from dp_accounting.pld import privacy_loss_distribution

  return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
    dataset_size=examples.number, sampling_probability=min(1.0, examples.batch_size / examples.number),
    truncated_batch_size=examples.capacity, noise_multiplier=noise, value_discretization_interval=interval,
    neighboring_relation=library.NeighboringRelation.REPLACE_SPECIAL,
  )


def allowed(settings: NodeSettings, examples: Examples | None, updates: bool, most: int) -> int:
  """How often, up to `most`, a node may train before an epsilon would exceed its budget.

  Args:
    settings: of the node, its `local_steps` being those of each time.
    examples: of DP-SGD, or None without.
    updates: whether its updates are released.
    most: how often it would like to.
  """

  def fits(times: int) -> bool:
    if updates and update_epsilon(settings, times) > settings.privacy_budget:
      return False
    return examples is None or (
      example_epsilon(settings, examples, times * settings.local_steps) <= settings.privacy_budget
    )

  if math.isinf(settings.privacy_budget) or fits(most):
    return most
  low, high = 0, most  # fits(low) and not fits(high)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low


def report(
  settings: NodeSettings, examples: Examples | None, unit: str, updates: int, steps: int
) -> dict[str, Any]:
  """What is claimed of one node: by unit, for JSON.

  Args:
    settings: of the node.
    examples: of DP-SGD, or None without.
    unit: "window" or "document".
    updates: how many updates were released, 0 if they are not protected.
    steps: how many steps of DP-SGD were made.
  """
  found = {}
  common = {"delta": settings.privacy_delta, "relation": RELATION, "budget": settings.privacy_budget}
  if settings.privacy != "none":
    found["organisation"] = {
      "unit": UNITS["organisation"], "where": settings.privacy, "releases": updates,
      "epsilon": update_epsilon(settings, updates), "epsilon_rdp": update_epsilon_rdp(settings, updates),
      "epsilon_if_replaced": update_epsilon(settings, updates, replaced=True), **common,
    }
  if examples is not None:
    found["example"] = {
      "unit": UNITS[unit], "where": "training", "releases": steps,
      "epsilon": example_epsilon(settings, examples, steps),
      "epsilon_rdp": example_epsilon_rdp(settings, examples, steps),
      "sampling": f"Poisson: {examples.batch_size} of {examples.number} on average, {examples.capacity} at most",
      **common,
    }
  return found
