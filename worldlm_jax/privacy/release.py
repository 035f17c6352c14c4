"""What leaves a node in the place of its update, and what a federation adds to its members' mean: pure functions.

  local     D~_q = clip(D_q) + z_q C_q n                                       n: standard normal in each value
  central   D~_q = clip(D_q),   mean_p = sum_c share_c D~_c + max_c(share_c z_c C_c) n
  clip(D)   = D min(1, C / |D|), or layer by layer with C / sqrt(number of layers)

Where the clip adapts (G. Andrew et al., arXiv:1905.03871), b being the share of what was clipped that was under it
already, and k the members that it is the mean over:

  b~ = b + z_b / (2 k) n,   C <- C exp(-rate (b~ - quantile))

A release is made where private text enters, at the end of a node's training, once; everybody else sees a node by its
releases from then on, and what they make of them costs nothing more.

Guarantees, to the rounding of float32: a clipped update has a norm of at most C, whatever it was before; one with a
value that is not finite is zero. Under "its text gives way to none, so its update to zero", D~ then has a sensitivity
of C and b one of 1/2. With C = inf and z = 0 nothing changes by a bit.

Functions are of one node where nothing else is said. Axes: C members, P federations, N nodes with ghosts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from worldlm_jax import partition, trees

NOISE, SHARE, MEAN, MEAN_SHARE, EXAMPLES = range(5)  # what a draw is for


class Guard(NamedTuple):
  """How the nodes of a level are protected; leaves `[N]`."""

  key: Any  # uint32 [2]: of all its draws, from the seed and its path (`jax.random.key_data`)
  clips: Any  # bool: whether its updates are clipped
  by_layer: Any  # bool
  noise: Any  # float32: noise multiplier of its own releases
  mean_noise: Any  # float32: noise multiplier that it asks of its federation's mean
  adapts: Any  # bool: its clip does, by its own updates
  adapts_mean: Any  # bool: of a federation, its members' clip does, by all of theirs
  quantile: Any  # float32
  quantile_noise: Any  # float32: noise multiplier
  quantile_rate: Any  # float32
  hands_down: Any  # bool: its parameters leave it, as a federation's do
  example_clip: Any  # float32
  example_noise: Any  # float32: noise multiplier
  example_batch: Any  # float32: how many examples a step has on average; 0 where examples are not protected


class Private(NamedTuple):
  """What a level has to keep for it; leaves `[N, ...]`."""

  withheld: trees.PyTree  # by part of the model: how much more than its release the node's update was, if `fresh`
  clip: jax.Array  # float32: of its own updates; of a federation without text, of its members'
  within: jax.Array  # float32: which share of its last update was under the clip
  draws: jax.Array  # int32: how often it has trained or merged; no draw is made twice


def clip(update: trees.PyTree, norm: jax.Array, by_layer: jax.Array) -> tuple[trees.PyTree, jax.Array]:
  """The update at a norm of at most `norm`, and the share of it that was there already: float32 scalar, 0 to 1.

  Args:
    update: by part of the model, as in `model.init`.
    norm: float32 scalar.
    by_layer: bool scalar: every block, the embedding, the final norm and the head by itself (then the share is that
      of the layers) or all at once.
  """
  squares: dict[str, jax.Array] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(update):
    unit, stacked = _unit(path)
    axes = tuple(range(int(stacked), leaf.ndim))
    squares[unit] = squares.get(unit, jnp.float32(0)) + jnp.sum(jnp.square(leaf), axis=axes)
  count = sum(value.size for value in squares.values())
  total = jnp.sqrt(sum((jnp.sum(value) for value in squares.values()), jnp.float32(0)))
  whole, each = _scale(total, norm), norm / jnp.sqrt(jnp.float32(max(count, 1)))
  scales = {unit: jnp.where(by_layer, _scale(jnp.sqrt(value), each), whole) for unit, value in squares.items()}
  under = sum((jnp.sum(scale >= 1) for scale in scales.values()), jnp.int32(0)) / max(count, 1)

  def scaled(path: tuple, leaf: jax.Array) -> jax.Array:
    scale = scales[_unit(path)[0]]
    scale = scale.reshape(scale.shape + (1,) * (leaf.ndim - scale.ndim))
    return jnp.where(jnp.isfinite(total) | jnp.isinf(norm), leaf * scale, 0.0)

  return jax.tree_util.tree_map_with_path(scaled, update), jnp.float32(under)


def _scale(size: jax.Array, norm: jax.Array) -> jax.Array:
  return jnp.where(size > norm, norm / jnp.where(size > 0, size, 1.0), 1.0)


def _unit(path: tuple) -> tuple[str, bool]:
  """The layer that a leaf belongs to, and whether its first axis goes over several of them."""
  names = [str(key.key) for key in path]
  stack = next((name for name in names if name in ("blocks", "key_layers")), None)
  return (stack, True) if stack else ("/".join(names), False)


def draw_key(guard: Guard, purpose: int, count: jax.Array) -> jax.Array:
  """The key of one draw of one node."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(guard.key), purpose), count)


def noise(key: jax.Array, like: trees.PyTree, deviation: Any) -> trees.PyTree:
  """Independent normal values of this standard deviation (float32 scalar) in the shapes of `like`."""
  leaves, structure = jax.tree.flatten(like)
  drawn = [
    deviation * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, jnp.float32) for i, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(structure, drawn)


def release(update: trees.PyTree, private: Private, guard: Guard) -> tuple[trees.PyTree, Private]:
  """What everybody else sees of the update that a node's training made, and what it keeps of that."""
  norm = jnp.where(guard.clips, private.clip, jnp.inf)
  clipped, within = clip(update, norm, guard.by_layer)
  deviation = jnp.where(guard.noise > 0, guard.noise * norm, 0.0)
  drawn = noise(draw_key(guard, NOISE, private.draws), update, deviation)
  released = jax.tree.map(lambda c, n: jnp.where(deviation > 0, c + n, c), clipped, drawn)
  moved = next_clip(draw_key(guard, SHARE, private.draws), private.clip, within, 1, guard)
  return released, Private(
    trees.subtract(update, released), jnp.where(guard.adapts, moved, private.clip), within, private.draws + 1
  )


def after_training(
  begun: Any, trained: Any, update: trees.PyTree, took_part: jax.Array, private: Private, guards: Guard,
  mesh: jax.sharding.Mesh,
) -> tuple[Any, trees.PyTree, Private]:
  """A level as it goes on once it has trained: its parameters, and what is released of its updates in their place.

  Args:
    begun, trained: parameters, leaves `[N, ...]`.
    update: by part that leaves its node; nothing where no update is protected.
    took_part: bool `[N]`; what is given for others is not to be used, but for their parameters.
    private, guards: `[N]`.
    mesh: where all of it lies.
  """
  if not private.withheld:
    return trained, update, private._replace(draws=private.draws + 1)
  # What a federation hands down to its members leaves it too, so it goes on from its release.
  gives_up = took_part & guards.hands_down & guards.clips & jnp.isfinite(private.clip)
  released, private = partition.per_device(jax.vmap(release), mesh)(update, private, guards)
  params = {part: trees.where(gives_up, trees.add(begun[part], released[part]), trained[part]) for part in released}
  nothing = trees.zeros_like(private.withheld)
  return trained | params, released, private._replace(withheld=trees.where(gives_up, nothing, private.withheld))


def next_clip(key: jax.Array, norm: jax.Array, share: jax.Array, members: Any, guard: Guard) -> jax.Array:
  """The clip after an update of which this share was under it, the mean over so many members: float32 scalar."""
  noisy = share + guard.quantile_noise / (2 * jnp.maximum(members, 1)) * jax.random.normal(key)
  return norm * jnp.exp(-guard.quantile_rate * (noisy - guard.quantile))


def mean_noise(
  like: trees.PyTree, shares_CxP: jax.Array, clip_C: jax.Array, guards: Guard, members: Guard, private: Private
) -> trees.PyTree:
  """What federations add to the weighted means of their members: leaves `[N, ...]`.

  Args:
    like: the shapes, leaves `[N, ...]`.
    shares_CxP: what each member counts in the mean.
    clip_C: the norm that the members' updates have at most.
    guards, private: of the federations, `[N]`.
    members: of the members, `[C]`.
  """
  asked_CxP = shares_CxP * jnp.where(members.mean_noise > 0, members.mean_noise * clip_C, 0.0)[:, None]
  deviation_N = jnp.pad(jnp.max(asked_CxP, axis=0), (0, len(guards.key) - shares_CxP.shape[1]))

  def one(guard: Guard, count: jax.Array, like: trees.PyTree, deviation: jax.Array) -> trees.PyTree:
    return noise(draw_key(guard, MEAN, count), like, deviation)

  return jax.vmap(one)(guards, private.draws, like, deviation_N)


def merged(
  private: Private, guards: Guard, members: Guard, within_C: jax.Array, shares_CxP: jax.Array, parent_C: jax.Array
) -> Private:
  """The federations after a merge: where their members' clip adapts, it has moved. Leaves `[N]`.

  `within_C` is what was under the clip of the members' updates, `shares_CxP` says who counted, and where. Members that
  are not clipped do not tell.
  """
  counts_C = members.clips & jnp.any(shares_CxP > 0, axis=1)
  size = len(guards.key)
  members_N = jax.ops.segment_sum(jnp.float32(counts_C), parent_C, size)
  share_N = jax.ops.segment_sum(jnp.where(counts_C, within_C, 0.0), parent_C, size) / jnp.maximum(members_N, 1)

  def one(guard: Guard, count: jax.Array, norm: jax.Array, share: jax.Array, members: jax.Array) -> jax.Array:
    moved = next_clip(draw_key(guard, MEAN_SHARE, count), norm, share, members, guard)
    return jnp.where(guard.adapts_mean & (members > 0), moved, norm)

  norm_N = jax.vmap(one)(guards, private.draws, private.clip, share_N, members_N)
  return private._replace(clip=norm_N, draws=private.draws + 1)
