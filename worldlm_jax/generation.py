"""Text out of a model: a prompt is continued token by token, with a cache of what stands before.

Shapes: T tokens of a piece, V vocabulary.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldlm_jax import checks, model, rngs
from worldlm_jax.data.tokenizer import Tokenizer

SHORTEST = 16  # a prompt is filled up to this many tokens, or a power of two, so that few lengths are compiled
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Sampling(NamedTuple):
  """How the next token is drawn: first among the `top_k` likeliest, then by `top_p`."""

  temperature: float = 0.8  # 0: always the likeliest
  top_k: int = 0  # only so many; 0: all
  top_p: float = 1.0  # only the likeliest that have this probability together, at least one


def check(sampling: Sampling, max_tokens: int) -> None:
  """Raises `InputError` at a number that makes no sense."""
  checks.require(0 <= sampling.temperature < float("inf"), "--temperature", sampling.temperature,
                 "a finite number, at least 0")
  checks.require(sampling.top_k >= 0, "--top_k", sampling.top_k, "a number of tokens", "0 takes all")
  checks.require(0 < sampling.top_p <= 1, "--top_p", sampling.top_p, "more than 0 and at most 1", "1 takes all")
  checks.require(max_tokens > 0, "--max_tokens", max_tokens, "at least 1")


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
  """A prompt as models know the beginning of a document: after the separator."""
  return [tokenizer.separator_id, *map(int, tokenizer.encode(prompt))]


def tokens(
  arch: model.Architecture, params: model.Params, prompt: Sequence[int], num_ids: int, *,
  sampling: Sampling = Sampling(), max_tokens: int = 200, seed: int = 0,  # noqa: B008 (immutable)
) -> Iterator[int]:
  """The tokens that follow a prompt, as they are drawn.

  Two programs are compiled, one for the prompt's padded length and one for the tokens after it; neither again for
  another prompt of about that length, or another model of the same architecture.

  Args:
    arch: the architecture.
    params: of one node; best on the device.
    prompt: ids, at least one.
    num_ids: ids from here on are never drawn: the tokenizer has none, although the model may.
    sampling: how to draw.
    max_tokens: how many.
    seed: of all draws; those of a place are the same for every model.
  """
  key, length = rngs.key(seed, "generation"), len(prompt)
  piece = np.zeros((1, _padded(length)), np.int32)
  piece[0, :length] = prompt
  cache = model.empty_cache(arch, 1, _padded(length + max_tokens))
  start, last = 0, length - 1
  for _ in range(max_tokens):
    drawn, cache = _next(arch, params, cache, piece, np.int32(start), np.int32(last), num_ids, sampling, key)
    start, last, piece = start + last + 1, 0, drawn[None, None]
    yield int(drawn)


def until(ids: Iterable[int], end: int) -> Iterator[int]:
  """Those before the first `end`, such as a separator."""
  return itertools.takewhile(lambda token: token != end, ids)


def text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
  """The text of tokens after a prompt, in pieces, as it becomes certain: characters are not shown in halves."""
  seen, shown = list(prompt), len(tokenizer.decode(prompt))
  for token in ids:
    seen.append(token)
    so_far = tokenizer.decode(seen)
    certain = len(so_far) - so_far.endswith(REPLACEMENT)
    if certain > shown:
      yield so_far[shown:certain]
      shown = certain
  if rest := tokenizer.decode(seen)[shown:]:
    yield rest


def draw(logits_V: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
  """A token by its logits: int32 scalar. The numbers of `sampling` may be traced."""
  order_V = jnp.argsort(-logits_V.astype(jnp.float32))  # among equals the first
  sorted_V = logits_V.astype(jnp.float32)[order_V]
  rank_V = jnp.arange(len(order_V))
  greedy = sampling.temperature == 0
  scaled_V = (sorted_V - sorted_V[0]) / jnp.where(greedy, 1, sampling.temperature)
  scaled_V = jnp.where((sampling.top_k == 0) | (rank_V < sampling.top_k), scaled_V, -jnp.inf)
  probability_V = jax.nn.softmax(scaled_V)
  before_V = jnp.cumsum(probability_V) - probability_V
  scaled_V = jnp.where((rank_V == 0) | (before_V < sampling.top_p), scaled_V, -jnp.inf)
  return order_V[jnp.where(greedy, 0, jax.random.categorical(key, scaled_V))].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="arch", donate_argnames="cache")
def _next(
  arch: model.Architecture, params: model.Params, cache: model.Cache, piece_1xT: Any, start: Any, last: Any,
  num_ids: Any, sampling: Sampling, key: jax.Array,
) -> tuple[jax.Array, model.Cache]:
  """The token after place `last` of a piece that stands at `start`."""
  hidden_1xTxD, cache = model.extend(arch, params, piece_1xT, cache, start[None])
  logits_V = model.logits(arch, params, hidden_1xTxD[0, last])
  logits_V = jnp.where(jnp.arange(arch.vocab_size) < num_ids, logits_V, -jnp.inf)
  return draw(logits_V, sampling, jax.random.fold_in(key, start + last)), cache


def _padded(length: int) -> int:
  return max(SHORTEST, 1 << (length - 1).bit_length())
