"""What a wave of nodes finds out about its models once it has trained, on the nodes' own validation batches.

Functions of stacked nodes `[w]`, spread over the devices of a mesh; windows int32 `[w, E, W]`, of which `counts` are
there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from worldlm_jax import model, partition, scoring
from worldlm_jax.exchange import trust as trust_lib
from worldlm_jax.federation import Federation
from worldlm_jax.governance import Governance
from worldlm_jax.state import Topology


def may_trust(federation: Federation, level: int, topology: Topology, governance: Governance | None) -> np.ndarray:
  """Which nodes of a level may use models between its parent's and its own: bool `[n]`.

  Not those that may not see all of their parents' models, nor federations that keep something on top of them.
  """
  found = np.array([m.settings.trust == "validated" for m in federation.levels[level]])
  if topology.permissions is not None and governance is not None:
    found &= np.all([takes[: len(found)] for takes in topology.permissions.takes.values()], axis=0)
    found &= not governance.keeps(level)
  return found


def trust(
  arch: model.Architecture, mesh: jax.sharding.Mesh, before: jax.Array, own: model.Params, parents: model.Params,
  windows: jax.Array, counts: jax.Array, settles: jax.Array,
) -> jax.Array:
  """The trust of nodes, float32 `[w]`: as before but for those that settle."""

  def one(own: model.Params, parents: model.Params, windows_ExW: jax.Array, count: jax.Array) -> jax.Array:
    loss = functools.partial(scoring.mean_loss, arch, windows_ExW=windows_ExW, count=count)
    return trust_lib.validated(loss, own, parents)

  best = partition.per_device(jax.vmap(one), mesh)(own, parents, windows, counts)
  return jnp.where(settles, best, before)


def gain(
  arch: model.Architecture, mesh: jax.sharding.Mesh, shares: tuple[str, ...], before: jax.Array, own: model.Params,
  parents: model.Params, windows: jax.Array, counts: jax.Array, measured: jax.Array,
) -> jax.Array:
  """How much lower, in nats per token, the loss of nodes' own models is than that of their parents', float32 `[w]`.

  What does not cross the edge (is not in `shares`) is the node's own in both. A loss that is not finite is no gain.
  """
  parents = own | {part: parents[part] for part in shares}

  def one(own: model.Params, parents: model.Params, windows_ExW: jax.Array, count: jax.Array) -> jax.Array:
    theirs, mine = (
      scoring.mean_loss(arch, params, windows_ExW=windows_ExW, count=count) for params in (parents, own)
    )
    return theirs - mine

  found = partition.per_device(jax.vmap(one), mesh)(own, parents, windows, counts)
  return jnp.where(measured, jnp.where(jnp.isnan(found), -jnp.inf, found), before)
