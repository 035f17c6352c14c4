"""Scores: loss in nats per token, perplexity and bits per byte, from sums and counts that merge."""

import math
from typing import NamedTuple

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
  return model.loss_sum(arch, params, windows_ExW, rows_E) / jnp.maximum(count * (windows_ExW.shape[1] - 1), 1)


def score_level(
  arch: model.Architecture, mesh: jax.sharding.Mesh, batch_size: int,
  params: model.Params, windows_NxExW: jax.Array, count_N: jax.Array,
) -> jax.Array:
  """Summed loss of each node of a level on its own windows: float32 `[N]`.

  Args:
    arch: the architecture.
    mesh: whose node axis divides N.
    batch_size: windows per forward pass; E must be a multiple of it.
    params: leaves `[N, ...]`.
    windows_NxExW: int32 windows; of node n only the first `count_N[n]` count, and only they are computed.
    count_N: int32.
  """

  def score_node(node: tuple) -> jax.Array:
    params, windows_ExW, count = node

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
      part_BxW = jax.lax.dynamic_slice_in_dim(windows_ExW, i * batch_size, batch_size)
      rows_B = i * batch_size + jnp.arange(batch_size) < count
      return total + model.loss_sum(arch, params, part_BxW, rows_B)

    return jax.lax.fori_loop(0, -(-count // batch_size), add, jnp.float32(0))

  def score_share(*share: jax.Array) -> jax.Array:
    return jax.lax.map(score_node, share)

  return partition.per_device(score_share, mesh)(params, windows_NxExW, count_N)
