"""Edges that carry fewer bits than float32 (`exchange/payload.py`): what each end knows of the other.

  up     D^_q = C(D_q + E_q)        E_q <- D_q + E_q - D^_q       others see D^_q, and in q's parameters it, for D_q
  down   H_q <- H_q + C(P - H_q)                                  q's parent is H_q to q; its parent knows that too
         K_q <- K_q + C(A_q + F_q)  F_q <- A_q + F_q - C(...)     A_q: what the parent adds for q (attention)

C is rounding. What a node keeps for itself is not rounded. As P - H_q holds what has not arrived of all that was handed
down before, the way down needs no error of its own. Functions of stacked nodes, leaves `[N, ...]`; with float32 all of
them give back what is there.
"""

import functools

import jax

from worldlm_jax import links, trees
from worldlm_jax.exchange import payload
from worldlm_jax.state import LevelState, Topology


def as_known(level: LevelState, kind: str) -> LevelState:
  """The level as everybody else knows it once it has sent its updates, and with the errors that remain then.

  Where updates are protected, that is by what has been released of them (`privacy/release.py`), before any rounding.
  Where a node's update is no news, nothing is sent and no error is used. Pure, so that each phase that looks at the
  level between two of its down-phases sees the same.
  """
  if level.private is not None:
    withheld = trees.where(level.fresh, level.private.withheld, trees.zeros_like(level.private.withheld))
    level = level._replace(
      params=level.params | {part: trees.subtract(level.params[part], withheld[part]) for part in withheld}
    )
  if kind == "float32":
    return level
  before = {part: level.errors[part] for part in level.update}
  sent = jax.vmap(functools.partial(payload.transmit, kind=kind))(level.update, before)
  arrived, errors = trees.where(level.fresh, sent, (level.update, before))
  params = {part: trees.add(trees.subtract(level.params[part], level.update[part]), arrived[part]) for part in arrived}
  return level._replace(params=level.params | params, update=arrived, errors=level.errors | errors)


def handed(level: LevelState, above: LevelState, topology: Topology, kind: str) -> trees.PyTree:
  """What the nodes hold of their parents' models once these have been handed down again; None with float32."""
  if kind == "float32":
    return None
  parents = {part: links.take_parents(above.params[part], topology.parent, topology.num_parents, topology.mesh)
             for part in level.handed}
  missing = trees.subtract(parents, level.handed)
  arrived, _ = jax.vmap(functools.partial(payload.transmit, kind=kind))(missing, trees.zeros_like(missing))
  return trees.add(level.handed, arrived)


def added(
  own: trees.PyTree, addition: trees.PyTree, error: trees.PyTree, kind: str
) -> tuple[trees.PyTree, trees.PyTree]:
  """A node's own layers with what arrives of their parents' additions, and the errors that remain."""
  arrived, error = jax.vmap(functools.partial(payload.transmit, kind=kind))(addition, error)
  return trees.add(own, arrived), error
