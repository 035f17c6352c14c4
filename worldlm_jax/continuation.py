"""Many prompts continued by one model, side by side, where `generation` shows one to a person as it grows.

Shape suffixes: B prompts of a batch, T tokens of a piece, S drawn tokens, V vocabulary, D width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldlm_jax import generation, model, rngs

DRAWN_AT_ONCE = 16  # tokens, before it is looked whether they end a continuation


def continue_all(
  arch: model.Architecture, params: model.Params, prompts: Sequence[Sequence[int]], num_ids: int, *, max_tokens: int,
  ended: Callable[[Sequence[int]], bool], sampling: generation.Sampling, tokens_at_once: int, seed: int = 0,
) -> list[list[int]]:
  """What the model adds to each prompt, as ids.

  Args:
    arch: the architecture.
    params: of one node; best on the device.
    prompts: ids, at least one each.
    num_ids: ids from here on are never drawn.
    max_tokens: that are added at most.
    ended: whether what was added is complete, its last token included.
    sampling: how tokens are drawn.
    tokens_at_once: roughly, how many tokens the caches of a batch have room for.
    seed: of all draws; they depend on the place in the list and in the text alone.
  """
  key = rngs.key(seed, "continuation")
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)  # those of about one length together
  added: list[list[int]] = [[] for _ in prompts]
  while order:
    length = _padded(len(prompts[order[0]]))
    room = _padded(length + max_tokens + DRAWN_AT_ONCE)
    size = max(1, tokens_at_once // room)
    batch, order = order[:size], order[size:]
    piece_BxT, starts_B = np.zeros((size, length), np.int32), np.ones(size, np.int32)
    for row, i in enumerate(batch):
      starts_B[row] = len(prompts[i])
      piece_BxT[row, : starts_B[row]] = prompts[i]
    keys_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.resize(np.array(batch, np.uint32), size))
    cache = model.empty_cache(arch, size, room)
    tokens_B, cache = _begin(arch, params, cache, piece_BxT, starts_B, num_ids, sampling, keys_B)
    drawn_BxS = np.asarray(tokens_B)[:, None]
    open_rows = dict(enumerate(batch))
    while True:
      for row, i in list(open_rows.items()):
        for token in drawn_BxS[row]:
          added[i].append(int(token))
          if len(added[i]) == max_tokens or ended(added[i]):
            del open_rows[row]
            break
      if not open_rows:
        break
      drawn, cache = _go_on(arch, params, cache, drawn_BxS[:, -1], starts_B, num_ids, sampling, keys_B)
      drawn_BxS, starts_B = np.asarray(drawn), starts_B + DRAWN_AT_ONCE
  return added


def _draw(arch: model.Architecture, params: model.Params, hidden_BxD: jax.Array, places_B: jax.Array, num_ids: Any,
          sampling: generation.Sampling, keys_B: jax.Array) -> jax.Array:
  """The tokens that come to stand at `places_B`."""
  logits_BxV = model.logits(arch, params, hidden_BxD)
  logits_BxV = jnp.where(jnp.arange(arch.vocab_size)[None, :] < num_ids, logits_BxV, -jnp.inf)
  keys_B = jax.vmap(jax.random.fold_in)(keys_B, places_B)
  return jax.vmap(generation.draw, (0, None, 0))(logits_BxV, sampling, keys_B)


@functools.partial(jax.jit, static_argnames="arch", donate_argnames="cache")
def _begin(
  arch: model.Architecture, params: model.Params, cache: model.Cache, piece_BxT: Any, starts_B: Any, num_ids: Any,
  sampling: generation.Sampling, keys_B: jax.Array,
) -> tuple[jax.Array, model.Cache]:
  """The tokens after prompts of `starts_B` tokens each: int32 `[B]`."""
  hidden_BxTxD, cache = model.extend(arch, params, piece_BxT, cache, jnp.zeros_like(starts_B))
  hidden_BxD = jnp.take_along_axis(hidden_BxTxD, (starts_B - 1)[:, None, None], axis=1)[:, 0]
  return _draw(arch, params, hidden_BxD, starts_B, num_ids, sampling, keys_B), cache


@functools.partial(jax.jit, static_argnames="arch", donate_argnames="cache")
def _go_on(
  arch: model.Architecture, params: model.Params, cache: model.Cache, tokens_B: Any, starts_B: Any, num_ids: Any,
  sampling: generation.Sampling, keys_B: jax.Array,
) -> tuple[jax.Array, model.Cache]:
  """The tokens after `tokens_B`, which stand at `starts_B`: int32 `[B, DRAWN_AT_ONCE]`."""

  def step(carried: tuple[jax.Array, model.Cache], step: jax.Array) -> tuple[tuple[jax.Array, model.Cache], jax.Array]:
    tokens_B, cache = carried
    places_B = starts_B + step
    hidden_BxTxD, cache = model.extend(arch, params, tokens_B[:, None], cache, places_B)
    tokens_B = _draw(arch, params, hidden_BxTxD[:, 0], places_B + 1, num_ids, sampling, keys_B)
    return (tokens_B, cache), tokens_B

  (_, cache), drawn_SxB = jax.lax.scan(step, (jnp.asarray(tokens_B), cache), jnp.arange(DRAWN_AT_ONCE))
  return drawn_SxB.T, cache


def _padded(length: int) -> int:
  return max(generation.SHORTEST, 1 << (length - 1).bit_length())
