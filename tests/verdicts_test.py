"""The arithmetic over seeds: standard errors, pairs, noise, and what a run that diverged leaves of it."""

import math
import statistics
from typing import Any

import pytest

from worldlm_jax import verdicts
from worldlm_jax.verdicts import Run

SCALE = {"loss_nats": 0.1, "perplexity": 1.0, "bits_per_byte": 0.3}


def _units(perplexity: float) -> dict[str, float]:
  return {unit: factor * perplexity for unit, factor in SCALE.items()}


def _run(perplexities: dict[str, float], **other: Any) -> Run:
  """A run whose nodes have these personalised perplexities, and one more each as received."""
  mean = statistics.fmean(perplexities.values())
  summary = {
    "nodes": {".": {"tokens": 0}} | {
      path: {"received": _units(value + 1), "personalised": _units(value)} for path, value in perplexities.items()
    },
    "tree": {kind: {"mean": _units(mean + more), "worst": _units(max(perplexities.values()) + more) | {"node": "?"}}
             for kind, more in (("received", 1), ("personalised", 0))},
    "tokens": 700, "bytes_down": 30, "bytes_up": 50, "seconds": {"training": 7.0, "saving": 0.5},
    "matrix": {"models": [".", "a"], "corpora": ["a"], "perplexity": [[mean], [2 * mean]]},
    "fairness": {"initial_parameters": "1f", "batches": {"a": "2f"}, "evaluation": {"a": "3f"}},
  } | other
  rows = [{"round": i, "node": path, "received": _units(value + 2 - i)} for i in range(2)
          for path, value in perplexities.items()]
  return Run(summary, rows)


DIVERGED = Run(None, [{"round": 0, "node": "a", "received": _units(90.0)}])


@pytest.mark.parametrize(("values", "mean", "error"), [
  ([3.0, 5.0, 10.0], 6.0, math.sqrt(13 / 3)), ([2.0], 2.0, None), ([2.0, 2.0], 2.0, 0.0),
])
def test_mean_and_standard_error(values: list[float], mean: float, error: float | None) -> None:
  assert verdicts.stat(values) == {"mean": mean, "standard_error": error and pytest.approx(error), "values": values}


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_missing_value_leaves_no_mean_of_the_rest(missing: float | None) -> None:
  assert verdicts.stat([3.0, missing, 5.0]) == {"mean": None, "standard_error": None, "values": [3.0, None, 5.0]}


@pytest.mark.parametrize(("values", "expected"), [
  ([7.0], None), ([7.0, None], None), ([0.0, 0.0, 0.0], False), ([2.0, 2.0], True), ([-2.0, -2.0], True),
  # Student's t for 2 degrees of freedom is 4.303 and the standard error here 1/sqrt(3): 2.484 is the border.
  ([1.49, 2.49, 3.49], True), ([1.48, 2.48, 3.48], False), ([-1.49, -2.49, -3.49], True),
  ([12.6, 13.6], True), ([5.8, 6.8], False),  # for 1 degree it is 12.706, and the border 6.353
])
def test_what_exceeds_the_noise(values: list[float | None], expected: bool | None) -> None:
  assert verdicts.exceeds_noise(verdicts.stat(values)) is expected


def test_a_gain_is_taken_seed_by_seed() -> None:
  gain = verdicts.gain_percent(verdicts.stat([11.0, 22.0, 5.5]), verdicts.stat([10.0, 20.0, 5.0]))
  assert gain["values"] == pytest.approx([10, 10, 10]) and gain["standard_error"] == pytest.approx(0, abs=1e-9)
  assert verdicts.gain_percent(verdicts.stat([8.0]), verdicts.stat([10.0]))["mean"] == pytest.approx(-20)


def test_results_hold_every_seed_and_the_tree() -> None:
  runs = {"own": [_run({"a": 4.0, "b": 6.0}), _run({"a": 5.0, "b": 7.0})],
          "other": [_run({"a": 8.0, "b": 12.0}), _run({"a": 10.0, "b": 8.0}, seconds={"training": 3.0})]}
  found = verdicts.results(runs, ["a", "b"])
  own, other = found["own"], found["other"]
  assert own["nodes"]["b"]["personalised"]["perplexity"]["values"] == [6.0, 7.0]
  assert own["nodes"]["b"]["received"]["bits_per_byte"]["mean"] == pytest.approx(0.3 * 7.5)
  assert own["tree"]["personalised"]["mean"]["perplexity"]["mean"] == 5.5
  assert own["tree"]["personalised"]["worst"]["perplexity"]["values"] == [6.0, 7.0]
  assert own["tokens"] == 700 and own["bytes_up"]["mean"] == 50 and not own["diverged"]
  assert other["seconds"]["total"]["values"] == [7.5, 3.0] and other["seconds"]["saving"]["values"] == [0.5, 0.0]
  assert own["ratios"]["other"]["personalised"]["values"] == [2.0, 1.5] and own["ratios"].keys() == {"other"}
  assert other["ratios"]["own"]["personalised"]["values"] == [0.5, pytest.approx(2 / 3)]
  assert own["ratios"]["other"]["received"]["values"] == [pytest.approx(11 / 6), pytest.approx(10 / 7)]
  assert own["curves"]["a"] == {"received": [6.5, 5.5], "personalised": [None, None]}
  assert own["matrix"] == {"models": [".", "a"], "corpora": ["a"], "perplexity": [[5.5], [11.0]]}


def test_an_entry_that_diverged_has_no_numbers() -> None:
  found = verdicts.results({"own": [_run({"a": 4.0})] * 2, "other": [_run({"a": 8.0}), DIVERGED]}, ["a"])
  other = found["other"]
  assert other["diverged"] and other["tokens"] is None and other["matrix"] is None
  nothing = {"mean": None, "standard_error": None}
  assert other["tree"]["personalised"]["mean"]["perplexity"] == nothing | {"values": [8.0, None]}
  assert other["seconds"]["total"] == nothing | {"values": [7.5, None]}
  assert found["own"]["ratios"]["other"]["personalised"] == nothing | {"values": [2.0, None]}
  assert other["curves"]["a"]["received"] == [(10 + 90) / 2, None]  # up to where the second seed stopped
  verdict = verdicts.verdict("a", found, "own", "other")
  assert verdict["best"] == "own" and verdict["best_baseline"] is None
  assert verdict["own_gain_percent"] == nothing | {"values": [100.0, None]}
  assert verdict["own_exceeds_noise"] is None
  assert verdict["own_against_best_baseline_percent"] == nothing | {"values": [None, None]}


def test_nothing_finished_at_all() -> None:
  found = verdicts.results({"own": [DIVERGED], "other": [DIVERGED]}, ["a"])
  verdict = verdicts.verdict("a", found, "own", "other")
  assert verdict["best"] is None and verdict["own_exceeds_noise"] is None
  assert verdicts.fairness([[DIVERGED, DIVERGED]]) == {
    "tokens": None, "initial_parameters": None, "batches": {}, "evaluation": {}
  }


def test_a_verdict_holds_own_against_alone_and_against_the_best_other() -> None:
  values = {"alone": [10.0, 11.0, 12.0], "best": [7.0, 7.0, 7.0], "own": [8.0, 9.0, 10.0]}
  found = verdicts.results({name: [_run({"a": value}) for value in of] for name, of in values.items()}, ["a"])
  verdict = verdicts.verdict("a", found, "own", "alone")
  assert (verdict["node"], verdict["best"], verdict["best_baseline"]) == ("a", "best", "best")
  assert {name: option["values"] for name, option in verdict["options"].items()} == values
  assert verdict["gain_percent"]["alone"]["values"] == [0, 0, 0]
  assert verdict["own_gain_percent"]["values"] == pytest.approx([25, 100 * 2 / 9, 20])
  assert verdict["own_gain_percent"] == verdict["gain_percent"]["own"] and verdict["own_exceeds_noise"] is True
  assert verdict["own_against_best_baseline_percent"]["values"] == pytest.approx([-12.5, -100 * 2 / 9, -30])


def test_a_verdict_without_anybody_alone() -> None:
  verdict = verdicts.verdict("a", verdicts.results({"own": [_run({"a": 4.0})]}, ["a"]), "own", None)
  assert verdict["gain_percent"] == {} and verdict["own_gain_percent"] is verdict["own_exceeds_noise"] is None
  assert verdict["best"] == "own" and verdict["own_against_best_baseline_percent"]["mean"] is None


@pytest.mark.parametrize(("change", "words"), [
  ({}, []),
  ({"tokens": 701}, ["tokens trained on (700 and 701)"]),
  ({"fairness": {"initial_parameters": "ff", "batches": {"a": "2f"}, "evaluation": {"a": "3f"}}},
   ["initial parameters"]),
  ({"fairness": {"initial_parameters": "1f", "batches": {"a": "2f", "b": "0"}, "evaluation": {"a": "3e"}}},
   ["windows trained on (b)", "text of the evaluation (a)"]),
])
def test_what_two_runs_were_not_given_alike(change: dict[str, Any], words: list[str]) -> None:
  one, other = _run({"a": 4.0}).summary, _run({"a": 5.0}, **change).summary
  assert one is not None and other is not None
  assert verdicts.unequal(one, other) == words


def test_what_all_were_given_is_one_digest_over_seeds() -> None:
  second = {"initial_parameters": "99", "batches": {"a": "98"}, "evaluation": {"a": "3f"}}
  found = verdicts.fairness([[DIVERGED, _run({"a": 4.0})], [_run({"a": 4.0}, fairness=second), DIVERGED]])
  assert found["tokens"] == 700 and found["evaluation"] == {"a": "3f"}
  assert len(found["initial_parameters"]) == 2 and found["initial_parameters"] not in ("1f", "99")
  again = verdicts.fairness([[_run({"a": 4.0})], [_run({"a": 4.0}, fairness=second)]])
  assert again == found
