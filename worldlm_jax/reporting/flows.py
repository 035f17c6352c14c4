"""Who gave what to whom, and what rules kept back: the receipts of a run as tables."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from worldlm_jax.reporting import page, words
from worldlm_jax.reporting.files import Tree
from worldlm_jax.reporting.page import Html

LARGEST_MATRIX = 24  # nodes in a table of everybody with everybody
MOST_FLOWS = 400  # lines of the table of all flows
PARTS = {
  "backbone": "backbone", "key_layers": "key layers", "addition": "addition to its own model",
  "residual_layer": "residual layers", "model": "whole model",
}
WAYS = {"up": "update", "down": "from above", "attention": "by attention"}
FORBIDDEN = ("withheld", "rejected")


@dataclasses.dataclass(slots=True)
class Flow:
  """All receipts that have the same ends, part, phase and outcome."""

  times: int = 0
  bytes: int = 0
  norms: list[float] = dataclasses.field(default_factory=list)
  weights: list[float] = dataclasses.field(default_factory=list)

  def add(self, receipt: Mapping[str, Any]) -> None:
    """Counts one receipt."""
    self.times += 1
    self.bytes += receipt["bytes"]
    self.norms += [receipt["norm"]] if words.known(receipt["norm"]) else []
    self.weights += [receipt["weight"]] if words.known(receipt["weight"]) else []


def summed(receipts: Iterable[Mapping[str, Any]], keys: tuple[str, ...]) -> dict[tuple[str, ...], Flow]:
  """The receipts by the values of these fields, in the order in which they first occur."""
  found: dict[tuple[str, ...], Flow] = {}
  for receipt in receipts:
    found.setdefault(tuple(str(receipt[key]) for key in keys), Flow()).add(receipt)
  return found


def section(receipts: Iterable[Mapping[str, Any]], tree: Tree) -> Html:
  """The part of the page; empty where there are no receipts."""
  lines = [receipt for receipt in receipts if receipt["from"] in tree.parents and receipt["to"] in tree.parents]
  if not lines:
    return Html("")
  parts = [_matrix(lines, tree), page.tag("h3", "What rules decided"), _decided(lines, tree)]
  flows = summed([line for line in lines if line["decision"] not in FORBIDDEN], ("from", "to", "phase", "part"))
  rows = [
    [page.breakable(tree.title(source)), page.breakable(tree.title(reader)), f"{PARTS[part]}, {WAYS[phase]}",
     str(flow.times), words.size(flow.bytes) if flow.bytes else words.UNKNOWN, _mean(flow.norms), _mean(flow.weights)]
    for (source, reader, phase, part), flow in flows.items()
  ]
  left_out = f"; the first {MOST_FLOWS} of {len(rows)}" if len(rows) > MOST_FLOWS else ""
  parts.append(page.details(
    f"All that was given, by giver and receiver ({len(rows)})",
    page.paragraph("Norms and weights are means over the times. The norm is that of the update, of the part of the "
                   "model, or of what is added to it. The weight of an update is its share in the federation's "
                   f"mean; by attention, how much of it was added{left_out}."),
    page.table(["from", "to", "what", "times", "bytes", "norm", "weight"], rows[:MOST_FLOWS], left=3),
  ))
  return page.join(parts)


def _matrix(lines: list[Mapping[str, Any]], tree: Tree) -> Html:
  """Everybody with everybody: what rows gave to columns, over all rounds."""
  ends = {line[end] for line in lines for end in ("from", "to")}
  paths = [path for path in tree.paths if path in ends]
  if len(paths) > LARGEST_MATRIX:
    return page.paragraph(f"{len(paths)} nodes gave or got something: too many to show everybody with everybody.")
  found = summed(lines, ("from", "to", "decision"))

  def cell(source: str, reader: str) -> str:
    given = [found[key] for key in ((source, reader, "sent"), (source, reader, "capped")) if key in found]
    refused = any((source, reader, decision) in found for decision in FORBIDDEN)
    if not given:
      return "✕" if refused else ""
    total = sum(flow.bytes for flow in given)
    return (words.size(total) if total else "•") + (" ✕" if refused else "")

  rows = [[page.breakable(tree.title(a)), *(cell(a, b) for b in paths)] for a in paths]
  return page.join([
    page.paragraph("Rows gave to columns: the bytes of all rounds; • is what came within something else, by attention "
                   "or in a residual layer that its parent mixed for it. ✕: rules kept something back."),
    page.table(["from \\ to", *(page.breakable(tree.title(path)) for path in paths)], rows),
  ])


def _decided(lines: list[Mapping[str, Any]], tree: Tree) -> Html:
  """What was withheld, rejected, capped, or went no further than it might, by rule."""
  ruled = [line for line in lines if line["rule"]]
  if not ruled:
    return page.paragraph("Nothing: no rule of any node restricted anything.")
  rows = []
  for (rule, decision, part, source, reader, reach), flow in summed(
    ruled, ("rule", "decision", "part", "from", "to", "reach")
  ).items():
    outcome = f"sent, as far as {tree.title(reach)}" if decision == "sent" and reach in tree.parents else decision
    rows.append([page.code(rule), outcome, PARTS[part], page.breakable(tree.title(source)),
                 page.breakable(tree.title(reader)), str(flow.times)])
  table = page.table(["rule", "outcome", "part", "from", "to", "times"], rows, left=5)
  return table if len(rows) <= 20 else page.details(f"{len(rows)} decisions", table)


def _mean(values: list[float]) -> str:
  return f"{sum(values) / len(values):.3g}" if values else words.UNKNOWN
