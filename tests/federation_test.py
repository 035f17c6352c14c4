"""Trees from nodes, YAML and folders: how they are read, what is inherited, and what is refused."""

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from worldlm_jax import config as c, federation as f

TEXT = c.Files("unread")
Overrides = dict[str, dict[str, Any]]


def _resolve(root: c.Node | None = None, overrides: Overrides | None = None, **where: str) -> f.Federation:
  return f.resolve(c.Config(federation=c.FederationConfig(root=root, overrides=overrides or {}, **where)))


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


def test_a_root_alone_is_a_tree() -> None:
  tree = _resolve(c.Node("alone", TEXT))
  assert [len(level) for level in tree.levels] == [1]
  assert tree.is_federation(0).tolist() == [False]


@pytest.mark.parametrize(("path", "ancestor", "within"), [
  ("law", ".", True), (".", ".", True), ("law/eu", "law", True), ("law", "law", True), ("lawyers", "law", False),
  (".", "law", False), ("law", "law/eu", False), ("a/law", "law", False),
])
def test_is_within(path: str, ancestor: str, within: bool) -> None:
  assert f.is_within(path, ancestor) == within


@st.composite
def _trees(draw: st.DrawFn, name: str = "world", depth: int = 0) -> c.Node:
  names = draw(st.lists(st.sampled_from("abcde"), unique=True, max_size=4 if depth < 3 else 0))
  children = [draw(_trees(child, depth + 1)) for child in names]
  return c.Node(name, TEXT if not children or draw(st.booleans()) else None, children)


def _count(node: c.Node) -> int:
  return 1 + sum(map(_count, node.children))


@settings(deadline=None, max_examples=60)
@given(_trees())
def test_parents_and_children_are_inverse_and_levels_hold_every_node_once(root: c.Node) -> None:
  tree = _resolve(root)
  paths = [m.path for m in tree.members]
  assert len(paths) == len(set(paths)) == _count(root)
  assert all(f.depth(m.path) == d for d, level in enumerate(tree.levels) for m in level)
  for d, level in enumerate(tree.levels[:-1]):
    index, mask = tree.children(d)
    below = tree.levels[d + 1]
    assert sorted(index[mask]) == list(range(len(below)))
    for i, member in enumerate(level):
      assert [below[j].path for j in index[i][mask[i]]] == [m.path for m in below if m.parent == member.path]
      assert (tree.parents[d + 1][index[i][mask[i]]] == i).all()
      assert not index[i][~mask[i]].any()
  assert sorted(m.path for m in tree.subtree(f.ROOT)) == sorted(paths)


def test_settings_are_inherited_until_overridden() -> None:
  root = c.Node("world", None, [
    c.Node("law", TEXT, [c.Node("eu", TEXT, settings={"local_steps": 7}), c.Node("us", TEXT)], {"local_steps": 5}),
    c.Node("med", TEXT),
  ], {"batch_size": 3})
  config = c.Config(federation=c.FederationConfig(root=root), node=c.NodeSettings(local_steps=2, batch_size=11))
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


@pytest.mark.parametrize(("root", "where", "given"), [
  (None, {}, []), (c.Node("world", TEXT), {"folder": "x"}, ["root", "folder"]),
  (None, {"yaml": "x", "folder": "y"}, ["yaml", "folder"]),
])
def test_the_tree_comes_from_exactly_one_place(root: c.Node | None, where: dict[str, str], given: list[str]) -> None:
  with pytest.raises(ValueError, match=re.escape(f"config.federation={given}: expected exactly one of root, yaml and "
                                                 "folder; pass for instance --config.federation.folder=PATH")):
    _resolve(root, **where)


def _folders(root: Path, *files: str) -> f.Federation:
  for name in files:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("text")
  return _resolve(folder=str(root))


def test_folders_become_nodes_and_text_becomes_data(tmp_path: Path) -> None:
  root = tmp_path / "world"
  tree = _folders(root, "train.txt", "law/eu/a.txt", "law/eu/notes.md", "law/b.txt", "med/trials/c.txt", "readme.md",
                  ".git/x.txt", "__pycache__/y.txt", "law/.hidden/z.txt")
  assert [m.path for m in tree.members] == [".", "law", "med", "law/eu", "med/trials"]
  assert tree.members[0].name == "world"
  data = {m.path: m.data for m in tree.members}
  assert data == {".": c.Files(str(root)), "law": c.Files(str(root / "law")), "med": None,
                  "law/eu": c.Files(str(root / "law/eu")), "med/trials": c.Files(str(root / "med/trials"))}


def test_the_root_folder_has_a_name_however_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  (tmp_path / "world").mkdir()
  monkeypatch.chdir(tmp_path / "world")
  tree = _folders(Path("."), "a/x.txt")
  assert [(m.name, m.path) for m in tree.members] == [("world", "."), ("a", "a")]


def test_linked_folders_are_named_by_the_link(tmp_path: Path) -> None:
  _folders(tmp_path / "store", "x/texts/a.txt", "y/texts/b.txt")
  (tmp_path / "world").mkdir()
  for link, target in (("law", "x/texts"), ("med", "y/texts")):
    (tmp_path / "world" / link).symlink_to(tmp_path / "store" / target)
  assert [m.path for m in _resolve(folder=str(tmp_path / "world")).members] == [".", "law", "med"]


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
  (tmp_path / "law" / "eu").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"federation\.folder='.*law/eu': expected a folder that holds \.txt files or "
                                       r"folders of them; add train\.txt, valid\.txt and test\.txt .*, or remove"):
    _folders(tmp_path, "med/a.txt")


@pytest.mark.parametrize("name", ["missing", "file.txt"])
def test_a_folder_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
  (tmp_path / "file.txt").write_text("text")
  with pytest.raises(ValueError, match=rf"config\.federation\.folder='.*{name}': expected an existing folder"):
    _resolve(folder=str(tmp_path / name))


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
  locked = tmp_path / "locked"
  locked.mkdir()
  locked.chmod(0)
  try:
    if os.access(locked, os.R_OK):
      pytest.skip("permissions do not bind this user")
    with pytest.raises(ValueError, match=r"locked cannot be read \(Permission denied\); make it readable"):
      _folders(tmp_path, "med/a.txt")
  finally:
    locked.chmod(0o700)


def test_an_error_of_reading_a_folder_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  (tmp_path / "law").mkdir()
  scandir = os.scandir

  def failing(path: Path) -> Any:
    if path.name == "law":
      raise PermissionError(13, "Permission denied")
    return scandir(path)

  monkeypatch.setattr(os, "scandir", failing)
  with pytest.raises(ValueError, match=r"federation\.folder: .*law cannot be read \(Permission denied\); make it"):
    _resolve(folder=str(tmp_path))


def _yaml(path: Path, text: str) -> f.Federation:
  (path / "tree.yaml").write_text(text, encoding="utf-8")
  return _resolve(yaml=str(path / "tree.yaml"))


def test_yaml_with_everything(tmp_path: Path) -> None:
  tree = _yaml(tmp_path, """
name: world
settings: {local_steps: 5, learning_rate: 1e-4}
children:
  - name: law
    data: {text: texts/law}
    settings: {clip_norm: .inf, acceptance: validated}
    children:
      - {name: 2024, data: {stdlib: code/data}}
  - {name: médecine, data: {text: /absolute/med}}
  - {name: home, data: {text: ~/texts}}
""")
  assert [m.path for m in tree.members] == [".", "law", "médecine", "home", "law/2024"]
  assert {m.path: m.data for m in tree.members} == {
    ".": None, "law": c.Files(str(tmp_path / "texts/law")), "médecine": c.Files("/absolute/med"),
    "home": c.Files(str(Path.home() / "texts")), "law/2024": c.StandardLibrary("code/data"),
  }
  assert set(_setting(tree, "local_steps").values()) == {5}
  assert set(_setting(tree, "learning_rate").values()) == {1e-4}
  assert _setting(tree, "clip_norm") == {".": 1.0, "law": math.inf, "médecine": 1.0, "home": 1.0, "law/2024": math.inf}


@pytest.mark.parametrize(("text", "message"), [
  ("", "tree.yaml: root=None: expected a mapping with the keys name, data, settings, children"),
  ("- name: a", r"tree.yaml: root=\[{'name': 'a'}\]: expected a mapping"),
  ("{name: w, childrn: []}", "tree.yaml: root: key='childrn': .* 'name', .*; did you mean 'children'"),
  ("{children: []}", "tree.yaml: root: name=None: expected a name"),
  ("{name: w, children: [{data: {text: x}}]}", "tree.yaml: root / w: name=None: expected a name"),
  ("{name: w, children: {name: a}}", "tree.yaml: root / w: children={'name': 'a'}: expected a list of nodes"),
  ("{name: w, children: [a]}", "tree.yaml: root / w='a': expected a mapping"),
  ("{name: w, settings: [1]}", r"tree.yaml: root / w: settings=\[1\]: expected a mapping of settings"),
  ("{name: w, data: {txt: x}}", "tree.yaml: root / w: data='txt': .* 'text', 'stdlib'; did you mean 'text'"),
  ("{name: w, data: x}", "tree.yaml: root / w: data='x': expected {text: FOLDER} or {stdlib: FAMILY}"),
  ("{name: w, data: {text: x, stdlib: y}}", "tree.yaml: root / w: data={.*}: expected {text: FOLDER} or"),
  ("{name: w, data: {text: 3}}", "tree.yaml: root / w: data={'text': 3}: expected {text: FOLDER} or"),
  ("{name: w, data: {stdlib: [code]}}", r"tree.yaml: root / w: data={'stdlib': \['code'\]}: expected {text: FOLDER}"),
  ("{name: w, data: {text: x}, settings: {steps: 3}}", "node '.': setting='steps': expected one of 'local_steps'"),
  ("{name: w, children: [{name: a/b, data: {text: x}}]}", "child 0 of node '.': name='a/b': .* rename the node"),
  ("name: [", r"config.federation.yaml='.*tree.yaml': expected a readable YAML file; .*line 1"),
])
def test_yaml_errors_name_the_file_and_the_node(tmp_path: Path, text: str, message: str) -> None:
  with pytest.raises(ValueError, match=f"(?s){message}"):
    _yaml(tmp_path, text)


def test_yaml_that_cannot_be_read(tmp_path: Path) -> None:
  for path in (tmp_path / "missing.yaml", tmp_path):
    with pytest.raises(ValueError, match=f"config.federation.yaml='{path}': expected a readable YAML file; .Errno"):
      _resolve(yaml=str(path))
  (tmp_path / "latin.yaml").write_bytes("name: médecine".encode("latin-1"))
  with pytest.raises(ValueError, match=r"latin\.yaml': expected a readable YAML file; 'utf-8' codec"):
    _resolve(yaml=str(tmp_path / "latin.yaml"))
