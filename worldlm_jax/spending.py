"""What each node of a run may spend of its privacy, and what it has spent: from counts of what happened."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from worldlm_jax import checks, distributed, schedule
from worldlm_jax.config import Config
from worldlm_jax.data import poisson
from worldlm_jax.federation import Federation, Member
from worldlm_jax.privacy import accounting, policy
from worldlm_jax.texts import Texts


class Spending:
  """The privacy of a run. Collective, since each process knows how many examples its own texts have.

  Args:
    config: the experiment.
    federation: the tree, as the algorithm arranges it.
    texts: of all nodes.
    releases: whether the algorithm lets updates leave their nodes.
    rounds: the steps of all rounds as they were without budgets.

  Raises:
    checks.InputError: a budget does not suffice for a single training.
  """

  def __init__(
    self, config: Config, federation: Federation, texts: Texts, releases: bool,
    rounds: Sequence[Sequence[schedule.Step]],
  ):
    self._federation, self._releases = federation, releases
    self._unit = "document" if config.data.packing == "documents" else "window"
    own = {
      path: poisson.num_examples(text.train) for path, text in texts.here.items()
      if policy.protects_examples(federation.by_path[path].settings)
    }
    counts = {path: count for found in distributed.gather(own) for path, count in found.items()}
    sizes = {path: federation.by_path[path].settings.batch_size for path in counts}
    self._examples = {
      path: accounting.Examples(count, sizes[path], min(count, poisson.places(sizes[path])))
      for path, count in counts.items()
    }
    self._budgets = policy.trainings_left(federation, self._examples, releases, rounds)
    self.rounds = policy.within_budgets(federation, rounds, self._budgets)
    for path, (left, wanted) in self._budgets.items():
      settings = federation.by_path[path].settings
      checks.require(left > 0 or not wanted, f"node {path!r}: privacy_budget", settings.privacy_budget,
                     "an epsilon that suffices for one training", "raise it, or the noise multiplier")

  def title(self) -> list[str]:
    """What a run should say of it before it begins: who will stop training, and what would prevent that."""
    lines = []
    for path, (left, wanted) in self._budgets.items():
      member = self._federation.by_path[path]
      if left < wanted:
        enough = ""
        if self._releases and policy.protects_updates(member.settings) and not member.settings.privacy_quantile:
          noise = accounting.lasting_noise(member.settings, wanted)
          enough = f"; privacy_noise={noise:.3g} would last"
        lines.append(f"{path} trains {left} of {wanted} times: then its privacy budget, epsilon "
                     f"{member.settings.privacy_budget:g}, is spent{enough}")
    return lines

  def report(self, spent: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What is claimed, by node and unit, and who is not protected; {} where nobody is. `spent` is `Progress.private`.

    An epsilon of None is no bound at all.
    """
    nodes = {}
    training = [m for m in self._federation.members if m.trains]
    for member in training:
      updates, steps = spent.get(member.path, (0, 0))
      settings = member.settings
      found = accounting.report(settings, self._examples.get(member.path), self._unit, updates, steps)
      if found:
        nodes[member.path] = {unit: {k: _finite(v) for k, v in claim.items()} for unit, claim in found.items()}
    if not nodes:
      return {}
    return {"nodes": nodes, "not_protected": [m.path for m in training if self._is_open(m)]}

  def _is_open(self, member: Member) -> bool:
    """Whether updates of a node's training leave it, and nothing of it is protected."""
    settings = member.settings
    return self._releases and not policy.protects_updates(settings) and not policy.protects_examples(settings)


def closing_lines(report: Mapping[str, Any]) -> list[str]:
  """What a finished run says of its privacy, from `Spending.report`."""
  lines, nodes = [], report.get("nodes", {})
  for unit in ("organisation", "example"):
    claims = {path: found[unit] for path, found in nodes.items() if unit in found}
    if not claims:
      continue
    worst = max(claims, key=lambda path: math.inf if claims[path]["epsilon"] is None else claims[path]["epsilon"])
    claim = claims[worst]
    bound = "no bound (no noise)" if claim["epsilon"] is None else f"epsilon {claim['epsilon']:.4g}"
    lines.append(f"privacy: {bound} at delta {claim['delta']:g}, or less elsewhere, at {worst} after "
                 f"{claim['releases']} releases; {claim['unit']}; {claim['relation']}")
  if nodes and report["not_protected"]:
    lines.append(f"not protected: {', '.join(report['not_protected'])}")
  return lines


def _finite(value: Any) -> Any:
  return None if isinstance(value, float) and not math.isfinite(value) else value
