"""The tree that a config asks for: nested nodes, a YAML file, folders, tagged documents or synthetic languages.

On top of any of them, `partition` deals all documents out over a new tree, and `swap` exchanges documents
between two nodes.
"""

import dataclasses
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from worldlm_jax import checks, config as config_lib, validation
from worldlm_jax.config import Node
from worldlm_jax.data import cache, files, synthetic

ROOT = "."
MAX_TAGS = 10_000
MAX_NAME_BYTES = 200  # file systems take 255
MAX_DEPTH = 100
_YAML_SOURCES: dict[str, type] = {
  "files": config_lib.Files, "stdlib": config_lib.StandardLibrary, "tfds": config_lib.Tfds,
  "huggingface": config_lib.HuggingFace, "synthetic": config_lib.Synthetic,
}
_PLACES = ("root", "yaml", "folder", "documents", "synthetic")


def configured_tree(federation: config_lib.FederationConfig, data: config_lib.DataConfig) -> Node:
  """The tree of a validated config. Raises `InputError` naming the field, file or node."""
  unset = config_lib.FederationConfig()
  given = [name for name in _PLACES if getattr(federation, name) != getattr(unset, name)]
  if len(given) != 1:
    checks.fail("config.federation", given, f"exactly one of {', '.join(_PLACES)}",
                "pass for instance --config.federation.folder=PATH, with a config file that sets none of the others")
  tree = {
    "root": lambda: federation.root, "yaml": lambda: _tree_from_yaml(Path(federation.yaml)),
    "folder": lambda: _tree_from_top_folder(federation.folder),
    "documents": lambda: _tree_from_tags(federation.documents, data),
    "synthetic": lambda: synthetic.tree(federation.synthetic),
  }[given[0]]()
  assert tree is not None
  if federation.partition.branching:
    tree = _partitioned(tree, federation.partition)
  if federation.swap.nodes:
    tree = _swapped(tree, federation.swap)
  return tree


def title(path: str, name: str) -> str:
  """What people call a node: its path; the root by its name, since its path is no word."""
  return name + path.removeprefix(ROOT) if path in (ROOT, f"{ROOT}/") else path


def is_name(name: str) -> bool:
  """Whether a node may be called so where its name comes from outside: it can then be a folder's, on one line."""
  odd = any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name)
  return not odd and "/" not in name and name not in ("", ".", "..") and len(name.encode()) <= MAX_NAME_BYTES


def walk(node: Node, path: str = ROOT) -> Iterable[tuple[str, Node]]:
  """All nodes with their paths, parents before children."""
  validation.validate_node(node, f"node {path!r}")
  yield path, node
  for child in node.children:
    yield from walk(child, child.name if path == ROOT else f"{path}/{child.name}")


def _check_name(where: str, name: str) -> None:
  checks.require(is_name(name) or "/" in name or name in (".", ".."), where, name,
                 f"a name of at most {MAX_NAME_BYTES} bytes, without line ends and other control characters",
                 "rename the node")


def _tree_from_top_folder(name: str) -> Node:
  folder = Path(name).expanduser()
  checks.require(folder.is_dir(), "config.federation.folder", name, "an existing folder")
  return _tree_from_folder(folder, folder.resolve().name)


def _tree_from_folder(folder: Path, name: str, above: frozenset[Path] = frozenset()) -> Node:
  """Each folder is a node; one that holds readable files has data. Hidden folders are left out."""
  real = folder.resolve()
  checks.require(len(above) < MAX_DEPTH, "config.federation.folder", str(folder),
                 f"at most {MAX_DEPTH} levels of folders")
  checks.require(real not in above, "config.federation.folder", str(folder), "a folder that does not lead back to one "
                 "above it", "remove the link")
  try:
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
  except OSError as error:
    message = f"config.federation.folder: {folder} cannot be read ({error.strerror}); make it readable"
    raise checks.InputError(message) from error
  names = [entry for entry in entries if not entry.name.startswith((".", "__"))]
  children = [_tree_from_folder(Path(entry.path), entry.name, above | {real}) for entry in names if entry.is_dir()]
  has_text = any(entry.name.endswith(files.SUFFIXES) and entry.is_file() for entry in names)
  if not children and not has_text:
    checks.fail("config.federation.folder", str(folder),
                f"a folder that holds files ending in {', '.join(files.SUFFIXES)}, or folders of them",
                "add train.txt, valid.txt and test.txt (or other files), or remove the folder")
  return Node(name, config_lib.Files(str(folder)) if has_text else None, children)


def _tree_from_yaml(path: Path) -> Node:
  """Nested mappings with the keys name, data, settings, children."""
  try:
    content = checks.read_yaml(path)
  except (OSError, ValueError) as error:
    raise checks.InputError(f"config.federation.yaml={str(path)!r}: expected a readable YAML file; {error}") from error

  def build(entry: Any, where: str) -> Node:
    if not isinstance(entry, dict):
      checks.fail(f"{path}: {where}", entry, "a mapping with the keys name, data, settings, children")
    for key in entry:
      checks.one_of(f"{path}: {where}: key", key, ("name", "data", "settings", "children"))
    name = str(entry.get("name") or checks.fail(f"{path}: {where}: name", entry.get("name"), "a name",
                                                "quote it if it is a word like no, which YAML takes for false"))
    _check_name(f"{path}: {where}: name", name)
    here = f"{where} / {name}"
    children, settings = entry.get("children") or [], entry.get("settings") or {}
    data = entry.get("data")
    source = None if data is None else _source_from_yaml(data, path.parent, f"{path}: {here}: data")
    checks.require(isinstance(children, list), f"{path}: {here}: children", children, "a list of nodes")
    checks.require(isinstance(settings, dict), f"{path}: {here}: settings", settings, "a mapping of settings")
    return Node(name, source, [build(child, here) for child in children], settings)

  return build(content, "root")


def _source_from_yaml(data: Any, base: Path, where: str) -> config_lib.Source:
  """`{kind: VALUE}`, where the value is that of the source's first field, or a mapping of its fields."""
  expected = "one source, such as {files: FOLDER}, {stdlib: FAMILY} or {tfds: {name: NAME, train: SPLIT}}"
  checks.require(isinstance(data, dict) and len(data) == 1, where, data, expected)
  ((kind, value),) = data.items()
  checks.one_of(where, kind, _YAML_SOURCES)
  fields = [field.name for field in dataclasses.fields(_YAML_SOURCES[kind])]
  values = value if isinstance(value, dict) else {fields[0]: value}
  for field in values:
    checks.one_of(f"{where}: {kind}: field", field, fields)
  source = _YAML_SOURCES[kind](**values)
  validation.validate_types(source, f"{where}: {kind}")
  if isinstance(source, config_lib.Files):
    source.path = str(base / os.path.expanduser(source.path))
  return source


def _tree_from_tags(source: config_lib.Source, data: config_lib.DataConfig) -> Node:
  """A node for each path that the documents' node_field names, and for those on the way to it."""
  checks.require(isinstance(source, config_lib.Files | config_lib.Tfds | config_lib.HuggingFace),
                 "config.federation.documents", source, "Files, Tfds or HuggingFace")
  assert isinstance(source, config_lib.Files | config_lib.Tfds | config_lib.HuggingFace)
  checks.require(bool(source.node_field), "config.federation.documents.node_field", "",
                 "the field of a document that holds the path of its node, such as 'law/eu'",
                 "set it, or give the documents to a single node of the tree")
  tags = cache.tags(source, data)
  checks.require(len(tags) <= MAX_TAGS, "config.federation.documents.node_field", source.node_field,
                 f"a field with at most {MAX_TAGS} different values, but it has more", "is it really the node's name?")
  root = Node(Path(getattr(source, "path", "") or getattr(source, "name", "")).name.partition(".")[0] or "world")
  for tag in tags:
    node = root
    checks.require(tag.count("/") < MAX_DEPTH, f"config.federation.documents: {source.node_field}", tag,
                   f"the path of a node at most {MAX_DEPTH} levels down")
    for name in [] if tag == ROOT else tag.split("/"):
      checks.require(name not in ("", ".", ".."), f"config.federation.documents: {source.node_field}", tag,
                     "the path of a node, such as 'law/eu', or '.' for the root")
      _check_name(f"config.federation.documents: {source.node_field}", name)
      child = next((child for child in node.children if child.name == name), None)
      if child is None:
        child = Node(name)
        node.children.append(child)
      node = child
    node.data = config_lib.Tagged(source, tag)
  return root


def _partitioned(tree: Node, partition: config_lib.Partition) -> Node:
  """A tree of the given branching whose leaves share out what the nodes of `tree` have."""
  for path, node in walk(tree):
    checks.require(path == ROOT or not node.settings, f"node {path!r}: settings", node.settings, "none below the root, "
                   "since config.federation.partition makes other nodes", "set those with --node=0/1.FIELD=VALUE")
  sources = {path: node.data for path, node in walk(tree) if node.data is not None}
  names = [list(map(str, range(count))) for count in partition.branching]

  def build(place: tuple[int, ...]) -> Node:
    name = names[len(place) - 1][place[-1]] if place else tree.name
    if len(place) == len(partition.branching):
      return Node(name, config_lib.Share(sources, place, partition.branching, partition.alphas, partition.seed))
    children = [build((*place, child)) for child in range(partition.branching[len(place)])]
    return Node(name, None, children, {} if place else tree.settings)

  return build(())


def _swapped(tree: Node, swap: config_lib.Swap) -> Node:
  """The tree with the two nodes' sources crossed."""
  nodes = dict(walk(tree))
  with_text = [path for path, node in nodes.items() if node.data is not None]
  for path in swap.nodes:
    checks.one_of("config.federation.swap.nodes", path, with_text)
  a, b = (nodes[path].data for path in swap.nodes)
  assert a is not None and b is not None
  crossed = {
    path: config_lib.Swapped(own, other, swap.share, swap.seed)
    for path, own, other in zip(swap.nodes, (a, b), (b, a), strict=True)
  }

  def rebuild(node: Node, path: str) -> Node:
    below = [rebuild(child, child.name if path == ROOT else f"{path}/{child.name}") for child in node.children]
    return dataclasses.replace(node, data=crossed.get(path, node.data), children=below)

  return rebuild(tree, ROOT)


