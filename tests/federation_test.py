"""Resolved trees: levels, groups, what is inherited, and what is refused."""

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from worldlm_jax import config as c, federation as f, schedule

TEXT = c.Files("unread")
Overrides = dict[str, dict[str, Any]]


def _resolve(
  root: c.Node | None = None, overrides: Overrides | None = None, inner_text: str = "before", **where: str
) -> f.Federation:
  federation = c.FederationConfig(root=root, overrides=overrides or {}, **where)
  return f.resolve(c.Config(federation=federation, inner_text=inner_text))


def _setting(federation: f.Federation, name: str) -> dict[str, Any]:
  return {member.path: getattr(member.settings, name) for member in federation.members}


def _ragged() -> c.Node:
  """Children at every depth, in the order in which they are given, with an only child and one without any."""
  eu = c.Node("eu", None, [c.Node("paris", TEXT), c.Node("berlin", TEXT), c.Node("rome", TEXT)])
  return c.Node("world", None, [
    c.Node("law", TEXT, [eu, c.Node("us", TEXT)]), c.Node("misc", TEXT), c.Node("med", None, [c.Node("eu", TEXT)]),
  ])


def test_levels_hold_siblings_side_by_side() -> None:
  tree = _resolve(_ragged())
  assert [[m.path for m in level] for level in tree.levels] == [
    ["."], ["law", "misc", "med"], ["law/eu", "law/us", "med/eu"], ["law/eu/paris", "law/eu/berlin", "law/eu/rome"],
  ]
  assert [m.name for m in tree.levels[0] + tree.levels[3]] == ["world", "paris", "berlin", "rome"]
  assert [m.data for m in tree.levels[1]] == [TEXT, TEXT, None]


def test_parents_and_sibling_groups_of_a_ragged_tree() -> None:
  tree = _resolve(_ragged())
  assert [parents.tolist() for parents in tree.parents] == [[-1], [0, 0, 0], [0, 0, 2], [0, 0, 0]]
  assert all(parents.dtype == np.int32 for parents in tree.parents)
  for level, expected in enumerate([
    ([[0, 1, 2]], [[1, 1, 1]]),
    ([[0, 1], [0, 0], [2, 0]], [[1, 1], [0, 0], [1, 0]]),
    ([[0, 1, 2], [0, 0, 0], [0, 0, 0]], [[1, 1, 1], [0, 0, 0], [0, 0, 0]]),
  ]):
    index, mask = tree.children(level)
    assert (index.tolist(), mask.astype(int).tolist()) == expected
  assert [tree.is_federation(level).tolist() for level in range(4)] == [
    [True], [True, False, True], [True, False, False], [False, False, False],
  ]


def test_subtrees_are_depth_first() -> None:
  tree = _resolve(_ragged())
  law = ["law", "law/eu", "law/eu/paris", "law/eu/berlin", "law/eu/rome", "law/us"]
  assert [m.path for m in tree.subtree("law")] == law
  assert [m.path for m in tree.subtree(".")] == [".", *law, "misc", "med", "med/eu"]
  assert [m.path for m in tree.subtree("misc")] == ["misc"]


def test_a_federation_s_text_is_one_child_more() -> None:
  tree = _resolve(_ragged(), {"law": {"local_steps": "7"}}, inner_text="beside")
  assert [[m.path for m in level] for level in tree.levels] == [
    ["."], ["law/", "misc", "med"], ["law", "law/eu", "law/us", "med/eu"],
    ["law/eu/paris", "law/eu/berlin", "law/eu/rome"],
  ]
  head, text = tree.by_path["law/"], tree.by_path["law"]
  assert (head.data, text.data) == (None, TEXT) and not head.trains and text.trains
  assert (head.name, head.parent, text.name, text.parent) == ("law", ".", "law", "law/")
  assert {m.parent for m in tree.levels[2][:3]} == {"law/"} and tree.by_path["law/eu/paris"].parent == "law/eu"
  assert head.settings == text.settings and tree.by_path["law/us"].settings.local_steps == 7
  assert [m.path for m in tree.subtree("law/")] == ["law/", "law", "law/eu", *(
    f"law/eu/{city}" for city in ("paris", "berlin", "rome")), "law/us"]


def test_the_root_s_text_is_one_child_more() -> None:
  tree = _resolve(c.Node("world", TEXT, [c.Node("law", TEXT)]), inner_text="beside")
  assert [[m.path for m in level] for level in tree.levels] == [["./"], [".", "law"]]
  assert {m.parent for m in tree.levels[1]} == {"./"} and tree.root.name == "world"


@pytest.mark.parametrize("inner_text", ["beside", "before"])
def test_where_a_federation_s_text_trains_changes_no_number_of_steps_but_for_its_own_clock(inner_text: str) -> None:
  far = c.Node("far", TEXT, [c.Node("off", TEXT)], {"rounds_per_parent_round": 2, "local_steps": 5})
  tree = _resolve(c.Node("world", TEXT, [far]), inner_text=inner_text)
  steps = {path: n for path, n in schedule.steps_per_round(tree, None).items() if n}
  assert steps == {".": 20, "far": 10 if inner_text == "beside" else 5, "far/off": 10}
  flat = schedule.steps_per_round(f.flattened(tree), None)
  assert {path: n for path, n in flat.items() if n} == steps


def test_a_root_alone_is_a_tree() -> None:
  tree = _resolve(c.Node("alone", TEXT))
  assert [len(level) for level in tree.levels] == [1]
  assert tree.is_federation(0).tolist() == [False]


@pytest.mark.parametrize(("path", "ancestor", "within"), [
  ("law", ".", True), (".", ".", True), ("law/eu", "law", True), ("law", "law", True), ("lawyers", "law", False),
  (".", "law", False), ("law", "law/eu", False), ("a/law", "law", False),
])
def test_is_within(path: str, ancestor: str, within: bool) -> None:
  law = c.Node("law", None, [c.Node("eu", TEXT)])
  tree = _resolve(c.Node("world", None, [law, c.Node("lawyers", TEXT), c.Node("a", None, [c.Node("law", TEXT)])]))
  assert tree.is_within(path, ancestor) == within


def _numbered(**settings) -> f.Federation:
  """A tree with text at an inner node and at the root: (path, local_steps, batch_size)."""
  far = c.Node("far", TEXT, [c.Node("off", TEXT, settings={"local_steps": 3})], {"rounds_per_parent_round": 2})
  return _resolve(c.Node("world", TEXT, [far, c.Node("near", TEXT, settings={"batch_size": 5})]))


def test_a_flattened_tree_has_every_text_and_as_many_steps() -> None:
  tree = _numbered()
  flat = f.flattened(tree)
  assert [m.path for m in flat.levels[1]] == [".", "far", "near", "far/off"] and len(flat.levels) == 2
  assert [m.name for m in flat.levels[1]] == ["world", "far", "near", "far/off"]  # names of people, not "."
  assert flat.root.path == ".." and not flat.root.trains and {m.parent for m in flat.levels[1]} == {".."}
  steps = schedule.steps_per_round(tree, None)
  assert schedule.steps_per_round(flat, None) == steps | {"..": 0} and steps["far/off"] == 6
  assert not flat.is_within("far/off", "far") and flat.is_within("far/off", "..")


def test_a_pool_takes_as_many_windows_as_its_members() -> None:
  flat = f.pooled(_numbered())
  windows = sum(m.settings.local_steps * m.settings.batch_size for m in flat.levels[1])
  root = flat.root.settings
  assert flat.root.trains and root.batch_size == 8
  assert (root.local_steps - 1) * root.batch_size < windows <= root.local_steps * root.batch_size
  kinds = [(step.kind, step.level) for step in schedule.round_steps(flat, None)]
  assert kinds == [("down", 0), ("down", 1), ("train", 0)]  # the nodes are scored before the pool goes on
  last = [(step.kind, step.level) for step in schedule.round_steps(flat, None, personalise=True)]
  assert last == [("down", 0), ("down", 1), ("train", 1), ("train", 0)]
  assert schedule.first_positions(flat, 4) == {".": 60, "far": 60, "near": 60, "far/off": 18}
  assert schedule.stages(flat, "sequential") == [None]


@st.composite
def _trees(draw: st.DrawFn, name: str = "world", depth: int = 0) -> c.Node:
  names = draw(st.lists(st.sampled_from("abcde"), unique=True, max_size=4 if depth < 3 else 0))
  children = [draw(_trees(child, depth + 1)) for child in names]
  return c.Node(name, TEXT if not children or draw(st.booleans()) else None, children)


def _count(node: c.Node) -> int:
  return 1 + sum(map(_count, node.children))


@settings(deadline=None, max_examples=60)
@given(_trees(), st.sampled_from(["beside", "before"]))
def test_parents_and_children_are_inverse_and_levels_hold_every_node_once(root: c.Node, inner_text: str) -> None:
  tree = _resolve(root, inner_text=inner_text)
  paths = [m.path for m in tree.members]
  heads = [path for path in paths if path.endswith("/")]
  assert len(paths) == len(set(paths)) == _count(root) + len(heads) and (inner_text == "beside" or not heads)
  assert all(len(tree.ancestors[m.path]) == d + 1 for d, level in enumerate(tree.levels) for m in level)
  for d, level in enumerate(tree.levels[:-1]):
    index, mask = tree.children(d)
    below = tree.levels[d + 1]
    assert sorted(index[mask]) == list(range(len(below)))
    for i, member in enumerate(level):
      assert [below[j].path for j in index[i][mask[i]]] == [m.path for m in below if m.parent == member.path]
      assert (tree.parents[d + 1][index[i][mask[i]]] == i).all()
      assert not index[i][~mask[i]].any()
  assert sorted(m.path for m in tree.subtree(tree.root.path)) == sorted(paths)


def test_settings_are_inherited_until_overridden() -> None:
  root = c.Node("world", None, [
    c.Node("law", TEXT, [c.Node("eu", TEXT, settings={"local_steps": 7}), c.Node("us", TEXT)], {"local_steps": 5}),
    c.Node("med", TEXT),
  ], {"batch_size": 3})
  config = c.Config(federation=c.FederationConfig(root=root), node=c.NodeSettings(local_steps=2, batch_size=11),
                    inner_text="before")
  tree = f.resolve(config)
  assert _setting(tree, "local_steps") == {".": 2, "law": 5, "med": 2, "law/eu": 7, "law/us": 5}
  assert set(_setting(tree, "batch_size").values()) == {3}
  assert config.node == c.NodeSettings(local_steps=2, batch_size=11)  # untouched, and shared by nobody
  assert len({id(m.settings) for m in tree.members} | {id(config.node)}) == 6


def test_overrides_beat_the_tree_and_are_inherited_like_it() -> None:
  root = c.Node("world", TEXT, [c.Node("law", TEXT, [c.Node("eu", TEXT)], {"local_steps": 5}), c.Node("med", TEXT)])
  overrides = {".": {"local_steps": "3", "clip_norm": "inf"}, "law": {"local_steps": "7", "learning_rate": "1e-4"},
               "law/eu": {"acceptance": "validated"}}
  tree = _resolve(root, overrides)
  assert _setting(tree, "local_steps") == {".": 3, "law": 7, "med": 3, "law/eu": 7}
  assert _setting(tree, "learning_rate") == {".": 3e-3, "law": 1e-4, "med": 3e-3, "law/eu": 1e-4}
  assert _setting(tree, "acceptance")["law/eu"] == "validated" and _setting(tree, "acceptance")["law"] == "always"
  assert set(_setting(tree, "clip_norm").values()) == {math.inf}
  assert overrides[f.ROOT] == {"local_steps": "3", "clip_norm": "inf"}


@pytest.mark.parametrize(("value", "kind"), [
  ("7", int), (7.0, int), ("0.25", float), (3, float), ("1e-3", float), ("inf", float)
])
def test_values_take_the_type_of_their_field(value: Any, kind: type) -> None:
  name = "local_steps" if kind is int else "up_temperature"
  found = getattr(_resolve(c.Node("world", TEXT, settings={name: value})).members[0].settings, name)
  assert type(found) is kind and found == kind(value)


@pytest.mark.parametrize(("name", "value", "expected"), [
  *(("local_steps", value, "a whole number") for value in ("2.5", 2.5, True, "inf", math.inf, None)),
  ("learning_rate", "fast", "a number"), ("learning_rate", "nan", "a number"), ("learning_rate", [1.0], "a number"),
  ("acceptance", 3, "a word"),
])
def test_values_of_the_wrong_type_are_refused(name: str, value: Any, expected: str) -> None:
  with pytest.raises(ValueError, match=f"^node 'law': {name}={re.escape(repr(value))}: expected {expected}$"):
    _resolve(c.Node("world", None, [c.Node("law", TEXT, settings={name: value})]))


@pytest.mark.parametrize(("overrides", "message"), [
  ({"law/eu": {"local_step": "3"}}, "node 'law/eu': setting='local_step': expected one of 'local_steps', .*; "
                                    "did you mean 'local_steps'"),
  ({"law/eur": {"local_steps": "3"}}, "node='law/eur': expected the path of a node of the tree; did you mean 'law/eu'"),
  ({"xyz": {"local_steps": "3"}}, r"node='xyz': expected the path of a node of the tree; the root is '\.'"),
  ({"law/eu": {"local_steps": "-3"}}, "node 'law/eu': local_steps=-3: expected at least 0"),
  ({"law": {"acceptance": "valid"}}, "node 'law': acceptance='valid': .* did you mean 'validated'"),
])
def test_overrides_that_fit_nothing_are_refused(overrides: Overrides, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    _resolve(_ragged(), overrides)


@pytest.mark.parametrize(("text", "parsed"), [
  ("law/eu.local_steps=20", ("law/eu", "local_steps", "20")), ("..local_steps=5", (".", "local_steps", "5")),
  ("v1.2.clip_norm=inf", ("v1.2", "clip_norm", "inf")), ("a.b=c=d", ("a", "b", "c=d")), ("a.b=", ("a", "b", "")),
])
def test_parse_override(text: str, parsed: tuple[str, str, str]) -> None:
  assert f.parse_override(text) == parsed


@pytest.mark.parametrize("text", ["", "law", "law.local_steps", "local_steps=3", ".local_steps=3", "law.=3", "law=a.b"])
def test_overrides_of_another_form_are_refused(text: str) -> None:
  with pytest.raises(ValueError, match=re.escape(f"--node={text!r}: expected PATH.FIELD=VALUE, such as law/eu.local_")):
    f.parse_override(text)


def test_a_node_without_children_needs_data() -> None:
  with pytest.raises(ValueError, match="node 'law/eu': data=None: expected a source of text at every node without "
                                       "children; give it data or remove the node"):
    _resolve(c.Node("world", None, [c.Node("law", TEXT, [c.Node("eu")])]))


@pytest.mark.parametrize(("name", "expected"), [
  *((name, "a name without '/', not empty, '.' or '..'; ") for name in ("a/b", "", ".", "..")),
  ("eu", "a name that no sibling has; rename one of the two"),
])
def test_names_that_make_no_path_are_refused(name: str, expected: str) -> None:
  law = c.Node("law", None, [c.Node("eu", TEXT), c.Node(name, TEXT)])
  with pytest.raises(ValueError, match=f"child 1 of node 'law': name={name!r}: expected {expected}"):
    _resolve(c.Node("world", None, [law]))


def test_cousins_may_share_a_name() -> None:
  assert len(_resolve(_ragged()).members) == 10  # law/eu and med/eu
