"""Who takes part in which round: drawn from names and round numbers alone, and late when the clock says so."""

import math
from typing import Any

import numpy as np
import pytest

from worldlm_jax import attendance, config as c, federation as f, schedule


def tree(*members: c.Node, **settings: Any) -> f.Federation:
  root = c.Node("world", None, list(members))
  return f.resolve(c.Config(federation=c.FederationConfig(root=root), node=c.NodeSettings(**settings)))


def leaves(*names: str, **settings: Any) -> list[c.Node]:
  return [c.Node(name, c.Files("unread"), [], dict(settings)) for name in names]


def turnouts(federation: f.Federation, rounds: int, seed: int = 0, path: str = ".") -> list[attendance.Turnout]:
  attends = attendance.Attendance(seed, federation)
  return [attends.next(path, index) for index in range(rounds)]


def test_without_failures_everybody_is_there_and_counts_fully() -> None:
  federation = tree(*leaves("a", "b", "c"))
  assert turnouts(federation, 3) == [attendance.Everybody(federation).next(".", 0)] * 3
  assert turnouts(federation, 1)[0].arrived == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_draws_depend_on_names_alone() -> None:
  settings = {"loss_before": 0.4, "loss_after": 0.2}
  few, many = tree(*leaves("a", "b", **settings)), tree(*leaves("x", "b", "a", **settings))
  for one, other in zip(turnouts(few, 30), turnouts(many, 30), strict=True):
    assert {p: w for p, w in other.happened.items() if p != "x"} == dict(one.happened)
  assert turnouts(few, 30, seed=1) != turnouts(few, 30)


def test_as_many_are_lost_as_the_probabilities_say() -> None:
  found = turnouts(tree(*leaves(*map(str, range(50)), loss_before=0.3, loss_after=0.5)), 40)
  happened = [what for turnout in found for what in turnout.happened.values()]
  assert happened.count(attendance.LOST_BEFORE) / 2000 == pytest.approx(0.3, abs=0.04)
  assert happened.count(attendance.LOST_AFTER) / 2000 == pytest.approx(0.7 * 0.5, abs=0.04)
  assert all(set(turnout.arrived) < turnout.there for turnout in found)  # some trained in vain


@pytest.mark.parametrize(("settings", "number"), [
  ({"member_share": 0.5}, 3), ({"member_share": 0.01}, 1), ({"member_count": 2}, 2), ({"member_count": 9}, 5),
  ({"member_share": 0.8, "member_count": 3}, 3),
])
def test_a_federation_asks_some_of_its_members_anew_in_each_round(settings: dict[str, Any], number: int) -> None:
  found = turnouts(tree(*leaves(*"abcde"), **settings), 40)
  assert {len(turnout.there) for turnout in found} == {number}
  assert all(turnout.there == set(turnout.arrived) for turnout in found)
  assert frozenset().union(*(turnout.there for turnout in found)) == set("abcde")


def test_a_late_update_comes_in_with_less_weight_and_its_node_works_on_meanwhile() -> None:
  slow = c.Node("slow", c.Files("unread"), [], {"local_steps": 25})  # 25 s are two deadlines and a half
  federation = tree(*leaves("a", "b"), slow, local_steps=10, step_seconds=1.0, deadline_seconds=10.0, late_weight=0.5)
  found = turnouts(federation, 6)
  assert ["slow" in turnout.there for turnout in found] == [True, False, False, True, False, False]
  assert [turnout.arrived.get("slow") for turnout in found] == [None, None, 0.25, None, None, 0.25]
  assert [turnout.happened["slow"] for turnout in found] == ["late", "late", "merged_late"] * 2
  assert found[2].rounds_late == {"slow": 2}
  assert all(turnout.arrived["a"] == 1 for turnout in found)


def test_a_late_update_that_is_not_taken_is_forgotten_and_its_node_starts_afresh() -> None:
  federation = tree(*leaves("a"), *leaves("slow", step_seconds=9.0), deadline_seconds=10.0, late_weight=0.0)
  for turnout in turnouts(federation, 3):
    assert turnout.there == {"a", "slow"} and turnout.arrived == {"a": 1.0} and turnout.happened == {"slow": "late"}


def test_times_vary_where_they_are_told_to() -> None:
  federation = tree(*leaves("a", local_steps=10, step_seconds=0.9, step_seconds_spread=0.5), deadline_seconds=10.0)
  late = [bool(turnout.rounds_late) for turnout in turnouts(federation, 60)]
  assert any(late) and not all(late)


def test_a_federation_takes_as_long_as_its_rounds_but_waits_for_nobody_beyond_the_deadline() -> None:
  quick, slow = leaves("quick", step_seconds=1.0), leaves("slow", step_seconds=100.0)
  inner = c.Node("inner", None, [*quick, *slow], {"rounds_per_parent_round": 3, "deadline_seconds": 20.0})
  for deadline, rounds_late in ((60.0, 0), (59.0, 1)):
    federation = tree(inner, local_steps=10, deadline_seconds=deadline)
    assert turnouts(federation, 1)[0].rounds_late == ({"inner": rounds_late} if rounds_late else {})


def test_without_quorum_nothing_has_come_in() -> None:
  federation = tree(*leaves(*"abcd", loss_after=0.5), quorum=0.75)
  found = turnouts(federation, 40)
  assert {len(turnout.arrived) for turnout in found} == {0, 3, 4}
  void = next(turnout for turnout in found if not turnout.arrived)
  assert attendance.VOID in void.happened.values() or set(void.happened.values()) == {attendance.LOST_AFTER}


def test_members_join_leave_and_lose_their_data() -> None:
  federation = tree(*leaves("a"), *leaves("late", joins_round=2), *leaves("gone", leaves_round=1),
                    *leaves("poor", loses_data_round=2), rounds_per_parent_round=1)
  attends = attendance.Attendance(0, federation)
  trained = [
    {m.path for step in schedule.round_steps(federation, None, attends, index) if step.kind == "train"
     for m, active in zip(federation.levels[1], step.active, strict=True) if active} for index in range(3)
  ]
  assert trained == [{"a", "gone", "poor"}, {"a", "poor"}, {"a", "late"}]
  down = [step for step in schedule.round_steps(federation, None, attends, 3) if step.kind == "down"][1]
  assert dict(zip([m.path for m in federation.levels[1]], down.active, strict=True)) == {
    "a": True, "late": True, "gone": False, "poor": True
  }
  config = c.Config(rounds=4)
  planned = [*schedule.planned_steps(config, federation)]
  trainings = {path: sum(steps[path] for steps in planned) // 20 for path in federation.by_path}
  assert trainings == {".": 0, "a": 4, "late": 2, "gone": 1, "poor": 2}
  (epochs,) = schedule.epochs(config, federation, dict.fromkeys(["a", "late", "gone", "poor"], 1000))[1:]
  np.testing.assert_allclose(epochs / epochs[0], [1, 0.5, 0.25, 0.5])


def test_all_below_a_lost_federation_stays_away_and_is_not_heard_of() -> None:
  inner = c.Node("inner", None, leaves("x", "y"))
  federation = tree(inner, *leaves("a"))
  attends = attendance.Attendance(0, federation)
  schedule.round_steps(federation, None, attends, 0)
  attends.absent = ["inner"]
  steps = schedule.round_steps(federation, None, attends, 1)
  assert [(step.kind, step.level) for step in steps] == [("down", 0), ("down", 1), ("train", 1), ("up", 0)]
  np.testing.assert_array_equal(steps[1].heard[1], [True, True])  # both came in in the round before
  attends.absent = []
  heard = schedule.round_steps(federation, None, attends, 2)[1].heard
  np.testing.assert_array_equal(heard[1], [False, True])
  np.testing.assert_array_equal(heard[2], [False, False])


def test_the_whole_run_is_the_same_every_time() -> None:
  config = c.Config(rounds=5, federation=c.FederationConfig(root=c.Node("world", None, leaves(*"abcd"))))
  config.node.loss_before, config.node.loss_after, config.node.member_share = 0.3, 0.2, 0.7
  one, other = (schedule.whole_run(config, f.resolve(config)) for _ in range(2))
  assert [[step.turnouts for step in steps] for steps in one] == [[step.turnouts for step in steps] for steps in other]
  assert schedule.last_trainings(f.resolve(config), one).keys() <= set("abcd")


@pytest.mark.parametrize(("settings", "message"), [
  ({"loss_before": 1.5}, r"loss_before=1.5: expected a number from 0 to 1"),
  ({"member_share": 0.0}, r"member_share=0.0: expected a share of the members, above 0.*member_count"),
  ({"deadline_seconds": 0.0}, r"deadline_seconds=0.0: expected a positive number of seconds; inf waits"),
  ({"joins_round": 3, "leaves_round": 3}, r"leaves_round=3: expected a round after joins_round=3"),
  ({"step_seconds": math.inf}, r"step_seconds=inf: expected a number"),
])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    tree(*leaves("a"), **settings)
