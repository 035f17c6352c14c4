"""The order of a round, and the laws of who trains how often."""

import re
from collections import Counter
from collections.abc import Collection

import numpy as np
from hypothesis import given, settings, strategies as st

from worldlm_jax import attendance, config as c, federation as f, schedule


def _node(name: str, *children: c.Node, data: bool = True, **own: int) -> c.Node:
  return c.Node(name, c.Files("unread") if data else None, list(children), own)


def _resolve(root: c.Node) -> f.Federation:
  federation = c.FederationConfig(root=root)
  return f.resolve(c.Config(federation=federation, node=c.NodeSettings(local_steps=3), inner_text="before"))


def _ragged(**root: int | bool) -> f.Federation:
  """Three levels: `law` runs twice and `med`, without data, three times per round of the root; `misc` is a leaf."""
  law = _node("law", _node("eu"), _node("us", local_steps=0), rounds_per_parent_round=2)
  med = _node("med", _node("trials", local_steps=5), data=False, rounds_per_parent_round=3)
  return _resolve(_node("world", law, med, _node("misc", rounds_per_parent_round=7), **root))


def _steps(federation: f.Federation, stage: int | None = None, absent: Collection[str] = ()) -> list[str]:
  """The steps of a round as text: phase, the nodes that take part, and an apostrophe in later repeats."""
  return [
    f"{step.kind}{'' if step.first_repeat else chr(39)} "
    + " ".join(m.name for m, active in zip(federation.levels[step.level], step.active, strict=True) if active)
    for step in schedule.round_steps(federation, stage, attendance.Everybody(federation, absent))
  ]


def _trainings(federation: f.Federation, stage: int | None = None, absent: Collection[str] = ()) -> Counter[str]:
  return Counter(
    federation.levels[step.level][i].path
    for step in schedule.round_steps(federation, stage, attendance.Everybody(federation, absent))
    if step.kind == "train"
    for i in np.flatnonzero(step.active)
  )


def test_a_round_goes_down_trains_runs_the_children_and_comes_up() -> None:
  assert _steps(_ragged(data=False)) == [
    "down world", "down law med misc", "train law misc",
    "down eu us trials", "train eu trials", "up law med",
    "down' eu us trials", "train' eu trials", "up law med",
    "down' trials", "train' trials", "up med",
    "up world",
  ]


def test_a_root_with_data_trains_before_it_hands_down_and_runs_once() -> None:
  steps = _steps(_ragged(rounds_per_parent_round=5))
  assert steps[:3] == ["down world", "train world", "down law med misc"]
  assert steps.count("up world") == 1 and steps[-1] == "up world"


def test_an_inner_level_repeats_as_a_whole() -> None:
  leaf = _node("leaf")
  inner = _node("inner", leaf, data=False, rounds_per_parent_round=2)
  tree = _resolve(_node("world", _node("outer", inner, data=False, rounds_per_parent_round=2), data=False))
  inner_round = ["down leaf", "train leaf", "up inner", "down' leaf", "train' leaf", "up inner"]
  later = ["down leaf", "train leaf", "up' inner", "down' leaf", "train' leaf", "up' inner"]
  assert _steps(tree) == ["down world", "down outer", "down inner", *inner_round, "up outer",
                          "down' inner", *later, "up outer", "up world"]


def test_sequential_stages_train_one_level_each() -> None:
  tree = _ragged()
  assert schedule.stages(tree, "parallel") == [None]
  assert schedule.stages(tree, "sequential") == [0, 1, 2]
  assert _steps(tree, 0) == ["down world", "train world"]
  assert _steps(tree, 1) == ["down world", "down law med misc", "train law misc", "up world"]
  assert _steps(tree, 2) == [
    "down world", "down law med misc",
    "down eu us trials", "train eu trials", "up law med",
    "down' eu us trials", "train' eu trials", "up law med",
    "down' trials", "train' trials", "up med",
    "up world",
  ]


def test_levels_in_which_nobody_trains_are_no_stage() -> None:
  assert schedule.stages(_ragged(data=False), "sequential") == [1, 2]
  assert schedule.stages(_ragged(local_steps=0), "sequential") == [2]  # all inherit it, but for `trials`


def test_absent_nodes_take_everybody_below_along() -> None:
  assert _steps(_ragged(data=False), absent={"med", "law/eu"}) == [
    "down world", "down law misc", "train law misc", "down us", "up law", "down' us", "up law", "up world",
  ]


def test_steps_per_round_count_optimizer_steps() -> None:
  tree = _ragged()
  expected = {".": 3, "law": 3, "med": 0, "misc": 3, "law/eu": 6, "law/us": 0, "med/trials": 15}
  assert schedule.steps_per_round(tree, None) == expected
  assert schedule.steps_per_round(tree, 1) == {path: expected[path] * (path in ("law", "misc")) for path in expected}


_OWN = {"rounds_per_parent_round": st.integers(1, 3), "local_steps": st.integers(0, 2)}


@st.composite
def _trees(draw: st.DrawFn, depth: int = 0) -> c.Node:
  count = draw(st.integers(0, 3 if depth < 3 else 0))
  children = [draw(_trees(depth + 1)) for _ in range(count)]
  node = _node(f"n{draw(st.integers(0, 10**9))}", data=not children or draw(st.booleans()),
               **{name: draw(values) for name, values in _OWN.items()})
  node.children = [c.Node(f"{i}{child.name}", child.data, child.children, child.settings)
                   for i, child in enumerate(children)]
  return node


def _times(federation: f.Federation, member: f.Member) -> int:
  """The product of `rounds_per_parent_round` over all strictly between the node and the root."""
  if member.parent in (None, f.ROOT):
    return 1
  parent = next(m for m in federation.members if m.path == member.parent)
  return parent.settings.rounds_per_parent_round * _times(federation, parent)


@settings(deadline=None, max_examples=60)
@given(_trees())
def test_a_node_trains_as_often_as_its_ancestors_multiply(root: c.Node) -> None:
  tree = _resolve(root)
  able = {m.path: m.data is not None and m.settings.local_steps > 0 for m in tree.members}
  expected = {m.path: _times(tree, m) for m in tree.members if able[m.path]}
  assert _trainings(tree) == expected
  by_stage = [_trainings(tree, stage) for stage in schedule.stages(tree, "sequential")]
  assert sum(by_stage, Counter()) == expected  # the stages part the nodes by level
  assert schedule.steps_per_round(tree, None) == {
    m.path: expected.get(m.path, 0) * m.settings.local_steps for m in tree.members
  }


@settings(deadline=None, max_examples=60)
@given(_trees(), st.data())
def test_absent_nodes_change_nothing_for_the_others(root: c.Node, data: st.DataObject) -> None:
  tree = _resolve(root)
  paths = [m.path for m in tree.members[1:]]
  absent = data.draw(st.sets(st.sampled_from(paths)) if paths else st.just(set()))
  gone = {m.path for m in tree.members if any(tree.is_within(m.path, path) for path in absent)}
  everybody = _trainings(tree)
  assert _trainings(tree, None, absent) == {path: n for path, n in everybody.items() if path not in gone}
  for step in schedule.round_steps(tree, None, attendance.Everybody(tree, absent)):
    assert not gone & {m.path for m, active in zip(tree.levels[step.level], step.active, strict=True) if active}


@settings(deadline=None, max_examples=60)
@given(_trees())
def test_every_node_and_its_parent_take_turns(root: c.Node) -> None:
  tree = _resolve(root)
  events = [
    (tree.levels[step.level][i].path, step.kind[0])
    for step in schedule.round_steps(tree, None) for i in np.flatnonzero(step.active)
  ]
  for member in tree.members:
    own = "".join(kind for path, kind in events if path == member.path)
    if member.parent is None:
      assert re.fullmatch("dt?u?", own)
      continue
    both = "".join(
      kind if path == member.path else kind.upper() for path, kind in events if path in (member.path, member.parent)
    )
    assert re.fullmatch("(DT?(dt?u*U)+)+", both)  # capitals: the parent
