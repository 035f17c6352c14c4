"""The section of a run's report that says what is claimed of its privacy, and what is not."""

from collections.abc import Mapping
from typing import Any

from worldlm_jax.reporting import page, words
from worldlm_jax.reporting.files import Run
from worldlm_jax.reporting.page import Html

NO_BOUND = "no bound"


def make(run: Run) -> Html:
  """A table of all ledgers; nothing for a run in which nobody is protected, or which is unfinished."""
  report = (run.summary or {}).get("privacy")
  if not report:
    return Html("")
  claims = [(path, claim) for path, found in report["nodes"].items() for claim in found.values()]
  rows = [[
    page.breakable(run.tree.title(path)), claim["unit"].split(":")[0], claim["where"], str(claim["releases"]),
    _epsilon(claim, "epsilon"), _epsilon(claim, "epsilon_rdp"), _epsilon(claim, "epsilon_if_replaced"),
    f"{claim['delta']:g}", _budget(claim["budget"]),
  ] for path, claim in claims]
  said = list(dict.fromkeys([claim["unit"] for _, claim in claims] + [claim["relation"] for _, claim in claims]
                            + [claim["sampling"] for _, claim in claims if "sampling" in claim]))
  unprotected = words.sentence_list([run.tree.title(path) for path in report["not_protected"]])
  return page.join([
    page.table(["node", "unit", "where", "releases", "epsilon", "by RDP", "if replaced", "delta", "budget"], rows,
               left=3),
    page.paragraph("What everybody else may learn of one unit from all that a node has released. " + ". ".join(said)
                   + ". “If replaced” is for a unit that gives way to any other one. The scores on this page, the "
                   "checkpoints and a node's own model are not covered: they stay with the node."),
    page.paragraph(f"Not protected: {unprotected}.") if unprotected else Html(""),
  ])


def _epsilon(claim: Mapping[str, Any], name: str) -> str:
  if name not in claim:
    return words.UNKNOWN
  return NO_BOUND if claim[name] is None else f"{claim[name]:.4g}"


def _budget(value: float | None) -> str:
  return "none" if value is None else f"{value:g}"
