"""How likely one model finds given texts: many short ones at a time, compiled for a few lengths only.

Shape suffixes: B sequences of a batch, T tokens that a window predicts, W = T + 1.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldlm_jax import model, partition
from worldlm_jax.data.windows import PADDING

SHORTEST = 32  # predicted tokens; the other padded lengths are its doubles, and the longest that is asked for


class Likelihood(NamedTuple):
  """Of a text, given what stands before it."""

  log_probability: float  # nats
  greedy: bool  # whether each of its tokens is the likeliest where it stands


class Scorer:
  """The likelihoods of sequences under one model, on all devices of this process.

  Args:
    arch: the architecture.
    params: of one node.
    length: how many tokens a window predicts at most: what the model was trained with.
    tokens_at_once: roughly, how many tokens are predicted at a time on each device.
    say: is told how far it is; see `progress`.
  """

  def __init__(
    self, arch: model.Architecture, params: model.Params, length: int, tokens_at_once: int,
    say: Callable[[int, int], None] = lambda done, of: None,
  ):
    self.length, self._tokens_at_once, self._say = length, tokens_at_once, say
    self._mesh = partition.make_mesh(jax.local_devices())
    self._params = partition.replicate(params, self._mesh)
    self._score = _compiled(arch, self._mesh)

  def score(self, sequences: Sequence[tuple[np.ndarray, int]]) -> list[Likelihood]:
    """The likelihood of each sequence's tokens from place `first` on, given those before them.

    Args:
      sequences: (int tokens `[n]`, `first`), 1 <= first <= n. What does not fit into one window is scored in several,
        each token once: windows of `length` predicted tokens, each beginning with the last token of the one before,
        and a last one that sees as much before it as fits. What fits is not cut: what stands before it may be, at its
        beginning.

    Returns:
      As many likelihoods; of no tokens, 0 and True.
    """
    parts = [
      (len(part) - 1, i, part, skipped)
      for i, (tokens, first) in enumerate(sequences) for part, skipped in _windows(tokens, first, self.length)
    ]
    parts.sort(key=lambda part: part[0], reverse=True)  # the longest first: what does not fit fails at once
    log_probabilities, greedy = np.zeros(len(sequences)), np.ones(len(sequences), bool)
    done = 0
    while done < len(parts):
      length = _padded_length(parts[done][0], self.length)
      size = self._mesh.size * max(1, self._tokens_at_once // length)
      batch = [part for part in parts[done : done + size] if _padded_length(part[0], self.length) == length]
      windows_BxW = np.full((size, length + 1), PADDING, np.int32)
      skipped_B = np.zeros(size, np.int32)
      for row, (targets, _, part, skipped) in enumerate(batch):
        windows_BxW[row, : targets + 1], skipped_B[row] = part, skipped
      scores_B, greedy_B = jax.device_get(self._score(self._params, windows_BxW, skipped_B))
      for row, (_, i, _, _) in enumerate(batch):
        log_probabilities[i] += float(scores_B[row])
        greedy[i] &= bool(greedy_B[row])
      done += len(batch)
      self._say(done, len(parts))
    return [Likelihood(*found) for found in zip(log_probabilities.tolist(), greedy.tolist(), strict=True)]


def _windows(tokens: np.ndarray, first: int, length: int) -> Iterator[tuple[np.ndarray, int]]:
  """Windows of at most `length` predicted tokens, and how many of each one's are only there to be seen."""
  for begin in range(first, len(tokens), length):
    end = min(begin + length, len(tokens))
    start = max(0, end - 1 - length)
    yield tokens[start:end], begin - start - 1


def _padded_length(length: int, longest: int) -> int:
  padded = SHORTEST
  while padded < length:
    padded *= 2
  return min(padded, longest)


@functools.cache
def _compiled(arch: model.Architecture, mesh: jax.sharding.Mesh) -> Any:
  """Summed log-probability and greediness of each window's tokens but the first `skipped` predicted ones."""

  def score(params: model.Params, windows_BxW: jax.Array, skipped_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    scores_BxT, likeliest_BxT = model.token_scores(arch, params, windows_BxW)
    counted_BxT = jnp.arange(scores_BxT.shape[1])[None, :] >= skipped_B[:, None]
    return jnp.sum(scores_BxT, axis=1, where=counted_BxT), jnp.all(likeliest_BxT, axis=1, where=counted_BxT)

  return jax.jit(partition.on_rows(score, mesh))
