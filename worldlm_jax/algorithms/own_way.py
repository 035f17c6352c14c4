"""What nodes that may go their own way need to know: how relevant others are, and how far everybody has moved.

Functions of stacked nodes, leaves `[N, ...]`.
"""

import jax
import jax.numpy as jnp

from worldlm_jax import links, trees
from worldlm_jax.exchange import relevance as relevance_lib
from worldlm_jax.state import LevelState, Topology, news


def relevance(
  level: LevelState, above: LevelState, topology: Topology, wanted: jax.Array, text_share: jax.Array
) -> jax.Array:
  """The relevance of all nodes, `[N]`, after those `wanted` have been measured whose first update is news."""
  measured = wanted & level.fresh & (level.relevance == relevance_lib.UNKNOWN)

  def measure() -> jax.Array:
    begun_from = trees.subtract(level.params, level.update)
    parents = links.take_parents(above.params, topology.parent, topology.num_parents, topology.mesh)
    return relevance_lib.relevance(level.update, trees.subtract(parents, begun_from), text_share)

  found = jax.lax.cond(jnp.any(measured), measure, lambda: level.relevance)
  return jnp.where(measured, found, level.relevance)


def movement(before: LevelState, after: LevelState, topology: Topology, active: jax.Array) -> trees.PyTree:
  """Updates as a down-phase leaves them: of federations, how far their models have moved since their members' last one.

  Those below compare their own updates with it (`attend_updates.py`); it is no news to anybody else. Where nobody is
  below, they stay what they are. At the root, which nothing is handed down to, `after` is `before` itself.
  """
  if not topology.children_mask.any():
    return before.update
  moved = news(before)
  if after is not before:
    parts = ({part: level.params[part] for part in moved} for level in (after, before))
    moved = trees.add(moved, trees.subtract(*parts))
  return trees.where(active, moved, before.update)
