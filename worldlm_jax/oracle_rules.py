"""Who may get what from whom, for the oracle: the rules of `docs/governance.md` as sets of nodes.

Written without `worldlm_jax.governance`, which the tests hold against it.
"""

import functools
import math
from collections.abc import Callable, Mapping

from worldlm_jax.config import Config
from worldlm_jax.federation import Federation, Member
from worldlm_jax.oracle_nodes import NodeState

BOTH = ("backbone", "key_layers")


class Rules:
  """The rules of a tree. `has_key_layers` says whether the algorithm sets key layers apart from the backbone."""

  def __init__(self, federation: Federation, config: Config, has_key_layers: bool):
    self.federation = federation
    self.nodes = federation.by_path
    self.apart = has_key_layers or not round(config.model.key_layer_share * config.model.num_layers)
    self.uniform = config.backbone.weights == "uniform"
    self.whole_layers = config.key_layers.values == "layers"
    attends_to_model = config.key_layers.granularity == "model" and not self.whole_layers
    self.attended = BOTH if attends_to_model else BOTH[1:]
    self.siblings = config.key_layers.candidates != "everybody" and not self.whole_layers
    self.parts = BOTH if config.algorithm.startswith("worldlm") else BOTH[:1]
    for question in (self.audience, self.sources, self.learnt_from, self.in_mean, self.goes_on, self.readers):
      setattr(self, question.__name__, functools.cache(question))

  def below(self, path: str) -> set[str]:
    """A node and everybody below it."""
    return {m.path for m in self.federation.subtree(path)}

  def meant(self, words: str, federation: str = "") -> set[str]:
    """The nodes that words mean; `federation` is the path of the speaker's."""
    names = {"anyone": ["."], "nobody": [], "federation": [federation]}.get(words, words.split(","))
    wanted = {name.strip() for name in names}
    own = {q: q.rstrip("/") for q in self.nodes}
    return {q for q, name in own.items() if "." in wanted or name in wanted
            or any(name.startswith(w + "/") for w in wanted)}

  def says(self, field: str, path: str) -> set[str]:
    """The nodes that a node means with one of its settings, and its own subtree."""
    node = self.nodes[path]
    return self.meant(getattr(node.settings, field), node.federation) | self.below(path)

  def audience(self, part: str, path: str) -> set[str]:
    """Whom what a node learns may reach."""
    key_layers = self.says("share_key_layers", path)
    if part == "residuals":
      return self.says("share_residuals", path) & key_layers
    if part == "key_layers":
      return key_layers
    backbone = self.says("share_backbone", path)
    return backbone if self.apart else backbone & key_layers

  def sources(self, path: str) -> set[str]:
    """Whose learning a node takes in."""
    return self.says("accept_from", path)

  def belongs(self, path: str) -> bool:
    """Whether a node's federation exchanges anything with it."""
    parent = self.nodes[path].parent
    return parent is None or path in self.meant(self.nodes[parent].settings.members)

  def learnt_from(self, part: str, path: str) -> set[str]:
    """Whose learning may be in a node's model; that of others it keeps when it moves."""
    before = self.nodes[path].moved_from
    kept = self.learnt_from(part, before) - {before} if before else set()
    return kept | {x for x, m in self.nodes.items() if m.data is not None and (
      x == path or (path in self.audience(part, x) and x in self.sources(path) and self.belongs(x)))}

  def takes(self, part: str, path: str) -> bool:
    """Whether a node takes its parent's part of the model."""
    return self.belongs(path) and self.learnt_from(part, self.nodes[path].parent or path) <= self.sources(path)

  def in_mean(self, part: str, path: str) -> bool:
    """Whether a node's update enters its federation's mean."""
    parent = str(self.nodes[path].parent)
    if not self.belongs(path) or parent not in self.audience(part, path):
      return False
    if part == "key_layers" and self.whole_layers:
      held = self.learnt_from(part, path)
      return held <= self.sources(parent) and all(parent in self.audience(part, x) for x in held)
    return True

  def looks_at(self, path: str, other: str) -> bool:
    """Whether a node may look at a sibling's update, or at its parent's own."""
    known = self.belongs(other) or other == self.nodes[path].parent
    shown = all(path in self.audience(part, other) for part in self.attended)
    return self.belongs(path) and known and shown and other in self.sources(path)

  def gets_residuals(self, path: str, origin: str) -> bool:
    """Whether a node may get residual layers of another."""
    held = {origin} | (self.learnt_from("key_layers", origin) if self.whole_layers else set())
    return (self.belongs(path) and self.in_mean("key_layers", origin) and held <= self.sources(path)
            and all(path in self.audience("residuals", x) for x in held))

  def offers(self, path: str) -> bool:
    """Whether a node's layers may become residual layers at all."""
    inside = self.below(str(self.nodes[path].parent))
    return any(self.gets_residuals(q, path) for q, m in self.nodes.items() if m.parent is not None and q not in inside)

  def readers(self, part: str, path: str) -> set[str]:
    """Everybody else whom what a node sends reaches."""
    parent = self.nodes[path].parent
    if parent is None:
      return set()
    found: set[str] = set()
    if self.in_mean(part, path):
      found = self.below(parent) | (self.readers(part, parent) if self.goes_on(part, path) else set())
    others = {q for q, m in self.nodes.items() if m.parent is not None and q != path}
    if part == "key_layers":
      found |= {q for q in others if self.gets_residuals(q, path)}
    if part in self.attended and self.siblings:
      found |= {q for q in others if self.nodes[q].parent == parent and self.looks_at(q, path)}
    return found - self.below(path)

  def goes_on(self, part: str, path: str) -> bool:
    """Whether a node's update is part of what its federation sends."""
    parent = str(self.nodes[path].parent)
    is_whole = part == "key_layers" and self.whole_layers
    if not self.in_mean(part, path) or self.nodes[parent].parent is None or is_whole:
      return self.in_mean(part, path)
    readers, place = set[str](), [parent]
    while place:  # and wherever its federation moves later
      readers |= self.readers(part, place[0])
      place = [m.path for m in self.federation.members if m.moved_from == place[0]]
    return bool(readers) and readers <= self.audience(part, path)

  def is_kept(self, part: str, path: str) -> bool:
    """Whether a node's federation keeps its update on top of the model that comes from above."""
    parent = str(self.nodes[path].parent)
    if self.nodes[parent].parent is None or (part == "key_layers" and self.whole_layers):
      return False
    return self.in_mean(part, path) and not (self.goes_on(part, path) and self.in_mean(part, parent))

  def keeps(self, path: str) -> bool:
    """Whether a federation on the level of a node keeps anything; trust is whole there."""
    depth = len(self.federation.ancestors[path])
    return any(self.is_kept(part, m.path) for m in self.federation.members for part in self.parts
               if len(self.federation.ancestors[m.path]) == depth + 1)

  def least_gain(self, path: str) -> float:
    """In nats, how much better than its federation's model a node's own has to be."""
    parent = self.nodes[path].parent
    floor = self.nodes[parent].settings.quality_floor if parent is not None else 0.0
    return math.log(floor) if floor else -math.inf

  def behind(self, path: str, text: dict[str, int]) -> list[str]:
    """The nodes with text that are behind the model that a node is handed next, as its own is."""

    def top(x: str) -> str | None:
      parent = self.nodes[x].parent
      if parent is None or not self.in_mean("backbone", x):
        return x if parent is None else None
      return parent if self.nodes[parent].parent is None or self.is_kept("backbone", x) else top(parent)

    if (reached := top(path)) is None:
      return []
    others = {x: t for x in text if not self.nodes[x].moved_from and (t := top(x)) is not None}
    return [x for x, t in others.items() if x in self.below(reached) and reached in self.below(t)]

  def own_share(self, path: str, text: dict[str, int]) -> float:
    """How much of the text behind that model is its own."""
    behind = self.behind(path, text)
    return text[path] / sum(text[x] for x in behind) if path in text and behind else 0.0

  def others(self, path: str, text: dict[str, int]) -> int:
    """How many others' texts are behind it."""
    return len({*self.behind(path, text)} - {path})

  def follows(self, path: str) -> bool:
    """Whether a node may look at how far its parent's model has moved."""
    parent = str(self.nodes[path].parent)
    siblings = [x for x, m in self.nodes.items() if m.parent == parent]
    return all(self.takes(part, path) and not any(
      self.in_mean(part, x) != self.goes_on(part, x) or self.is_kept(part, x) for x in siblings
    ) for part in self.parts)

  def weights(self, here: list[Member], counts: list[float], nodes: Mapping[str, NodeState]) -> list[float]:
    """What members weigh, each of which counts a part of it."""
    weights = [nodes[c.path].weight for c in here]
    return [a * (float(w > 0) if self.uniform else w) for a, w in zip(counts, weights, strict=True)]

  def sums(
    self, part: str, p: Member, here: list[Member], counts: list[float], nodes: Mapping[str, NodeState]
  ) -> tuple[list[float], list[float], list[float]]:
    """What members count in p's model, in what it sends, and in what it keeps to itself."""
    own = (1.0 if self.uniform else nodes[p.path].own_weight) if nodes[p.path].trained else 0.0

    def shares(may: Callable[[str, str], bool]) -> list[float]:
      weights = [w * may(part, c.path) for w, c in zip(self.weights(here, counts, nodes), here, strict=True)]
      if not any(weights):
        return [0.0] * len(here)
      total = sum(weights) + own
      return capped([w / total for w in weights], own / total, p.settings.member_weight_cap)

    mean = shares(self.in_mean)
    return mean, shares(self.goes_on), [w * self.is_kept(part, c.path) for w, c in zip(mean, here, strict=True)]


def capped(shares: list[float], own: float, cap: float) -> list[float]:
  """Members' shares with what is above the cap spread over the others, and over the federation's own."""
  total = sum(shares) + own
  full: set[int] = set()
  while True:
    free = sum(s for i, s in enumerate(shares) if i not in full) + own
    factor = (total - cap * len(full)) / free if full and free > 0 else 1.0
    now = [cap if i in full else s * factor for i, s in enumerate(shares)]
    above = {i for i, s in enumerate(now) if s > cap * (1 + 1e-12)}
    if not above:
      return now
    full |= above
