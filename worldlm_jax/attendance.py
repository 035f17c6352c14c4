"""Who takes part in which round: partners that are not asked, lost, slow, or not there yet, as a real run meets them.

All of it is simulated from the settings of the nodes, and drawn from (seed, node, round of its federation) alone. So it
is the same on any devices and after any interruption, and no checkpoint has to hold it. In each of its rounds, a
federation

  asks        `member_share` of the members that are free, at most `member_count`, drawn anew
  loses       some of them before they train (`loss_before`), others once they have (`loss_after`)
  waits       for `deadline_seconds`. A member whose training takes longer, by its `step_seconds`, goes on with it and
              takes no part meanwhile; so many deadlines later its update comes in after all, and counts
              `late_weight` times less for each round that it is late. With a weight of 0 it is discarded instead.
  has quorum  if `quorum` of those asked are in time; otherwise it keeps its state, and what has come in is void

What has not come in has never been: nobody else sees that update either. A member that is a federation takes with it
all below. A federation takes as long as its own training and its rounds, each of these as long as the slowest member's
or until the deadline. The root is never lost, and where one node trains for all (`Federation.is_pooled`) nobody is.
"""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from worldlm_jax import rngs
from worldlm_jax.federation import Federation, Member

# What can happen to a member in a round, as records call it.
NOT_ASKED, LOST_BEFORE, LOST_AFTER, LATE, MERGED_LATE, VOID, NO_MEMBER = (
  "not_asked", "lost_before_training", "lost_after_training", "late", "merged_late", "no_quorum", "no_member"
)


class Turnout(NamedTuple):
  """One round of one federation, by the paths of its members."""

  there: frozenset[str]  # who receives and trains
  arrived: Mapping[str, float]  # whose updates come in, and what they count: 1 in time, less if late
  happened: Mapping[str, str]  # what else was the matter, by member
  rounds_late: Mapping[str, int]  # of updates that are late, when it shows and when they come in


class Everybody:
  """The turnout of all members but those that are `absent` throughout; no draws.

  In a given round of the root these are the members of then; without one, whoever ever is a member.
  """

  def __init__(self, federation: Federation, absent: Collection[str] = ()):
    self._federation, self.absent = federation, absent

  def next(self, path: str, round_index: int | None) -> Turnout:
    """The next round of a federation, in a round of the root."""
    members = [c for c in self._federation.members_of[path] if is_member(c, round_index)]
    there = frozenset(c.path for c in members if c.path not in self.absent)
    return Turnout(there, dict.fromkeys(there, 1.0), {}, {})

  def is_heard(self, path: str) -> bool:
    """Whether the node's last update has come in at its federation, in that one's last round."""
    return True


class _Now(NamedTuple):
  """Where a federation stands between two of its rounds."""

  round: int  # the number of its next one
  heard: Mapping[str, float]  # whose update came in in its last one
  working: Mapping[str, tuple[int, int]]  # of late members: the round in which they began, and that in which they end


class Attendance(Everybody):
  """The turnout as the nodes' settings have it; each federation's rounds have to be asked for in their order.

  Args:
    seed: of the run.
    federation: the tree.
    absent: nodes that are lost before training in any case; may be changed between rounds.
  """

  def __init__(self, seed: int, federation: Federation, absent: Collection[str] = ()):
    super().__init__(federation, absent)
    self._seed, self._now = seed, dict[str, _Now]()

  def next(self, path: str, round_index: int | None) -> Turnout:
    """The next round of a federation, in a round of the root."""
    head, now = self._federation.by_path[path].settings, self._now.get(path, _Now(0, {}, {}))
    n, happened, late_by = now.round, dict[str, str](), dict[str, int]()
    children = self._federation.members_of[path]
    members = [c for c in children if is_member(c, round_index)]
    happened |= {c.path: NO_MEMBER for c in children if c not in members}
    working = {c.path: now.working[c.path] for c in members if c.path in now.working}
    free = [c for c in members if c.path not in working]
    order = sorted(free, key=lambda c: (self._draw("asked", c, n), c.path))
    count = max(1, math.ceil(head.member_share * len(free) - 1e-9))
    asked = order[: min(count, head.member_count or count)]
    happened |= {c.path: NOT_ASKED for c in free if c not in asked}
    there, arrived = [], dict[str, float]()
    for c in asked:
      if c.path in self.absent or self._draw("lost before", c, n) < c.settings.loss_before:
        happened[c.path] = LOST_BEFORE
        continue
      there.append(c.path)
      rounds_late = self._rounds_late(c, n, head.deadline_seconds)
      if self._draw("lost after", c, n) < c.settings.loss_after:
        happened[c.path] = LOST_AFTER
      elif not rounds_late:
        arrived[c.path] = 1.0
      else:
        happened[c.path], late_by[c.path] = LATE, rounds_late
        if head.late_weight:
          working[c.path] = n, n + rounds_late
    void = len(arrived) < head.quorum * len(asked) - 1e-9
    for late, (began, ends) in working.items():
      if began < n:
        late_by[late] = n - began
        happened[late] = MERGED_LATE if ends == n else LATE
      if ends == n:
        arrived[late] = head.late_weight ** (n - began)
    if void:
      happened |= dict.fromkeys(arrived, VOID)
      arrived = {}
    self._now[path] = _Now(n + 1, arrived, {p: ends for p, ends in working.items() if ends[1] > n})
    return Turnout(frozenset(there), arrived, happened, late_by)

  def is_heard(self, path: str) -> bool:
    """Whether the node's last update has come in at its federation, in that one's last round."""
    parent = self._federation.by_path[path].parent
    return parent in self._now and path in self._now[parent].heard

  def _draw(self, purpose: str, member: Member, n: int) -> float:
    """A number in [0, 1) that depends on nothing but these."""
    return rngs.stable_int(self._seed, purpose, member.path, n) / 2**31

  def _rounds_late(self, member: Member, n: int, deadline: float) -> int:
    """How many rounds after this one the member is done."""
    if math.isinf(deadline):
      return 0
    seconds, spread = self._seconds(member), member.settings.step_seconds_spread
    if spread:
      generator = np.random.default_rng(rngs.stable_int(self._seed, "seconds", member.path, n))
      seconds *= math.exp(spread * generator.standard_normal())
    return max(0, math.ceil(seconds / deadline) - 1)

  def _seconds(self, member: Member) -> float:
    """What a round takes a member, variation aside."""
    settings = member.settings
    slowest = max((self._seconds(c) for c in self._federation.members_of[member.path]), default=0.0)
    own = member.trains * settings.local_steps * settings.step_seconds
    return own + settings.rounds_per_parent_round * min(slowest, settings.deadline_seconds)


def is_member(member: Member, round_index: int | None) -> bool:
  """Whether a node belongs to its federation in a round of the root; in some round or other if None."""
  settings = member.settings
  if round_index is None:
    return True
  return settings.joins_round <= round_index and not 0 < settings.leaves_round <= round_index


def has_data(member: Member, round_index: int | None) -> bool:
  """Whether a node still has what it ever had to train on in a round of the root; before it lost it if None."""
  return round_index is None or not 0 < member.settings.loses_data_round <= round_index
