"""What governance leaves of an exchange: the one place where the rules of nodes act on what the phases see.

`rules.down` and `rules.up` hand everything through here before any rule of the algorithm sees it: parents' models,
siblings' updates, members' weights, residual layers. Where no node has rules (`Topology.permissions` is None), each
function gives back what it is given, and nothing more is computed. Functions of stacked nodes, leaves `[N, ...]`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldlm_jax import trees
from worldlm_jax.exchange import backbone as backbone_lib, caps
from worldlm_jax.state import LevelState, Topology


class Shares(NamedTuple):
  """What members count in their federations' sums of one part: float32 `[C, P]` each."""

  mean: jax.Array  # for the federation's own model; what is missing to 1 counts as no change
  travels: jax.Array | None  # for what it sends on, if that is not the same
  stays: jax.Array | None  # of `mean`, what is in no mean above

  @property
  def sums(self) -> tuple[jax.Array, ...]:
    """One or three sums."""
    return (self.mean,) if self.travels is None or self.stays is None else (self.mean, self.travels, self.stays)


def admitted(level: LevelState, topology: Topology) -> LevelState:
  """The level without news from nodes that are not as good as their federations want them (`quality_floor`)."""
  joins = joining(level, topology)
  if joins is None:
    return level
  return level._replace(fresh=level.fresh & joins, weight=jnp.where(joins, level.weight, 0.0))


def joining(level: LevelState, topology: Topology) -> jax.Array | None:
  """Which nodes are good enough for their federations, bool `[N]`; None where nobody asks."""
  if topology.permissions is None or level.gain is None:
    return None
  return level.gain >= topology.permissions.least_gain


def takes(topology: Topology, part: str, who: jax.Array) -> jax.Array:
  """Of those who would take their parents' part of the model (bool `[N]`), the ones that may."""
  return who if topology.permissions is None else who & topology.permissions.takes[part]


def parents(level: LevelState, topology: Topology, part: str, arrived: trees.PyTree) -> trees.PyTree:
  """Parents' part of the model as nodes may see it: with what they keep on top of it, or their own in its place."""
  if topology.permissions is None:
    return arrived
  if level.kept and part in level.kept:
    arrived = trees.add(arrived, level.kept[part])
  may = topology.permissions.takes[part]
  return arrived if may.all() else trees.where(jnp.asarray(may), arrived, level.params[part])


def handed(level: LevelState, topology: Topology, arrived: trees.PyTree) -> trees.PyTree:
  """What nodes hold of their parents' models, by part; nothing new arrives at those that may not take it."""
  if topology.permissions is None or arrived is None:
    return arrived
  may = topology.permissions.takes
  return {part: trees.where(jnp.asarray(may[part]), new, level.handed[part]) for part, new in arrived.items()}


def siblings(topology: Topology) -> np.ndarray:
  """Which siblings' updates a node may look at: bool `[N, S]`."""
  return topology.siblings_mask if topology.permissions is None else (
    topology.siblings_mask & topology.permissions.attends)


def parent_counts(topology: Topology, trained: jax.Array) -> jax.Array:
  """Which nodes may look at what their parents learned: from their own text where these trained (bool `[N]`), else from
  everybody's."""
  if topology.permissions is None:
    return jnp.ones_like(trained)
  return jnp.where(trained, topology.permissions.attends_parent, topology.permissions.attends_everybody)


def residuals(topology: Topology, eligible_NxP: jax.Array, origin_PxM: jax.Array) -> jax.Array:
  """Who may get which residual layer: bool `[N, P]` by where it is, then bool `[N, P, M]` by whose it is as well."""
  if topology.permissions is None:
    return eligible_NxP[:, :, None]
  return eligible_NxP[:, :, None] & jnp.asarray(topology.permissions.receives)[:, jnp.maximum(origin_PxM, 0)]


def merges(topology_below: Topology, part: str, weight: jax.Array) -> jax.Array:
  """The weights of members, float32 `[C]`, without those that do not enter their federations' means."""
  permissions = topology_below.permissions
  if permissions is None or permissions.merges[part].all():
    return weight
  return jnp.where(permissions.merges[part], weight, 0.0)


def members(topology_below: Topology, takes_part: jax.Array, below: LevelState) -> jax.Array:
  """Of the members that take part (bool `[C]`), those whose key layers their federations may look at."""
  if topology_below.permissions is None or "key_layers" not in topology_below.permissions.merges:
    return takes_part
  joins = joining(below, topology_below)
  takes_part = takes_part & topology_below.permissions.merges["key_layers"]
  return takes_part if joins is None else takes_part & joins


def offered(topology_below: Topology, there: jax.Array) -> jax.Array:
  """Of the members whose layers are there (bool `[C]`), those that may become residual layers."""
  return there if topology_below.permissions is None else there & topology_below.permissions.offers


def shares(
  topology: Topology, topology_below: Topology, part: str, weight: jax.Array, own_weight: jax.Array
) -> Shares:
  """What members count, from their weights float32 `[C]` and those of the federations' own training, `[P]`."""
  below = topology_below.permissions
  number, parent = topology_below.num_parents, jnp.asarray(topology_below.parent)

  def capped(weight: jax.Array) -> jax.Array:
    found = backbone_lib.shares(parent, weight, own_weight, number)
    cap = caps_of(topology)
    if cap is None:
      return found
    trained = jnp.any(found > 0, axis=0) & (own_weight[:number] > 0)
    return caps.capped(found, jnp.where(trained, 1 - jnp.sum(found, axis=0), 0.0), cap[:number])

  mean = capped(merges(topology_below, part, weight))
  if below is None or not splits(below.merges[part], below.travels[part], below.stays[part]):
    return Shares(mean, None, None)
  travels = capped(jnp.where(below.travels[part], weight, 0.0))
  return Shares(mean, travels, jnp.where(below.stays[part][:, None], mean, 0.0))


def caps_of(topology: Topology) -> jax.Array | None:
  """The largest weight of any member of each federation, float32 `[N]`; None where there is no limit."""
  if topology.permissions is None or (topology.permissions.cap >= 1).all():
    return None
  return jnp.asarray(topology.permissions.cap)


def splits(merges: np.ndarray, travels: np.ndarray, stays: np.ndarray) -> bool:
  """Whether what federations send on is not what they merge."""
  return bool((merges != travels).any() or stays.any())


def travelling(topology_below: Topology, weight: jax.Array) -> jax.Array:
  """The weights of members of whom some part is in what their federations send on: float32 `[C]`."""
  if topology_below.permissions is None:
    return weight
  goes_on = np.any(list(topology_below.permissions.travels.values()), axis=0)
  return weight if goes_on.all() else jnp.where(goes_on, weight, 0.0)


def keep(level: LevelState, part: str, stays: trees.PyTree) -> Mapping[str, trees.PyTree] | None:
  """What federations keep, with what has been added to it; `stays` is None where nothing has."""
  if level.kept is None or part not in level.kept or stays is None:
    return level.kept
  return level.kept | {part: trees.add(level.kept[part], stays)}
