"""The federation tree: resolved from a config and frozen.

A node is named by its path from the root, such as `law/eu`; the root's own path is ".". Nodes of
the same depth form a level; within a level the children of one parent stand side by side.

Where a federation has text of its own (`Config.inner_text` is "beside"), it stands for two members: the
federation proper, `law/`, and its text, `law`, one child more of it.
"""

import copy
import dataclasses
import functools
import math
from typing import Any

import numpy as np

from worldlm_jax import checks, config as config_lib, moves, sharing, tree_sources, validation
from worldlm_jax.tree_sources import ROOT

ABOVE = ".."  # the path of a root that is put above the configured tree; no node can have this name


@dataclasses.dataclass(frozen=True)
class Member:
  """A node of the resolved tree, with the settings it inherited and overrode."""

  path: str
  name: str
  parent: str | None
  data: config_lib.Source | None
  settings: config_lib.NodeSettings
  pools: tuple[str, ...] = ()  # the members on whose batches it trains; see `pooled`
  federation: str = ROOT  # path of the configured node whose member it is, however an algorithm arranges the tree
  origin: str = ""  # the first place of a node that has moved, whose text and batches it goes on with; see `identity`
  moved_from: str = ""  # its place before, and
  moved_in: int = 0  # the round of the root in which it came from there

  @property
  def identity(self) -> str:
    """What it is known by wherever it is: its first path."""
    return self.origin or self.path

  @property
  def trains(self) -> bool:
    """Whether it has something to train on, and steps to make."""
    return (self.data is not None or bool(self.pools)) and self.settings.local_steps > 0


@dataclasses.dataclass(frozen=True)
class Federation:
  """The resolved tree by levels: `levels[d]` holds the nodes of depth `d`, siblings side by side."""

  levels: tuple[tuple[Member, ...], ...]

  @functools.cached_property
  def members(self) -> tuple[Member, ...]:
    """All nodes, root first, level by level."""
    return tuple(member for level in self.levels for member in level)

  @property
  def root(self) -> Member:
    """The node that has no parent."""
    return self.levels[0][0]

  @property
  def is_pooled(self) -> bool:
    """Whether the root trains in the place of the others."""
    return bool(self.root.pools)

  @functools.cached_property
  def parents(self) -> tuple[np.ndarray, ...]:
    """Per level, the index of each node's parent within the level above: int32 `[N_d]`, -1 for the root."""
    result = [np.full(1, -1, np.int32)]
    for above, level in zip(self.levels, self.levels[1:], strict=False):
      position = {member.path: i for i, member in enumerate(above)}
      result.append(np.array([position[str(member.parent)] for member in level], np.int32))
    return tuple(result)

  def children(self, level: int) -> tuple[np.ndarray, np.ndarray]:
    """The sibling groups under `level`: indices into the level below and their mask, both `[N, S]`.

    S is the largest number of children in the level (at least 1); absent places hold index 0.
    """
    below = self.parents[level + 1]
    groups = [np.flatnonzero(below == i) for i in range(len(self.levels[level]))]
    size = max(1, *(len(group) for group in groups))
    index = np.zeros((len(groups), size), np.int32)
    mask = np.zeros((len(groups), size), bool)
    for i, group in enumerate(groups):
      index[i, : len(group)], mask[i, : len(group)] = group, True
    return index, mask

  def is_federation(self, level: int) -> np.ndarray:
    """Which nodes of a level have children: bool `[N]`."""
    if level + 1 == len(self.levels):
      return np.zeros(len(self.levels[level]), bool)
    return np.asarray(self.children(level)[1].any(axis=1))

  @functools.cached_property
  def members_of(self) -> dict[str, tuple[Member, ...]]:
    """By path, a node's children."""
    found: dict[str, list[Member]] = {member.path: [] for member in self.members}
    for member in self.members[1:]:
      found[str(member.parent)].append(member)
    return {path: tuple(children) for path, children in found.items()}

  @functools.cached_property
  def by_path(self) -> dict[str, Member]:
    """Every node by its path."""
    return {member.path: member for member in self.members}

  @functools.cached_property
  def deserted(self) -> frozenset[str]:
    """The places whose nodes are elsewhere in the end."""
    return frozenset(member.moved_from for member in self.members if member.moved_from)

  def moves(self, round_index: int) -> list[tuple[str, str]]:
    """Who moves at the beginning of a round of the root: pairs of paths, from and to."""
    return [(m.moved_from, m.path) for m in self.members if m.moved_from and m.moved_in == round_index]

  @functools.cached_property
  def ancestors(self) -> dict[str, tuple[str, ...]]:
    """By path, the node itself and all above it, up to the root."""
    result: dict[str, tuple[str, ...]] = {}
    for member in self.members:
      result[member.path] = (member.path, *(result[member.parent] if member.parent is not None else ()))
    return result

  def is_within(self, path: str, ancestor: str) -> bool:
    """Whether `path` is `ancestor` or lies below it."""
    return ancestor in self.ancestors[path]

  def subtree(self, path: str) -> tuple[Member, ...]:
    """The node and all below it, in tree order (parents before children, depth first)."""
    below = [m for m in self.members if m.parent == path]
    here = next(m for m in self.members if m.path == path)
    return (here, *(member for child in below for member in self.subtree(child.path)))


def as_given(federation: Federation) -> Federation:
  """The tree itself."""
  return federation


def flattened(federation: Federation) -> Federation:
  """Every node with text as a member of one server that has none: the tree of FedAvg.

  Members keep their paths, and so the order of their data; they make as many steps per round as in the tree.
  """
  server = dataclasses.replace(federation.root, path=ABOVE, name="server", data=None)
  return Federation(((server,), _members_of(server, federation)))


def pooled(federation: Federation) -> Federation:
  """One root that trains on everybody's batches, in everybody's stead: centralised training.

  Its steps are as large as the largest node's and so many that every round takes the windows that the members
  would take. Below it stand the nodes with text, to be scored, and to personalise the model in the last round.
  """
  members = _members_of(dataclasses.replace(federation.root, path=ABOVE), federation)
  members = tuple(m for m in members if not m.moved_from)  # their text is that of their first place
  windows = sum(m.settings.local_steps * m.settings.batch_size for m in members)
  batch_size = max((m.settings.batch_size for m in members), default=1)
  settings = dataclasses.replace(federation.root.settings, local_steps=-(-windows // batch_size), batch_size=batch_size)
  root = Member(ABOVE, "pool", None, None, settings, tuple(m.path for m in members))
  return Federation(((root,), members))


def _members_of(root: Member, federation: Federation) -> tuple[Member, ...]:
  times: dict[str, int] = {}  # how often a node trains in a round of the root
  for m in federation.members:
    above = next((p for p in federation.members if p.path == m.parent), None)
    times[m.path] = 1 if above is None else times[above.path] * (
      1 if above.parent is None else above.settings.rounds_per_parent_round
    )
  return tuple(
    dataclasses.replace(m, name=tree_sources.title(m.path, m.name), parent=root.path,
                        settings=dataclasses.replace(m.settings, local_steps=times[m.path] * m.settings.local_steps))
    for m in federation.members if m.data is not None
  )


def resolve(config: config_lib.Config) -> Federation:
  """Validates a config and freezes its tree, with settings inherited from the root down.

  Raises `ValueError` naming the field or node, its value, what was expected and the remedy.
  """
  validation.validate(config)
  root, places = moves.with_moves(tree_sources.configured_tree(config.federation, config.data), config.federation.moves)
  levels: list[list[Member]] = []
  beside = config.inner_text == "beside"
  unused = {path: dict(values) for path, values in config.federation.overrides.items()}

  def visit(node: config_lib.Node, path: str, parent: str | None, inherited: config_lib.NodeSettings) -> None:
    validation.validate_node(node, f"node {path!r}")
    own, history = dict(node.settings), places.history(path)
    for place in history:
      own |= config.federation.overrides.get(place, {})
    unused.pop(path, None)
    settings = _override(inherited, own, f"node {path!r}")
    validation.validate_node_settings(settings, f"node {path!r}")
    settings.joins_round = max(settings.joins_round, places.arrivals.get(path, 0))
    if left := places.departures.get(path):
      settings.leaves_round = min(left, settings.leaves_round or left)
    validation.validate_node_settings(settings, f"node {path!r}")  # with the rounds of moves
    if not node.children and node.data is None:
      checks.fail(f"node {path!r}: data", None, "a source of text at every node without children",
                  "give it data or remove the node")
    level = 0 if path == ROOT else path.count("/") + 1
    levels.extend([] for _ in range(level + 1 + bool(node.children) - len(levels)))
    head = f"{path}/" if beside and node.children and node.data is not None else path

    def came(ending: str = "") -> dict[str, Any]:
      if path not in places.before:
        return {}
      return {"origin": history[0] + ending, "moved_from": places.before[path] + ending, "moved_in": places.since[path]}

    own_data, outer = node.data if head == path else None, sharing.configured(parent or ROOT)
    here = came(head.removeprefix(path))
    levels[level].append(Member(head, node.name, parent, own_data, settings, federation=outer, **here))
    if head != path:
      levels[level + 1].append(Member(path, node.name, head, node.data, settings, federation=path, **came()))
    _check_names([child.name for child in node.children], path)
    for child in node.children:
      visit(child, child.name if path == ROOT else f"{path}/{child.name}", head, settings)

  visit(root, ROOT, None, copy.copy(config.node))
  federation = Federation(tuple(tuple(level) for level in levels))
  for path in unused:
    checks.fail("node", path, "the path of a node of the tree",
                checks.did_you_mean(path, [m.path for m in federation.members]) or "the root is '.'")
  paths = {sharing.configured(m.path) for m in federation.members}
  for member in federation.members:
    sharing.validate(member.settings, f"node {member.path!r}", paths)
  return federation


def parse_override(text: str) -> tuple[str, str, str]:
  """Splits `law/eu.local_steps=20` (the root is ".") into path, field and value, still a string."""
  left, equals, value = text.partition("=")
  path, dot, field = left.rpartition(".")
  if not (equals and dot and path and field):
    checks.fail("--node", text, "PATH.FIELD=VALUE, such as law/eu.local_steps=20 ('..local_steps=20' for the root)")
  return path, field, value


def _check_names(names: list[str], path: str) -> None:
  for i, name in enumerate(names):
    if not name or "/" in name or name in (".", ".."):
      checks.fail(f"child {i} of node {path!r}: name", name, "a name without '/', not empty, '.' or '..'",
                  "'/' separates the names in a node's path: rename the node")
    checks.require(name not in names[:i], f"child {i} of node {path!r}: name", name,
                   "a name that no sibling has", "rename one of the two")


def _override(settings: config_lib.NodeSettings, values: dict[str, Any], where: str) -> config_lib.NodeSettings:
  types = {field.name: field.type for field in dataclasses.fields(config_lib.NodeSettings)}
  for name, value in values.items():
    checks.one_of(f"{where}: setting", name, types)
    settings = dataclasses.replace(settings, **{name: _typed(value, types[name], f"{where}: {name}")})
  return settings if values else copy.copy(settings)


def _typed(value: Any, kind: Any, where: str) -> Any:
  """The value as `kind` (int, float or str); strings are parsed, since flags give nothing else."""
  try:
    if kind is str and isinstance(value, str):
      return value
    if kind in (int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
      number = kind(value)
      if not math.isnan(number) and (isinstance(value, str) or number == value):
        return number
  except (ValueError, OverflowError):
    pass
  return checks.fail(where, value, {int: "a whole number", float: "a number", str: "a word"}[kind])
