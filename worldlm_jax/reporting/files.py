"""What a report is made of: the files of a run or of a comparison, read into plain data."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from worldlm_jax import checks, config as config_lib, metrics, tree_sources


@dataclasses.dataclass(frozen=True)
class Tree:
  """The nodes of a federation by path, parents before their children, depth first."""

  parents: Mapping[str, str | None]  # by path, in that order; None for the root
  names: Mapping[str, str]

  @classmethod
  def of(cls, nodes: Mapping[str, Mapping[str, Any]]) -> "Tree":
    """From what the records say of each node, by path in any order; those without a way to the root are left out."""
    below: dict[str | None, list[str]] = {}
    for path, node in nodes.items():
      below.setdefault(node["parent"], []).append(path)
    parents: dict[str, str | None] = {}
    waiting = below.get(None, [])[:1]
    while waiting:
      path = waiting.pop()
      parents[path] = nodes[path]["parent"]
      waiting += reversed(below.get(path, []))
    return cls(parents, {path: str(nodes[path]["name"]) for path in parents})

  @property
  def paths(self) -> tuple[str, ...]:
    """All of them, in order."""
    return tuple(self.parents)

  @functools.cached_property
  def children(self) -> dict[str, list[str]]:
    """By path, in order; leaves have none."""
    found: dict[str, list[str]] = {path: [] for path in self.paths}
    for path, parent in self.parents.items():
      if parent is not None:
        found[parent].append(path)
    return found

  def depth(self, path: str) -> int:
    """How many edges lie between the root and the node."""
    parent = self.parents[path]
    return 0 if parent is None else 1 + self.depth(parent)

  @property
  def num_levels(self) -> int:
    """One for a root alone."""
    return 1 + max(self.depth(path) for path in self.paths)

  def title(self, path: str) -> str:
    """What a person calls the node."""
    return tree_sources.title(path, self.names[path])

  def name(self, path: str) -> str:
    """The last part of its path; the root has a name of its own."""
    return self.names[path]


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run's folder holds."""

  folder: Path
  record: Mapping[str, Any]  # config.json
  rows: tuple[Mapping[str, Any], ...]  # metrics.jsonl
  summary: Mapping[str, Any] | None  # summary.json; None while the run is unfinished
  stopped: str  # why it cannot go on; "" if it can
  tree: Tree
  receipts: tuple[Mapping[str, Any], ...] = ()  # receipts.jsonl; runs of earlier versions have none

  @property
  def rounds_done(self) -> int:
    """Rounds with rows."""
    return 1 + max((row["round"] for row in self.rows), default=-1)

  @property
  def rounds_planned(self) -> int:
    """Of the whole run: in the sequential schedule, each level has as many."""
    config = self.record["config"]
    return config["rounds"] * (self.tree.num_levels if config["schedule"] == "sequential" else 1)

  @property
  def algorithm(self) -> str:
    """Its name in the configuration; runs of earlier versions knew one only."""
    return str(self.record["config"].get("algorithm", "worldlm"))

  def text_nodes(self) -> list[str]:
    """Paths of the nodes with text, in the order of the tree."""
    return [path for path in self.tree.paths if self.record["nodes"][path]["data"] is not None]

  def rows_of(self, path: str) -> list[Mapping[str, Any]]:
    """A node's rows by round."""
    return sorted((row for row in self.rows if row["node"] == path), key=lambda row: row["round"])


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What a comparison's folder holds, without its runs."""

  folder: Path
  content: Mapping[str, Any]  # comparison.json
  tree: Tree

  @property
  def names(self) -> list[str]:
    """Of the entries with results, `own` first and `alone` second, then in the order of the config."""
    ordered = dict.fromkeys([self.own, *filter(None, [self.alone]), *self.content["entries"]])
    return [name for name in ordered if name in self.results]

  @property
  def own(self) -> str:
    """The entry that the others are held against."""
    return str(self.content["own"])

  @property
  def alone(self) -> str | None:
    """None where no entry stands for training alone."""
    found = self.content["alone"]
    return str(found) if found else None

  @property
  def results(self) -> Mapping[str, Any]:
    """By name of the entry."""
    return self.content["results"]

  def text_nodes(self) -> list[str]:
    """Paths of the nodes with text, in the order of the tree."""
    return [path for path in self.tree.paths if self.content["nodes"][path]["has_text"]]

  def run_folder(self, run: Mapping[str, Any]) -> Path:
    """Where one of its runs lies. Raises `InputError` if that is not below the comparison's own folder."""
    folder = self.folder / str(run["workdir"])
    inside = folder.resolve().is_relative_to(self.folder.resolve())
    checks.require(inside, f"{self.folder / 'comparison.json'}: workdir", run["workdir"],
                   "a folder within the comparison's", "run the comparison again")
    return folder


@contextlib.contextmanager
def as_written(folder: Path) -> Iterator[None]:
  """What goes wrong with records that are not as this version writes them is an `InputError` that says so."""
  try:
    yield
  except checks.InputError:
    raise
  except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
    raise checks.InputError(f"{folder}: expected the records of a run or a comparison as this version writes them "
                            f"({type(error).__name__}: {error}); make it again with this version") from error


def load(workdir: str | Path) -> Run | Comparison:
  """Reads what a folder holds.

  Raises:
    InputError: it holds neither a run nor a comparison, or a file in it cannot be read.
  """
  folder = Path(workdir).expanduser()
  if (folder / "comparison.json").exists():
    return _load_comparison(folder)
  remedy = "name the folder that worldlm_jax.main or worldlm_jax.compare wrote to"
  checks.require(folder.is_dir(), "--workdir", str(workdir), "a folder", remedy)
  if not (folder / "config.json").exists():
    unfinished = (folder / "runs").is_dir()
    checks.fail("--workdir", str(workdir), "a folder that holds a run (config.json) or a comparison (comparison.json)",
                "a comparison writes its file at the end: run it again to finish it, or name the folder of one of its "
                f"runs under {folder / 'runs'}" if unfinished else remedy)
  return load_run(folder)


def load_run(folder: Path) -> Run:
  """Reads a run's folder. Raises `InputError` where a file is missing or is not what it should be."""
  record = _read(folder / "config.json", "config", "nodes", "versions")
  summary = _read(folder / "summary.json", "nodes", "tree", "seconds") if (folder / "summary.json").exists() else None
  stopped = _read(folder / "stopped.json", "reason") if (folder / "stopped.json").exists() else {"reason": ""}
  with as_written(folder):
    tree = Tree.of(record["nodes"])
    checks.require(set(tree.paths) == set(record["nodes"]), f"{folder / 'config.json'}: nodes",
                   list(record["nodes"])[:8], "a tree: one root, and everybody else's parent")
    rows = tuple(row for row in metrics.read_jsonl(folder / "metrics.jsonl") if row["node"] in record["nodes"])
  receipts = tuple(metrics.read_jsonl(folder / "receipts.jsonl"))
  return Run(folder, record, rows, summary, str(stopped["reason"]), tree, receipts)


def _load_comparison(folder: Path) -> Comparison:
  path = folder / "comparison.json"
  content = _read(path, "own", "alone", "entries", "seeds", "nodes", "results", "verdicts", "runs")
  nodes = content["nodes"]
  with as_written(folder):
    tree = Tree.of(nodes)
    checks.require(set(tree.paths) == set(nodes), f"{path}: nodes", list(nodes)[:8],
                   "a tree: one root, and everybody else's parent")
  return Comparison(folder, content, tree)


def _read(path: Path, *names: str) -> dict[str, Any]:
  return checks.read_object(path, *names, remedy="make the run or comparison again with this version")


def flat(value: Any, path: str = "") -> dict[str, Any]:
  """The leaves of nested dicts by dotted name."""
  if not isinstance(value, dict) or not value:
    return {path: value}
  return {name: leaf for key, inner in value.items() for name, leaf in flat(inner, f"{path}.{key}".lstrip(".")).items()}


def changed_settings(config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
  """(name, value, default) of every field that is not at its default; the tree itself is shown elsewhere."""
  defaults = flat(config_lib.to_dict(config_lib.Config()))
  return [
    (name, value, defaults.get(name)) for name, value in flat(config).items()
    if not name.startswith("federation.") and defaults.get(name) != value
  ]


def own_settings(run: Run) -> list[tuple[str, str, Any, Any]]:
  """(path, setting, value, the parent's value) wherever a node does not do as its parent does."""
  nodes = run.record["nodes"]
  return [
    (path, name, value, nodes[parent]["settings"].get(name))
    for path, parent in run.tree.parents.items() if parent is not None
    for name, value in nodes[path]["settings"].items() if nodes[parent]["settings"].get(name) != value
  ]
