"""Who may get what from whom: every node's rules, and what follows from them for each exchange of the tree.

Rules are about what a node has learnt, its updates, wherever they travel: `share_*` say whom they may reach,
`accept_from` whose a node takes in from outside its subtree, `members` with whom a federation exchanges anything. An
answer here is the rule that forbids, in words, or "" where none does. `docs/governance.md` has all of it in prose.

  merges(c)    c's update enters its federation's mean, and so the federation's model
  travels(c)   it is also part of what the federation itself sends on: everybody whom that reaches may see c's
  stays(c)     it is in no mean above: the federation keeps it on top of the model that comes from above

Nothing here changes during a run. `permissions` turns it into arrays for the rules of the exchange; the receipts give
the same answers as reasons.
"""

import functools
import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from worldlm_jax import checks, sharing
from worldlm_jax.config import NodeSettings
from worldlm_jax.federation import Federation, Member

BACKBONE, KEY_LAYERS, RESIDUALS = "backbone", "key_layers", "residuals"
_OF_NODES = ("share_backbone", "share_key_layers", "share_residuals", "accept_from")
_OF_FEDERATIONS = ("members", "member_weight_cap", "quality_floor")


class Permissions(NamedTuple):
  """What the nodes of one level may exchange, as arrays; ghosts may do everything. Parts are those that cross edges."""

  takes: dict[str, np.ndarray]  # by part, bool [N]: takes its parent's in
  merges: dict[str, np.ndarray]  # by part, bool [N]
  travels: dict[str, np.ndarray]  # by part, bool [N]
  stays: dict[str, np.ndarray]  # by part, bool [N]
  attends_parent: np.ndarray  # bool [N]: may look at what its parent has learnt from its own text
  attends_everybody: np.ndarray  # bool [N]: and at how far its parent's model has moved
  attends: np.ndarray  # bool [N, S]: and at which siblings' updates; places as in Topology.siblings
  offers: np.ndarray  # bool [N]: its layers may become residual layers
  receives: np.ndarray  # bool [N, members]: whose residual layers it may get
  cap: np.ndarray  # float32 [N]: the largest weight of a member of the node
  least_gain: np.ndarray  # float32 [N]: in nats, how much better than its parent's model its own has to be


class Governance:
  """The rules of a tree.

  Args:
    federation: as the algorithm arranges it.
    shares: the parts of a model that cross an edge under the algorithm.
    whole: whether its backbone is the whole model, so that rules about key layers hold for it, too.
    over_layers: whether key layers travel as whole layers, in which nothing can be told apart, and not as updates.
    attended: the parts of single updates that nodes look at: of their parents' own training,
    siblings: and of their siblings'.
  """

  def __init__(
    self, federation: Federation, shares: tuple[str, ...], whole: bool = False, over_layers: bool = False,
    attended: tuple[str, ...] = (KEY_LAYERS,), siblings: bool = True,
  ):
    self.federation, self.shares, self.over_layers = federation, shares, over_layers
    self._whole, self._attended, self._siblings = whole, attended, siblings
    self._children: dict[str, list[Member]] = {m.path: [] for m in federation.members}
    for member in federation.members[1:]:
      self._children[str(member.parent)].append(member)
    for name in ("merges", "takes", "travels", "_destinations", "_held", "receives", "offers"):  # each is asked often
      setattr(self, name, functools.cache(getattr(self, name)))

  # Of pairs of nodes, by path.

  def withholds(self, part: str, source: str, reader: str) -> str:
    """The rule of `source` that keeps what it has learnt from `reader`."""
    if self.federation.is_within(reader, source):
      return ""
    member = self.federation.by_path[source]
    fields = {BACKBONE: ("share_backbone",), KEY_LAYERS: ("share_key_layers",),
              RESIDUALS: ("share_residuals", "share_key_layers")}[part]
    return _first(_says(member, field) for field in (*fields, *(("share_key_layers",) if self._whole else ()))
                  if not sharing.contains(_names(member, field), reader))

  def refuses(self, reader: str, source: str) -> str:
    """The rule of `reader` that keeps it from taking in what `source` has learnt."""
    member = self.federation.by_path[reader]
    inside = self.federation.is_within(source, reader)
    return "" if inside or sharing.contains(_names(member, "accept_from"), source) else _says(member, "accept_from")

  def excludes(self, path: str) -> str:
    """The rule of a node's federation that leaves it out of everything."""
    member = self.federation.by_path[path]
    if member.parent is None:
      return ""
    parent = self.federation.by_path[member.parent]
    return "" if sharing.contains(_names(parent, "members"), path) else _says(parent, "members")

  # Of a node and its federation.

  def follows(self, path: str) -> bool:
    """Whether a node may look at how far its parent's model has moved: if it may have that, and all of it is known.

    What federations keep on top of the model from above is in none of the updates by which that is told.
    """
    siblings = [m.path for m in self._children[str(self.federation.by_path[path].parent)]]
    return not any(self.takes(part, path) for part in self.shares) and all(
      bool(self.merges(part, q)) == bool(self.travels(part, q)) and not self.stays(part, q)
      for part in self.shares for q in siblings
    )

  def merges(self, part: str, path: str) -> str:
    """Why a node's update does not enter its federation's mean."""
    parent = str(self.federation.by_path[path].parent)
    why = self.excludes(path) or self.withholds(part, path, parent)
    if not why and self._is_whole(part):  # whole layers hold what everybody has added to them
      why = _first(self.withholds(part, x, parent) or self.refuses(parent, x) for x in sorted(self._held(part, path)))
    return why

  def takes(self, part: str, path: str) -> str:
    """Why a node does not take in its parent's part of the model."""
    parent = str(self.federation.by_path[path].parent)
    if self.excludes(path):
      return self.excludes(path)
    return _first(self.refuses(path, x) for x in sorted(self._held(part, parent)))

  def travels(self, part: str, path: str) -> str:
    """Why a node's update is no part of what its federation sends on; the root sends nothing, nor keeps it back."""
    parent = self.federation.by_path[str(self.federation.by_path[path].parent)]
    if self.merges(part, path) or parent.parent is None or self._is_whole(part):
      return self.merges(part, path)
    readers = self._destinations_anywhere(part, parent.path)
    if not readers:
      return self.merges(part, parent.path)
    return _first(self.withholds(part, path, reader) for reader in sorted(readers))

  def stays(self, part: str, path: str) -> bool:
    """Whether a node's update is in its federation's model, but in no mean above."""
    parent = self.federation.by_path[str(self.federation.by_path[path].parent)]
    if parent.parent is None or self._is_whole(part) or self.merges(part, path):
      return False
    return bool(self.travels(part, path) or self.merges(part, parent.path))

  def attends(self, path: str, source: str) -> str:
    """Why a node may not look at the update of a sibling, or of its parent's own training."""
    sibling = source != self.federation.by_path[path].parent
    return (self.excludes(path) or (self.excludes(source) if sibling else "")
            or _first(self.withholds(part, source, path) for part in self._attended) or self.refuses(path, source))

  def receives(self, path: str, origin: str) -> str:
    """Why a node may not get residual layers of `origin`."""
    why = self.excludes(path) or self.merges(KEY_LAYERS, origin)
    held = sorted(self._held(KEY_LAYERS, origin)) if self.over_layers else []
    return why or _first(self.withholds(RESIDUALS, x, path) or self.refuses(path, x) for x in (origin, *held))

  def offers(self, path: str) -> bool:
    """Whether somebody outside its federation may get residual layers of a node."""
    return any(not self.receives(reader, path) for reader in self._outside(path))

  def offers_nothing(self, path: str) -> str:
    """The rule by which nobody outside its federation may get them; "" also where there is nobody."""
    if not self.restricts or KEY_LAYERS not in self.shares or self.offers(path):
      return ""
    return _first(self.receives(reader, path) for reader in self._outside(path))

  def sends(self, part: str, path: str) -> bool:
    """Whether a node's update crosses the edge to its federation at all, be it only for some of its siblings."""
    return not self.merges(part, path) or bool(self._destinations(part, path))

  def ends_at(self, part: str, path: str) -> str:
    """The rule by which an update that enters its federation's mean is in none above."""
    parent = self.federation.by_path[str(self.federation.by_path[path].parent)]
    return "" if parent.parent is None else self.travels(part, path) or self.merges(part, parent.path)

  def reached(self, part: str, path: str) -> str | None:
    """The highest federation whose mean has a node's update in it."""
    parent = str(self.federation.by_path[path].parent)
    if self.federation.by_path[path].parent is None or self.merges(part, path):
      return None
    if self.federation.by_path[parent].parent is None or self.stays(part, path):
      return parent
    return self.reached(part, parent)

  # Of the tree.

  @functools.cached_property
  def restricts(self) -> bool:
    """Whether any node has a rule at all."""
    return any(self.rules_of(m.path) for m in self.federation.members)

  @functools.cached_property
  def has_floor(self) -> bool:
    """Whether some federation measures its members."""
    return any(m.settings.quality_floor > 0 and self._children[m.path] for m in self.federation.members)

  def keeps(self, level: int) -> tuple[str, ...]:
    """The parts of which some federation of a level keeps members' updates on top of what comes from above."""
    below = self.federation.levels[level + 1] if level + 1 < len(self.federation.levels) else ()
    return tuple(part for part in self.shares if any(self.stays(part, m.path) for m in below))

  def behind(self, text: Collection[str]) -> dict[str, set[str]]:
    """By path, the nodes of those with text that are behind the model which a node is handed next, as its own is.

    Empty for nodes that take no part in it.
    """
    part = BACKBONE if BACKBONE in self.shares else KEY_LAYERS
    root = self.federation.members[0].path
    reached = {m.path: self.reached(part, m.path) for m in self.federation.members} | {root: root}

    def of(path: str) -> set[str]:
      top = reached[path]
      return set() if top is None else {
        p for p in text if (other := reached[p]) is not None and self.federation.is_within(p, top)
        and self.federation.is_within(top, other)
      }

    return {m.path: of(m.path) for m in self.federation.members}

  def rules_of(self, path: str) -> dict[str, str | float]:
    """The rules of a node that are not at their defaults; those about members only where it may have some."""
    settings, default = self.federation.by_path[path].settings, NodeSettings()
    names = _OF_NODES + (_OF_FEDERATIONS if self._children[path] else ())
    return {name: getattr(settings, name) for name in names if getattr(settings, name) != getattr(default, name)}

  def lines(self) -> list[str]:
    """For people: a line for each node whose rules restrict something."""
    rules = {m.path: self.rules_of(m.path) for m in self.federation.members}
    return [f"rules of {path}: {', '.join(f'{field}={value}' for field, value in found.items())}"
            for path, found in rules.items() if found]

  def _outside(self, path: str) -> list[str]:
    """Everybody who is not in a node's federation, but the root."""
    parent = str(self.federation.by_path[path].parent)
    return [m.path for m in self.federation.members[1:] if not self.federation.is_within(m.path, parent)]

  def _is_whole(self, part: str) -> bool:
    return part == KEY_LAYERS and self.over_layers

  def _held(self, part: str, path: str) -> frozenset[str]:
    """Whose learning may be in a node's model: those with text that may reach it, its own, and what it moved with."""
    member = self.federation.by_path[path]
    brought = self._held(part, member.moved_from) - {member.moved_from} if member.moved_from else frozenset()
    return brought | frozenset(
      m.path for m in self.federation.members if m.data is not None and (m.path == path or not (
        self.withholds(part, m.path, path) or self.refuses(path, m.path) or self.excludes(m.path)))
    )

  def _destinations_anywhere(self, part: str, path: str) -> frozenset[str]:
    """`_destinations` of a node at this place and at those to which it moves, where it still has what it has now."""
    later = [m.path for m in self.federation.members if m.moved_from == path]
    return self._destinations(part, path).union(*(self._destinations_anywhere(part, place) for place in later))

  def _destinations(self, part: str, path: str) -> frozenset[str]:
    """Everybody outside its subtree whom what a node sends reaches, in means and by itself."""
    member, found = self.federation.by_path[path], set()
    if member.parent is None:
      return frozenset()
    if not self.merges(part, path):
      found |= {m.path for m in self.federation.subtree(member.parent)}
      if not self.travels(part, path):
        found |= self._destinations(part, member.parent)
    if part in self._attended and self._siblings:
      siblings = self._children[member.parent]
      found |= {m.path for m in siblings if m.path != path and not self.attends(m.path, path)}
    if part == KEY_LAYERS:
      found |= {m.path for m in self.federation.members[1:] if not self.receives(m.path, path)}
    return frozenset(p for p in found if not self.federation.is_within(p, path))


def permissions(governance: Governance, level: int, siblings: np.ndarray, size: int) -> Permissions:
  """The permissions of one level of `size` rows, ghosts included; `siblings` is Topology.siblings, int32 `[N, S]`."""
  federation = governance.federation
  members = federation.levels[level]
  has_parent = level > 0

  def per_node(values: list, ghost: float | bool, kind: type) -> np.ndarray:
    return np.array([*values, *[ghost] * (size - len(members))], kind)

  def allowed(why: list[str]) -> np.ndarray:
    return per_node([not reason for reason in why], True, bool)

  def by_part(question: str) -> dict[str, np.ndarray]:
    ask = getattr(governance, question)
    return {part: allowed([ask(part, m.path) if has_parent else "" for m in members]) for part in governance.shares}

  attends = np.ones(siblings.shape, bool)
  receives = np.ones((size, len(federation.members)), bool)
  for i, member in enumerate(members if has_parent else ()):
    attends[i] = [not governance.attends(member.path, members[s].path) for s in siblings[i]]
    receives[i] = [m.parent is not None and not governance.receives(member.path, m.path) for m in federation.members]
  parents = [federation.by_path[m.parent] if m.parent is not None else None for m in members]
  floors = [p.settings.quality_floor if p is not None else 0.0 for p in parents]
  return Permissions(
    by_part("takes"), by_part("merges"), by_part("travels"),
    {part: per_node([has_parent and governance.stays(part, m.path) for m in members], False, bool)
     for part in governance.shares},
    allowed([governance.attends(m.path, m.parent) if m.parent is not None else "" for m in members]),
    per_node([not has_parent or governance.follows(m.path) for m in members], True, bool), attends,
    per_node([not has_parent or governance.offers(m.path) for m in members], True, bool), receives,
    per_node([m.settings.member_weight_cap for m in members], 1.0, np.float32),
    per_node([math.log(floor) if floor > 0 else -math.inf for floor in floors], -math.inf, np.float32),
  )


def check(governance: Governance, server_optimizer: str) -> None:
  """Raises `InputError` where rules cannot hold together, or with this `BackboneConfig.server_optimizer`."""
  federation = governance.federation
  if not governance.restricts:
    return
  if federation.is_pooled:
    for member in federation.members:
      said = [field for field in ("share_backbone", "share_key_layers") if sharing.ROOT not in _names(member, field)]
      checks.require(not said, f"node {member.path!r}: {said[0] if said else ''}",
                     getattr(member.settings, said[0]) if said else "", "anyone with config.algorithm=centralized",
                     "it pools the texts themselves: choose another algorithm")
  for head in federation.members:
    where, settings = f"node {head.path!r}", head.settings
    members = [m for m in federation.members if m.parent == head.path]
    sending = [m for m in members if any(not governance.merges(part, m.path) for part in governance.shares)]
    holds = settings.member_weight_cap * len(sending) > 1 - 1e-6 or head.trains or not sending
    checks.require(holds, f"{where}: member_weight_cap", settings.member_weight_cap,
                   f"at least 1/{len(sending)}, since {len(sending)} of its members may send it something",
                   f"--node={sharing.configured(head.path)}.member_weight_cap=1 lifts a cap that was inherited")
    apart = [m.path for m in sending
             if not governance.merges(BACKBONE, m.path) and governance.travels(BACKBONE, m.path)]
    checks.require(server_optimizer == "sgd" or not apart, "config.backbone.server_optimizer", server_optimizer,
                   f"'sgd', since {head.path!r} keeps what {apart[0] if apart else ''!r} sends from others",
                   "momentum would mix what must stay apart")
    for m in sending if settings.quality_floor > 0 else ():
      why = _first(governance.takes(part, m.path) for part in governance.shares) if m.trains else ""
      checks.require(not why, f"{where}: quality_floor", settings.quality_floor,
                     f"0 as long as its member {m.path!r} may not hold its own model against the federation's ({why})",
                     "lift one of the two rules")


def _names(member: Member, field: str) -> tuple[str, ...]:
  return sharing.named(getattr(member.settings, field), member.federation)


def _says(member: Member, field: str) -> str:
  return f"{field}={getattr(member.settings, field)} of {member.path}"


def _first(reasons: Iterator[str]) -> str:
  return next(filter(None, reasons), "")
