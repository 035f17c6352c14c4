"""Trees from YAML, folders, tagged documents and languages, and the same documents dealt out anew."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from worldlm_jax import config as c, federation as f, tree_sources
from worldlm_jax.data import documents, sources

TEXT = c.Files("unread")


def _resolve(root: c.Node | None = None, **where: Any) -> f.Federation:
  return f.resolve(c.Config(federation=c.FederationConfig(root=root, **where), inner_text="before"))


def _setting(federation: f.Federation, name: str) -> dict[str, Any]:
  return {member.path: getattr(member.settings, name) for member in federation.members}


@pytest.mark.parametrize(("root", "where", "given"), [
  (None, {}, []), (c.Node("world", TEXT), {"folder": "x"}, ["root", "folder"]),
  (None, {"yaml": "x", "folder": "y"}, ["yaml", "folder"]),
  (None, {"documents": c.Tfds("x"), "synthetic": c.SyntheticTree((2,))}, ["documents", "synthetic"]),
])
def test_the_tree_comes_from_exactly_one_place(root: c.Node | None, where: dict[str, Any], given: list[str]) -> None:
  with pytest.raises(ValueError, match=re.escape(
    f"config.federation={given}: expected exactly one of root, yaml, folder, documents, synthetic; pass for instance "
    "--config.federation.folder=PATH"
  )):
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
  with pytest.raises(ValueError, match=r"federation\.folder='.*law/eu': expected a folder that holds files ending in "
                                       r"\.txt, .*, or folders of them; add train\.txt, .*, or remove"):
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
    data: {files: texts/law}
    settings: {clip_norm: .inf, acceptance: validated}
    children:
      - {name: 2024, data: {stdlib: code/data}}
  - {name: médecine, data: {files: /absolute/med}}
  - {name: home, data: {files: {path: ~/texts, text_field: body}}}
""")
  assert [m.path for m in tree.members] == [".", "law", "médecine", "home", "law/2024"]
  assert {m.path: m.data for m in tree.members} == {
    ".": None, "law": c.Files(str(tmp_path / "texts/law")), "médecine": c.Files("/absolute/med"),
    "home": c.Files(str(Path.home() / "texts"), "body"), "law/2024": c.StandardLibrary("code/data"),
  }
  assert set(_setting(tree, "local_steps").values()) == {5}
  assert set(_setting(tree, "learning_rate").values()) == {1e-4}
  assert _setting(tree, "clip_norm") == {".": 1.0, "law": math.inf, "médecine": 1.0, "home": 1.0, "law/2024": math.inf}


@pytest.mark.parametrize(("text", "message"), [
  ("", "tree.yaml: root=None: expected a mapping with the keys name, data, settings, children"),
  ("- name: a", r"tree.yaml: root=\[{'name': 'a'}\]: expected a mapping"),
  ("{name: w, childrn: []}", "tree.yaml: root: key='childrn': .* 'name', .*; did you mean 'children'"),
  ("{children: []}", "tree.yaml: root: name=None: expected a name"),
  ("{name: w, children: [{data: {files: x}}]}", "tree.yaml: root / w: name=None: expected a name"),
  ("{name: w, children: {name: a}}", "tree.yaml: root / w: children={'name': 'a'}: expected a list of nodes"),
  ("{name: w, children: [a]}", "tree.yaml: root / w='a': expected a mapping"),
  ("{name: w, settings: [1]}", r"tree.yaml: root / w: settings=\[1\]: expected a mapping of settings"),
  ("{name: w, data: {file: x}}", "tree.yaml: root / w: data='file': .* 'files', 'stdlib', .*; did you mean 'files'"),
  ("{name: w, data: x}", "tree.yaml: root / w: data='x': expected one source, such as {files: FOLDER}"),
  ("{name: w, data: {files: x, stdlib: y}}", "tree.yaml: root / w: data={.*}: expected one source"),
  ("{name: w, data: {files: 3}}", "tree.yaml: root / w: data: files.path=3: expected a string"),
  ("{name: w, data: {stdlib: [code]}}", r"tree.yaml: root / w: data: stdlib.family=\['code'\]: expected a string"),
  ("{name: w, data: {tfds: {nam: x}}}", "tree.yaml: root / w: data: tfds: field='nam': .*; did you mean 'name'"),
  ("{name: w, data: {files: x}, settings: {steps: 3}}", "node '.': setting='steps': expected one of 'local_steps'"),
  ("{name: w, children: [{name: a/b, data: {files: x}}]}", "child 0 of node '.': name='a/b': .* rename the node"),
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


def test_yaml_sources_of_every_kind(tmp_path: Path) -> None:
  tree = _yaml(tmp_path, """
name: world
children:
  - {name: a, data: {tfds: {name: "wiki40b/en", train: "train[:1%]"}}}
  - {name: b, data: {huggingface: {name: allenai/c4, subset: fr}}}
  - {name: c, data: {synthetic: {lineage: north, divergence: 0.5}}}
""")
  assert [m.data for m in tree.levels[1]] == [
    c.Tfds("wiki40b/en", train="train[:1%]"), c.HuggingFace("allenai/c4", "fr"), c.Synthetic("north", 0.5)
  ]


def _tagged(tmp_path: Path, *tags: Any) -> c.Files:
  rows = [{"text": f"document {i}", "meta": {"domain": tag}} for i, tag in enumerate(tags)]
  (tmp_path / "world.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return c.Files(str(tmp_path / "world.jsonl"), node_field="meta.domain")


def test_tags_become_a_tree(tmp_path: Path) -> None:
  source = _tagged(tmp_path, "law/eu", ".", "law/us", "medicine", "law/eu")
  tree = _resolve(documents=source)
  assert tree.members[0].name == "world"
  assert {m.path: m.data for m in tree.members} == {
    ".": c.Tagged(source, "."), "law": None, "medicine": c.Tagged(source, "medicine"),
    "law/eu": c.Tagged(source, "law/eu"), "law/us": c.Tagged(source, "law/us"),
  }
  assert [m.path for m in tree.members] == [".", "law", "medicine", "law/eu", "law/us"]


def test_tags_are_looked_up_once_for_each_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  source = _tagged(tmp_path, "a", "b")
  opened = sources.open_base(source, "error")
  reads = []
  monkeypatch.setattr(
    sources, "open_base",
    lambda base, policy: opened._replace(documents=lambda: reads.append(base) or opened.documents()),
  )
  for _ in range(2):
    assert [m.path for m in _resolve(documents=source).levels[1]] == ["a", "b"]
  assert len(reads) == 1


@pytest.mark.parametrize("tag", ["", "a//b", "/a", "a/", "../b"])
def test_tags_that_are_no_paths_are_refused(tmp_path: Path, tag: str) -> None:
  with pytest.raises(ValueError, match=re.escape(f"federation.documents: meta.domain={tag!r}: expected the path")):
    _resolve(documents=_tagged(tmp_path, "law", tag))


def test_documents_without_a_field_for_nodes_are_refused() -> None:
  with pytest.raises(ValueError, match=r"documents.node_field='': expected the field of a document that holds"):
    _resolve(documents=c.Files("x.jsonl"))
  with pytest.raises(ValueError, match=r"config.federation.documents=Synthetic.*: expected Files, Tfds or HuggingFace"):
    _resolve(documents=c.Synthetic("north"))


def _labelled(folder: Path, *names: str, count: int = 400) -> dict[str, set[str]]:
  """A folder tree in which each node has documents of its own; what it has, by path."""
  found = {}
  for name in names:
    (folder / name).mkdir(parents=True)
    found[name] = {f"document {i} of {name}" for i in range(count)}
    (folder / name / "all.txt").write_text("\n\n".join(sorted(found[name])))
  return found


def _documents(tree: f.Federation) -> dict[str, set[str]]:
  """The documents of each node of a tree."""
  return {
    m.path: {d.text for choice in sources.choices(m.data) for d in sources.open_base(choice.base, "error").documents()
             if choice.accepts(d, documents.digest(d.text.encode()))}
    for m in tree.members if m.data is not None
  }


def test_a_partition_deals_every_document_to_one_leaf(tmp_path: Path) -> None:
  labelled = _labelled(tmp_path, "law", "medicine/trials", "code")
  tree = _resolve(folder=str(tmp_path), partition=c.Partition((2, 3), (5.0, 5.0)))
  assert [m.path for m in tree.members] == [".", "0", "1", *(f"{a}/{b}" for a in "01" for b in "012")]
  parts = _documents(tree)
  assert set(parts) == {f"{a}/{b}" for a in "01" for b in "012"}
  dealt = [text for part in parts.values() for text in part]
  assert sorted(dealt) == sorted(text for texts in labelled.values() for text in texts)


def _shares_of_a(tmp_path: Path, alphas: tuple[float, ...]) -> tuple[float, float]:
  """How label "a" falls over a tree of (2, 2), averaged over seeds: the larger federation's, and its larger leaf's."""
  larger = []
  for seed in range(7):
    parts = _documents(_resolve(folder=str(tmp_path), partition=c.Partition((2, 2), alphas, seed)))
    counts = [[sum(text.endswith("of a") for text in parts[f"{top}/{leaf}"]) for leaf in "01"] for top in "01"]
    most = max(counts, key=sum)
    larger.append((sum(most) / sum(map(sum, counts)), max(most) / sum(most)))
  return sum(top for top, _ in larger) / 7, sum(leaf for _, leaf in larger) / 7


def test_a_small_alpha_is_skewed_and_a_large_one_even_at_each_level(tmp_path: Path) -> None:
  _labelled(tmp_path, "a", "b")
  federations, leaves = _shares_of_a(tmp_path, (1000.0, 0.1))
  assert federations < 0.6 and leaves > 0.8
  federations, leaves = _shares_of_a(tmp_path, (0.1, 1000.0))
  assert federations > 0.8 and leaves < 0.6


def test_the_deal_depends_on_the_seed_and_not_on_other_labels(tmp_path: Path) -> None:
  _labelled(tmp_path / "few", "a", "b", count=97)
  _labelled(tmp_path / "more", "a", "b", "c", count=97)

  def deal(folder: str, seed: int = 0) -> dict[str, set[str]]:
    tree = _resolve(folder=str(tmp_path / folder), partition=c.Partition((3,), (1.0,), seed))
    return {path: {text for text in texts if not text.endswith("of c")} for path, texts in _documents(tree).items()}

  assert deal("few") == deal("more") != deal("few", seed=1)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_swap_exchanges_that_share(tmp_path: Path, share: float) -> None:
  labelled = _labelled(tmp_path, "law", "medicine", "code")
  tree = _resolve(folder=str(tmp_path), swap=c.Swap(("law", "medicine"), share))
  parts = _documents(tree)
  assert parts["code"] == labelled["code"]
  assert parts["law"] | parts["medicine"] == labelled["law"] | labelled["medicine"]
  assert not parts["law"] & parts["medicine"]
  for path in ("law", "medicine"):
    foreign = len(parts[path] - labelled[path]) / 400
    assert foreign == pytest.approx(share, abs=0.08) and (share not in (0, 1) or foreign == share)


def test_larger_swaps_contain_smaller_ones(tmp_path: Path) -> None:
  labelled = _labelled(tmp_path, "law", "medicine")
  moved = [
    _documents(_resolve(folder=str(tmp_path), swap=c.Swap(("law", "medicine"), share)))["medicine"] & labelled["law"]
    for share in (0.25, 0.5, 0.75)
  ]
  assert moved[0] < moved[1] < moved[2]


def test_a_partition_can_be_swapped(tmp_path: Path) -> None:
  labelled = _labelled(tmp_path, "law", "medicine")
  plain = _documents(_resolve(folder=str(tmp_path), partition=c.Partition((2,), (1.0,))))
  tree = _resolve(folder=str(tmp_path), partition=c.Partition((2,), (1.0,)), swap=c.Swap(("0", "1"), 1.0))
  assert _documents(tree) == {"0": plain["1"], "1": plain["0"]}
  assert plain["0"] | plain["1"] == labelled["law"] | labelled["medicine"]


@pytest.mark.parametrize(("where", "message"), [
  ({"partition": c.Partition((2,), ())}, r"partition.alphas=\(\): expected one number for each level of branching=\(2"),
  ({"partition": c.Partition((2, 0), (1.0, 1.0))}, r"partition.branching=\(2, 0\): expected at least one child at"),
  ({"partition": c.Partition((2,), (0.0,))}, r"partition.alphas=\(0.0,\): expected positive numbers"),
  ({"partition": c.Partition(2, (1.0,))}, r"partition.branching=2: expected a tuple, each a whole number; one alone"),
  ({"swap": c.Swap(("law",), 0.5)}, r"swap.nodes=\('law',\): expected the paths of two different nodes"),
  ({"swap": c.Swap(("law", "law"), 0.5)}, r"swap.nodes=\('law', 'law'\): expected the paths of two different nodes"),
  ({"swap": c.Swap(("law", "code"), 1.5)}, r"swap.share=1.5: expected a number from 0 to 1"),
  ({"swap": c.Swap(("law", "cod"), 0.5)}, r"swap.nodes='cod': expected one of 'code', 'law'; did you mean 'code'"),
])
def test_partitions_and_swaps_are_checked(tmp_path: Path, where: dict[str, Any], message: str) -> None:
  _labelled(tmp_path, "code", "law", count=3)
  with pytest.raises(ValueError, match=f"config.federation.{message}"):
    _resolve(folder=str(tmp_path), **where)


def test_synthetic_trees() -> None:
  tree = _resolve(synthetic=c.SyntheticTree((2, 2)))
  assert [len(level) for level in tree.levels] == [1, 2, 4]
  assert all(isinstance(m.data, c.Synthetic) for m in tree.levels[2])


def test_walk_visits_parents_first() -> None:
  root = c.Node("w", None, [c.Node("a", TEXT, [c.Node("b", TEXT)]), c.Node("c", TEXT)])
  assert [path for path, _ in tree_sources.walk(root)] == [".", "a", "a/b", "c"]


def test_a_partition_keeps_the_roots_settings_and_refuses_those_below(tmp_path: Path) -> None:
  _labelled(tmp_path, "a", count=9)
  leaf = c.Node("a", c.Files(str(tmp_path / "a")))
  partition = c.Partition((2,), (1.0,))
  tree = _resolve(c.Node("w", None, [leaf], {"local_steps": 77}), partition=partition)
  assert _setting(tree, "local_steps") == {".": 77, "0": 77, "1": 77}
  leaf.settings["local_steps"] = 3
  with pytest.raises(ValueError, match=r"node 'a': settings={'local_steps': 3}: expected none below the root"):
    _resolve(c.Node("w", None, [leaf]), partition=partition)


def test_a_share_to_swap_needs_nodes(tmp_path: Path) -> None:
  _labelled(tmp_path, "a", "b", count=3)
  with pytest.raises(ValueError, match=r"swap.share=0.5: expected two nodes in config.federation.swap.nodes"):
    _resolve(folder=str(tmp_path), swap=c.Swap(share=0.5))


def test_a_link_back_up_is_refused(tmp_path: Path) -> None:
  _labelled(tmp_path, "law", count=3)
  (tmp_path / "law" / "loop").symlink_to(tmp_path)
  with pytest.raises(ValueError, match=r"federation.folder='.*law/loop': expected a folder that does not lead back"):
    _resolve(folder=str(tmp_path))


@pytest.mark.parametrize(("root", "message"), [
  ("w", r"node '.'='w': expected a Node"),
  (c.Node("w", "texts"), r"node '.': data='texts': expected a source, such as Files\(path\)"),
  (c.Node("w", c.Files(3)), r"node '.': data.path=3: expected a string"),
  (c.Node("w", None, ["a"]), r"node '.': children=\['a'\]: expected a list of nodes"),
  (c.Node("w", None, c.Node("a")), r"node '.': children=Node\(.*: expected a list of nodes"),
  (c.Node("w", TEXT, [], None), r"node '.': settings=None: expected a dict of settings"),
])
def test_nodes_of_the_wrong_type_are_named(root: Any, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    _resolve(root)
