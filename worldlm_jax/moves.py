"""Nodes that move to another federation: one tree that has every place in which anybody ever is.

A moved node stands at its new place from the round of its move on, and at its old one until then; with it all below.
Which of its places counts in a round is a matter of membership (`attendance.py`), so that the tree, the stacked state
and the compiled programs stay the same; at the move, what the node holds is copied from the old row to the new one.
That takes memory for a node at each place, and lets nobody return to a place that it has left.
"""

import copy
import dataclasses

from worldlm_jax import checks, tree_sources
from worldlm_jax.config import Move, Node


@dataclasses.dataclass(frozen=True)
class Places:
  """Where the nodes of a tree were before; all by path."""

  before: dict[str, str]  # of everybody who came with a move: the last place
  since: dict[str, int]  # and the round of that move
  arrivals: dict[str, int]  # heads of moved subtrees at their new places, and the round
  departures: dict[str, int]  # at their old ones

  def history(self, path: str) -> list[str]:
    """All places of a node up to this one, the first of them first."""
    found = [path]
    while found[0] in self.before:
      found.insert(0, self.before[found[0]])
    return found


def with_moves(root: Node, moves: list[Move]) -> tuple[Node, Places]:
  """The tree with all places, and who was where.

  Raises:
    checks.InputError: a move that is none, or of a node that is not there.
  """
  places = Places({}, {}, {}, {})
  if not moves:
    return root, places
  root = copy.deepcopy(root)
  for i, move in enumerate(moves):
    name = f"config.federation.moves[{i}]"
    checks.require(isinstance(move, Move), name, move, "a Move(node, to, round)")
    checks.require(isinstance(move.round, int) and move.round >= 1, f"{name}.round", move.round,
                   "a round of the root after the first, which is 0")
  for move in sorted(moves, key=lambda move: move.round):
    name, nodes = "config.federation.moves", dict(tree_sources.walk(root))
    checks.one_of(f"{name}: node", move.node, nodes)
    checks.one_of(f"{name}: to", move.to, nodes)
    inside = move.node == tree_sources.ROOT or f"{move.to}/".startswith(f"{move.node}/")
    checks.require(not inside, f"{name}: to", move.to, f"a place outside of {move.node!r}, which is not the root")
    checks.require(move.node not in places.departures, f"{name}: node", move.node, "a place that is not left before")
    moved = copy.deepcopy(nodes[move.node])
    head = moved.name if move.to == tree_sources.ROOT else f"{move.to}/{moved.name}"
    checks.require(head not in nodes, f"{name}: to", move.to, f"a federation that never had a member {moved.name!r}",
                   "nobody returns to a place; rename one of them")
    nodes[move.to].children.append(moved)
    places.arrivals[head], places.departures[move.node] = move.round, move.round
    for path in [path for path in nodes if f"{path}/".startswith(f"{move.node}/")]:
      new = head + path.removeprefix(move.node)
      places.before[new], places.since[new] = path, move.round
  return root, places
