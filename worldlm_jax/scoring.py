"""Scores: loss in nats per token, perplexity and bits per byte, from sums and counts that merge."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from worldlm_jax import model, partition


class Score(NamedTuple):
  """A summed loss and the number of tokens it was summed over; `merge` is associative, `Score()` neutral."""

  loss_sum_nats: float = 0.0
  tokens: int = 0

  def merge(self, other: "Score") -> "Score":
    """The score of both texts together."""
    return Score(self.loss_sum_nats + other.loss_sum_nats, self.tokens + other.tokens)

  @property
  def loss_nats(self) -> float:
    """Mean loss in nats per token; nan without tokens."""
    return self.loss_sum_nats / self.tokens if self.tokens else math.nan

  @property
  def perplexity(self) -> float:
    """exp of the mean loss; inf where that overflows."""
    return math.exp(self.loss_nats) if not self.loss_nats > 700 else math.inf

  def bits_per_byte(self, bytes_per_token: float) -> float:
    """Bits per byte of the text, which compares across tokenizers."""
    return self.loss_nats / math.log(2) / bytes_per_token


def mean_loss(arch: model.Architecture, params: model.Params, windows_ExW: jax.Array, count: jax.Array) -> jax.Array:
  """Mean loss in nats per token over the first `count` windows, all in one batch: float32 scalar."""
  rows_E = jnp.arange(windows_ExW.shape[0]) < count
  return model.loss_sum(arch, params, windows_ExW, rows_E) / jnp.maximum(model.num_targets(windows_ExW, rows_E), 1)


def score_nodes(
  arch: model.Architecture, mesh: jax.sharding.Mesh, params: model.Params, windows_NxBxW: jax.Array, count_N: jax.Array
) -> jax.Array:
  """Summed loss of each node on one batch of its own windows: float32 `[N]`.

  Args:
    arch: the architecture.
    mesh: whose node axis divides N.
    params: leaves `[N, ...]`.
    windows_NxBxW: int32 windows, of which the first `count_N[n]` count.
    count_N: int32.
  """

  def score_share(*share: Any) -> jax.Array:
    def one(params: model.Params, windows_BxW: jax.Array, count: jax.Array) -> jax.Array:
      return model.loss_sum(arch, params, windows_BxW, jnp.arange(windows_BxW.shape[0]) < count)

    return jax.vmap(one)(*share)

  return partition.per_device(score_share, mesh)(params, windows_NxBxW, count_N)
