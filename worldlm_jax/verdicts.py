"""What the runs of a comparison say together: means over seeds, ratios, and whether joining pays for a node.

Pure functions on what single runs wrote. A `Stat` is `{"mean", "standard_error", "values"}`, one value for each
seed, in the seeds' order. A value is None where its run diverged or a number is not finite, and then the mean is
None too: a mean over the seeds that went well would speak for the wrong algorithm.
"""

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy import special  # type: ignore[import-untyped]

Stat = dict[str, Any]
UNITS = ("loss_nats", "perplexity", "bits_per_byte")
KINDS = ("received", "personalised")


class Run(NamedTuple):
  """One run: its summary.json, None where it diverged, and the rows of its metrics.jsonl."""

  summary: Mapping[str, Any] | None
  rows: Sequence[Mapping[str, Any]] = ()


def stat(values: Iterable[float | None]) -> Stat:
  """Mean and standard error (sample standard deviation / sqrt(n), None for one value) over seeds."""
  found = [float(v) if v is not None and math.isfinite(v) else None for v in values]
  known = [v for v in found if v is not None]
  mean = error = None
  if known and len(known) == len(found):
    mean = statistics.fmean(known)
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
  return {"mean": mean, "standard_error": error, "values": found}


def paired(function: Callable[[float, float], float], one: Stat, other: Stat) -> Stat:
  """`function` of the two values of each seed."""
  return stat(
    None if a is None or b is None else function(a, b) for a, b in zip(one["values"], other["values"], strict=True)
  )


def exceeds_noise(difference: Stat) -> bool | None:
  """Whether a mean over seeds differs from 0 at the 5% level (Student's t, two-sided).

  None where nothing can be said: with one seed, or without a mean.
  """
  if difference["mean"] is None or difference["standard_error"] is None:
    return None
  quantile = special.stdtrit(len(difference["values"]) - 1, 0.975)
  return bool(abs(difference["mean"]) > quantile * difference["standard_error"])


def gain_percent(reference: Stat, option: Stat) -> Stat:
  """By how much the perplexity `reference` lies above `option`, in percent of the latter: > 0 is better."""
  return paired(lambda a, b: 100 * (a / b - 1), reference, option)


def results(entries: Mapping[str, Sequence[Run]], paths: Sequence[str]) -> dict[str, dict[str, Any]]:
  """The results of every entry.

  Args:
    entries: by name, the runs in the order of the seeds.
    paths: of the nodes with text.

  Returns:
    By name: scores on the test split per node and of the tree, ratios to every other entry, tokens, bytes, seconds,
    learning curves and the node x corpus matrix. See docs/compare.md.
  """
  found = {name: _entry(runs, paths) for name, runs in entries.items()}
  perplexity = {
    name: {kind: entry["tree"][kind]["mean"]["perplexity"] for kind in KINDS} for name, entry in found.items()
  }
  for name, entry in found.items():
    entry["ratios"] = {
      other: {kind: paired(lambda a, b: a / b, perplexity[other][kind], perplexity[name][kind]) for kind in KINDS}
      for other in found if other != name
    }
  return found


def verdict(path: str, found: Mapping[str, Any], own: str, alone: str | None) -> dict[str, Any]:
  """What a node should know: its best option, and what joining brings it, by personalised test perplexity.

  Args:
    path: of the node.
    found: what `results` returned.
    own: the entry that the others are held against.
    alone: the entry that stands for training alone, if there is one.
  """
  options = {name: entry["nodes"][path]["personalised"]["perplexity"] for name, entry in found.items()}
  against_alone = {name: gain_percent(options[alone], option) for name, option in options.items()} if alone else {}
  baseline = _best({name: option for name, option in options.items() if name != own})
  return {
    "node": path, "options": options, "best": _best(options), "gain_percent": against_alone,
    "own_gain_percent": against_alone.get(own),
    "own_exceeds_noise": exceeds_noise(against_alone[own]) if alone else None,
    "best_baseline": baseline,
    "own_against_best_baseline_percent": gain_percent(options[baseline], options[own]) if baseline else (
      stat(None for _ in options[own]["values"])
    ),
  }


def seconds(run: Run) -> float | None:
  """How long a run took, all activities together; None where it diverged."""
  return None if run.summary is None else sum(run.summary["seconds"].values())


def unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  """In which respects two summaries of the same seed show that the runs were not given the same, in words."""
  found = []
  if one["tokens"] != other["tokens"]:
    found.append(f"tokens trained on ({one['tokens']} and {other['tokens']})")
  if one["fairness"]["initial_parameters"] != other["fairness"]["initial_parameters"]:
    found.append("initial parameters")
  for what, name in (("batches", "windows trained on"), ("evaluation", "text of the evaluation")):
    here, there = one["fairness"][what], other["fairness"][what]
    if where := [path for path in sorted(here.keys() | there.keys()) if here.get(path) != there.get(path)]:
      found.append(f"{name} ({', '.join(where)})")
  return found


def fairness(by_seed: Sequence[Sequence[Run]]) -> dict[str, Any]:
  """What all runs were given: tokens of a run, and digests over all seeds; nothing where all runs of a seed diverged.

  Args:
    by_seed: the runs of each seed, which were found equal.
  """
  found = [next((run.summary for run in runs if run.summary is not None), None) for runs in by_seed]
  given = [summary["fairness"] for summary in found if summary is not None]
  if len(given) < len(by_seed):
    return {"tokens": None, "initial_parameters": None, "batches": {}, "evaluation": {}}

  def digests(name: str) -> dict[str, str]:
    return {path: _joined([each[name][path] for each in given]) for path in given[0][name]}

  return {
    "tokens": round(statistics.fmean(summary["tokens"] for summary in found if summary is not None)),
    "initial_parameters": _joined([each["initial_parameters"] for each in given]),
    "batches": digests("batches"), "evaluation": digests("evaluation"),
  }


def _joined(digests: Sequence[str]) -> str:
  """One digest of several; where they are all the same, that one."""
  if len(set(digests)) == 1:
    return digests[0]
  return hashlib.sha256(" ".join(digests).encode()).hexdigest()[: len(digests[0])]


def _best(options: Mapping[str, Stat]) -> str | None:
  """The name of the lowest mean; None where no option has one."""
  known = {name: option["mean"] for name, option in options.items() if option["mean"] is not None}
  return min(known, key=lambda name: known[name], default=None)


def _entry(runs: Sequence[Run], paths: Sequence[str]) -> dict[str, Any]:
  def over_seeds(*keys: str) -> Stat:
    return stat(_at(run.summary, *keys) for run in runs)

  def units(*keys: str) -> dict[str, Stat]:
    return {unit: over_seeds(*keys, unit) for unit in UNITS}

  tokens = over_seeds("tokens")["mean"]
  activities = sorted({name for run in runs if run.summary for name in run.summary["seconds"]})
  return {
    "diverged": any(run.summary is None for run in runs),
    "nodes": {path: {kind: units("nodes", path, kind) for kind in KINDS} for path in paths},
    "tree": {kind: {which: units("tree", kind, which) for which in ("mean", "worst")} for kind in KINDS},
    "tokens": None if tokens is None else round(tokens),
    "bytes_down": over_seeds("bytes_down"), "bytes_up": over_seeds("bytes_up"),
    "seconds": {"total": stat(seconds(run) for run in runs)} | {
      name: stat(None if run.summary is None else run.summary["seconds"].get(name, 0.0) for run in runs)
      for name in activities
    },
    "curves": _curves(runs, paths), "matrix": _matrix(runs),
  }


def _at(value: Mapping[str, Any] | None, *keys: str) -> Any:
  """The value under a row of keys; None in a run that diverged."""
  for key in keys if value is not None else ():
    value = value[key]  # type: ignore[index]
  return value


def _curves(runs: Sequence[Run], paths: Sequence[str]) -> dict[str, dict[str, list[float | None]]]:
  """Valid perplexity by round, as long as all seeds have one: a seed that diverged ends the curve."""
  by_place = [{(row["round"], row["node"]): row for row in run.rows} for run in runs]
  num_rounds = 1 + max((row["round"] for run in runs for row in run.rows), default=-1)

  def mean(path: str, index: int, kind: str) -> float | None:
    return stat(rows.get((index, path), {}).get(kind, {}).get("perplexity") for rows in by_place)["mean"]

  return {path: {kind: [mean(path, index, kind) for index in range(num_rounds)] for kind in KINDS} for path in paths}


def _matrix(runs: Sequence[Run]) -> dict[str, Any] | None:
  found = [run.summary["matrix"] for run in runs if run.summary is not None and run.summary.get("matrix")]
  if len(found) < len(runs):
    return None
  cells = zip(*(matrix["perplexity"] for matrix in found), strict=True)
  return {"models": found[0]["models"], "corpora": found[0]["corpora"],
          "perplexity": [[stat(cell)["mean"] for cell in zip(*rows, strict=True)] for rows in cells]}
