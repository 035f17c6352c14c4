"""Receipts: for each exchange of a round who gave what to whom, how much of it, and which rule decided.

A line of receipts.jsonl has these fields:

  round         from 0
  phase         "up": an update to the federation; "down": what a node gets from it; "attention": whose updates are in
                what it gets
  from, to      paths
  part          "backbone", "key_layers", "addition" (what a parent adds to a node's own model), "residual_layer"; by
                attention, "model" where the whole of a model attends as one unit, or "key_layers"
  bytes         that crossed the edge; 0 for what is within something else that did, or did not cross
  norm          Euclidean, of what was sent: an update as it arrived, a parent's part of a model, an addition
  privacy_cost  epsilon, at the sender's privacy_delta: what the release of its update added to what it had spent. All
                parts are one release, so each line of it has the same; null where nothing is accounted for, or no bound
  decision      "sent" | "capped" (it counts less than it would have) | "withheld" (by a rule of the sender's, or of
                somebody whose learning it holds) | "rejected" (by a rule of the receiver's, or by its guards)
  rule          that decided, such as "share_key_layers=federation of law/eu" or "guards: too_large"; "" where none
                restricted anything
  weight        up: what it counted in the federation's mean; attention: how much of it was added
  reach         up: the highest federation whose mean it is in; null where it is in none

What rules leave out of a pool of residual layers has no line for each reader, but one for a member whose layers nobody
may get. Lines stand in the order of the phases, so repeats within a round come one after the other.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from worldlm_jax import records, state as state_lib
from worldlm_jax.config import KeyLayerConfig, NodeSettings
from worldlm_jax.exchange import guards
from worldlm_jax.federation import Member
from worldlm_jax.governance import KEY_LAYERS, Governance
from worldlm_jax.privacy import accounting

Receipt = dict[str, Any]


class Receipts:
  """Writes the receipts of phases.

  Args:
    governance: the rules of the tree; those of one without rules permit everything.
    sizes: of the messages.
    config: of the attention.
  """

  def __init__(self, governance: Governance, sizes: records.EdgeBytes, config: KeyLayerConfig):
    self._governance, self._federation = governance, governance.federation
    self._sizes = {"backbone": sizes.backbone, KEY_LAYERS: sizes.key_layers}
    self._residual_bytes = sizes.residual_layer
    self._over_updates, self._candidates = config.values == "updates", config.candidates
    self._attending = "model" if self._over_updates and config.granularity == "model" else KEY_LAYERS
    self._paths = [m.path for m in self._federation.members]

  def down(self, index: int, level: int, active: np.ndarray, topology: state_lib.Topology,
           log: Mapping[str, Any]) -> list[Receipt]:
    """Of a down-phase; `log` is that of `rules.down`."""
    found = []
    for i, member in enumerate(self._federation.levels[level]):
      if not active[i] or member.parent is None:
        continue
      for part in self._governance.shares:
        why = self._governance.takes(part, member.path)
        norm = _number(log, f"norm_{part}", topology.parent[i])
        if why:
          found.append(_receipt(index, "down", member.parent, member.path, part, rule=why))
        elif _flag(log, f"hands_{part}", i):
          found.append(_receipt(index, "down", member.parent, member.path, part, self._sizes[part], norm))
      found += self._residuals(index, level, i, member.path, log)
      if _flag(log, "attends", i):
        found += self._attention(index, level, i, topology, log)
    return found

  def _attention(self, index: int, level: int, i: int, topology: state_lib.Topology,
                 log: Mapping[str, Any]) -> list[Receipt]:
    """What is added to a node's own model, and whose updates are in it."""
    members = self._federation.levels[level]
    path, parent = members[i].path, str(members[i].parent)
    norm = _number(log, "norm_addition", i)
    size = sum(size for part, size in self._sizes.items() if _flag(log, f"hands_addition_{part}", i))
    found = [_receipt(index, "down", parent, path, "addition", size, norm)] if size else []
    weights = np.asarray(log["weights"])[i].mean(axis=-1)
    width = topology.siblings.shape[1]
    trains = self._federation.by_path[parent].trains
    why = self._governance.attends(path, parent) if trains else ""
    sources = [(parent, weights[0], why)] + [
      (members[s].path, weight, self._governance.attends(path, members[s].path)) for s, there, weight in
      zip(topology.siblings[i], topology.siblings_mask[i], weights[len(weights) - width :], strict=True)
      if there and self._candidates != "everybody"
    ]
    for source, weight, why in sources:
      if weight > 0 or why:
        found.append(_receipt(index, "attention", source, path, self._attending, 0, None, why,
                              None if why else round(float(weight), 6)))
    return found

  def _residuals(self, index: int, level: int, i: int, path: str, log: Mapping[str, Any]) -> list[Receipt]:
    if "routed_origin" not in log:
      return []
    forwards = not self._over_updates or self._federation.is_federation(level)[i]
    origins = np.asarray(log["routed_origin"])[i]
    return [
      _receipt(index, "down", self._paths[origins[r, m]], path, "residual_layer",
               self._residual_bytes * int(forwards), _number(log, "norm_residual", (i, r, m)))
      for r, m in zip(*np.nonzero(origins >= 0), strict=True)
    ]

  def up(self, index: int, level: int, active: np.ndarray, members_active: np.ndarray, topology: state_lib.Topology,
         releases: Mapping[str, int], log: Mapping[str, Any], present: Mapping[int, np.ndarray]) -> list[Receipt]:
    """Of an up-phase; `log` is that of `rules.up`, `present` as in `records.Exchanges.up`.

    `releases` says how many releases nodes have made, the one that is sent included; nobody else has released anything.
    """
    found, governance = [], self._governance
    for c, member in enumerate(self._federation.levels[level + 1]):
      i = self._federation.parents[level + 1][c]
      if not (active[i] and members_active[c]):
        continue
      path, parent = member.path, str(member.parent)
      fails = self._not_good_enough(parent, c, log) or _guarded(log, c)
      cost = _cost(member, releases.get(path, 0))
      for part in governance.shares:
        why = governance.merges(part, path) or fails
        weight = self._weight(part, int(i), c, topology, log)
        cap = self._federation.by_path[parent].settings.member_weight_cap
        capped = cap < 1 and weight is not None and weight >= cap - 1e-6
        size = self._sizes[part] if governance.sends(part, path) else 0
        rule = why or (f"member_weight_cap={cap} of {parent}" if capped else governance.ends_at(part, path))
        found.append(_receipt(
          index, "up", path, parent, part, size, _number(log, f"norm_{part}", c) if size else None, rule,
          None if why else weight, None if why else governance.reached(part, path),
          "" if why else "capped" if capped else "sent", cost if size else None,
        ))
      if count := records.residuals_below(self._federation, path, present):
        found.append(_receipt(index, "up", path, parent, "residual_layer", count * self._residual_bytes))
      if present and (rule := governance.offers_nothing(path)):
        found.append(_receipt(index, "up", path, parent, "residual_layer", rule=rule))
    return found

  def _not_good_enough(self, parent: str, c: int, log: Mapping[str, Any]) -> str:
    floor = self._federation.by_path[parent].settings.quality_floor
    fails = floor > 0 and "gain" in log and np.asarray(log["gain"])[c] < math.log(floor)
    return f"quality_floor={floor} of {parent}" if fails else ""

  def _weight(self, part: str, i: int, c: int, topology: state_lib.Topology, log: Mapping[str, Any]) -> float | None:
    """What a member counted in its federation's mean, or in the attention that took its place."""
    if part == "backbone" or self._over_updates:
      return _number(log, f"share_{part}", c)
    place = int(np.flatnonzero((topology.children[i] == c) & topology.children_mask[i])[0])
    return round(float(np.asarray(log["weights"])[i, 1 + place].mean()), 6) if "weights" in log else None


def _receipt(
  index: int, phase: str, source: str, reader: str, part: str, size: int = 0, norm: float | None = None, rule: str = "",
  weight: float | None = None, reach: str | None = None, decision: str = "", cost: float | None = None,
) -> Receipt:
  decision = decision or ("sent" if not rule else "withheld" if rule.startswith("share_") else "rejected")
  return {
    "round": index, "phase": phase, "from": source, "to": reader, "part": part, "bytes": size, "norm": norm,
    "privacy_cost": cost, "decision": decision, "rule": rule, "weight": weight, "reach": reach,
  }


def _guarded(log: Mapping[str, Any], c: int) -> str:
  """Why guards rejected a member's update; "" if they did not."""
  verdict = int(np.asarray(log["verdict"])[c]) if "verdict" in log else 0
  return f"guards: {guards.VERDICTS[verdict]}" if verdict else ""


@functools.lru_cache(maxsize=4096)
def _epsilon(noise: tuple[Any, ...], releases: int) -> float:
  return accounting.update_epsilon(NodeSettings(**dict(noise)), releases)


def _cost(member: Member, releases: int) -> float | None:
  """What the last of a member's releases added to its epsilon."""
  if member.settings.privacy == "none" or not releases or not member.trains:
    return None
  noise = tuple((name, value) for name, value in dataclasses.asdict(member.settings).items() if "privacy" in name)
  cost = _epsilon(noise, releases) - (_epsilon(noise, releases - 1) if releases > 1 else 0.0)
  return float(f"{cost:.6g}") if math.isfinite(cost) else None


def _flag(log: Mapping[str, Any], name: str, place: Any) -> bool:
  return name in log and bool(np.asarray(log[name])[place])


def _number(log: Mapping[str, Any], name: str, place: Any) -> float | None:
  """A logged number to about the six digits that it has."""
  if name not in log:
    return None
  value = float(np.asarray(log[name])[place])
  return float(f"{value:.6g}") if math.isfinite(value) else None
