"""Attention over parameters: how a node mixes its key layers with those of others.

Over layers (Iacob et al., arXiv:2405.14446):

  score_s = similarity(query, candidate_s) / temperature + log prior_s
  K_q <- sum_s softmax(score)_s K_s

Over updates (ours; D is what a node's own training changed in this round):

  beta_s = strength * relu(cos(D_q, D_s) - threshold),   step = D_q + sum_s beta_s D_s
  K_q <- K_q - D_q + step * min(1, cap * |D_q| / |step|)

so that a node keeps its whole own update and adds what agrees with it; with nothing relevant around,
it is exactly training alone. A mean of n updates that are not known one by one counts as all of them:
beta = strength * n * relu(<D_q, D_s> / |D_q|^2 - threshold), as if each of them were as long as D_q.

A tree of key layers has leaves `[M, ...]`; candidates have leaves `[S, M, ...]`. Scores and weights
have the axes `[T, S, M]`: T tensors of a block, S candidates, M layers. The granularity says which
of them are one unit: "layer" joins a block's tensors (T is 1), "all" joins the layers too (T and M
are 1), "tensor" takes each by itself.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from worldlm_jax import trees
from worldlm_jax.config import KeyLayerConfig

PyTree = Any


def parameter_scores(
  similarity: str, granularity: str, direction: PyTree, reference: PyTree | None, candidates: PyTree,
  mask_SxM: jax.Array,
) -> jax.Array:
  """Similarity of `direction` and each candidate's displacement from `reference`.

  Args:
    similarity: "scaled_dot" (inner product / sqrt(size)); every other name is a cosine.
    granularity: "layer", "tensor", "all" or "model".
    direction: the query, leaves `[M, ...]`. Where it is zero everywhere (a federation that did not
      train), the mean displacement of the candidates takes its place.
    reference: leaves `[M, ...]`, or None for the origin.
    candidates: leaves `[S, M, ...]`.
    mask_SxM: bool, which candidates are there.

  Returns:
    float32 `[T or 1, S, M or 1]`; a cosine with a zero vector is 0.
  """
  displacement = candidates if reference is None else jax.tree.map(lambda c, r: c - r[None], candidates, reference)
  displacement = _masked(displacement, mask_SxM)
  moves = jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(direction)]))
  direction = trees.where(moves, direction, _masked_mean(displacement, mask_SxM))
  product = _inner(direction, displacement, granularity)
  if similarity == "scaled_dot":
    return product / jnp.sqrt(_unit_sizes(direction, granularity))
  return cosine(product, _inner_self(jax.tree.map(lambda leaf: leaf[None], direction), granularity),
                 _inner_self(displacement, granularity))


def loss_scores(
  granularity: str, query: PyTree, candidates: PyTree, loss: Callable[[PyTree], jax.Array]
) -> jax.Array:
  """Minus the loss (nats per token) with each candidate's unit in the place of the query's own.

  One evaluation of `loss` per candidate and unit, one after the other. Returns `[T or 1, S, M or 1]`.
  """
  leaves = jax.tree.leaves(query)
  num_tensors, num_layers = len(leaves), leaves[0].shape[0]
  num_candidates = jax.tree.leaves(candidates)[0].shape[0]
  grid = np.arange(num_tensors * num_layers).reshape(num_tensors, num_layers)
  unit_TxM = {"tensor": grid, "layer": grid % num_layers}.get(granularity, 0 * grid)
  units = int(unit_TxM.max()) + 1

  def score(pair: jax.Array) -> jax.Array:
    candidate = trees.take(candidates, pair // units)
    chosen_TxM = jnp.asarray(unit_TxM) == pair % units
    swapped = jax.tree.unflatten(jax.tree.structure(query), [
      trees.where(chosen, theirs, own)
      for chosen, theirs, own in zip(chosen_TxM, jax.tree.leaves(candidate), leaves, strict=True)
    ])
    return -loss(swapped)

  scores_SxU = jax.lax.map(score, jnp.arange(num_candidates * units)).reshape(num_candidates, units)
  shape = {"tensor": (num_tensors, num_layers), "layer": (1, num_layers)}.get(granularity, (1, 1))
  return jnp.moveaxis(scores_SxU.reshape(num_candidates, *shape), 0, 1)


def attention_weights(
  scores_TxSxM: jax.Array, mask_SxM: jax.Array, prior_S: jax.Array, temperature: jax.Array
) -> jax.Array:
  """Softmax over the candidates that are there: float32 `[T, S, M]`, summing to one over S.

  Temperature inf with equal priors gives the plain mean; 0 gives everything to the highest score
  (the first of equals) without regard to the prior. All zero where no candidate is there.
  """
  mask = jnp.broadcast_to((mask_SxM & (prior_S > 0)[:, None])[None], (scores_TxSxM.shape[0], *mask_SxM.shape))
  scores_TxSxM = jnp.where(jnp.isnan(scores_TxSxM), -jnp.inf, scores_TxSxM)  # nobody prefers what it cannot judge
  scores = jnp.where(mask, scores_TxSxM, -jnp.inf)
  hard = jax.nn.one_hot(jnp.argmax(scores, axis=1), mask.shape[1], axis=1)
  log_prior_S = jnp.log(jnp.where(prior_S > 0, prior_S, 1.0))
  logits = scores_TxSxM / jnp.where(temperature == 0, 1.0, temperature) + log_prior_S[None, :, None]
  soft = jnp.where(mask, logits, -jnp.inf)
  highest = jnp.max(soft, axis=1, keepdims=True, initial=-jnp.inf, where=mask)
  soft = jnp.where(mask, jnp.exp(soft - jnp.where(jnp.isfinite(highest), highest, 0.0)), 0.0)
  total = jnp.sum(soft, axis=1, keepdims=True)
  soft = soft / jnp.where(total > 0, total, 1.0)
  return jnp.where(temperature == 0, jnp.where(mask, hard, 0.0), soft)


def mix(query: PyTree, candidates: PyTree, weights_TxSxM: jax.Array) -> PyTree:
  """`sum_s weight_s K_s`, leaves `[M, ...]`; the query itself where no weight is given at all.

  Candidates without weight add nothing, whatever they hold.
  """
  leaves, structure = jax.tree.flatten(query)
  weights = jnp.broadcast_to(weights_TxSxM, (len(leaves), *weights_TxSxM.shape[1:]))

  def one(w_SxM: jax.Array, own: jax.Array, theirs: jax.Array) -> jax.Array:
    w = _expand(w_SxM, own.ndim + 1)
    total = jnp.sum(w * jnp.where(w > 0, theirs, 0.0), axis=0)
    return jnp.where(_expand(jnp.sum(w_SxM, axis=0) > 0, own.ndim), total, own)

  mixed = [one(*leaf) for leaf in zip(weights, leaves, jax.tree.leaves(candidates), strict=True)]
  return jax.tree.unflatten(structure, mixed)


def update_coefficients(
  gram_TxMxCxC: jax.Array, mask_SxM: jax.Array, granularity: str, *, strength: float, threshold: float, norm_cap: float,
  means_S: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What the updates of others add to a node's own (the second equation above), from their inner products alone.

  Args:
    gram_TxMxCxC: float32, of the node's own update D_q, which comes first, and of S = C - 1 candidates.
    mask_SxM: bool, which candidates are there; what the table holds of the others does not count.
    granularity: the unit of cosines and norms.
    strength, threshold, norm_cap: lambda, the least cosine, and the largest norm in norms of D_q.
    means_S: float32, of how many updates a candidate is the mean; 0 for a single one, and None for all of them.

  Returns:
    The coefficients `[T, M, C]` of all updates in what is added to K_q (which already holds D_q), a sum of norm at
    most (1 + norm_cap) |D_q| per unit, and all zero where D_q is; the weights beta `[T, S, M]`; the cosines
    `[T, S, M]` of the candidates and D_q. T is 1 in the last two unless the granularity is "tensor".
  """
  there_MxC = jnp.concatenate([jnp.ones_like(mask_SxM[:1]), mask_SxM]).T
  gram_TxMxCxC = jnp.where(there_MxC[:, :, None] & there_MxC[:, None, :], gram_TxMxCxC, 0.0)
  squares_TxCxM = jnp.diagonal(gram_TxMxCxC, axis1=2, axis2=3).swapaxes(1, 2)
  own_squared = _per_unit(squares_TxCxM[:, :1], granularity)  # [T or 1, 1, M or 1]
  products = _per_unit(gram_TxMxCxC[:, :, 0, 1:].swapaxes(1, 2), granularity)
  cosines = cosine(products, own_squared, _per_unit(squares_TxCxM[:, 1:], granularity))
  cosines = jnp.broadcast_to(cosines, (own_squared.shape[0], *mask_SxM.shape))
  counts = (own_squared > 0) & mask_SxM[None]
  agreement = jax.nn.relu(cosines - threshold)
  if means_S is not None:
    share = products / jnp.where(own_squared > 0, own_squared, 1.0)
    of_means = means_S[None, :, None] * jax.nn.relu(share - threshold)
    agreement = jnp.where(means_S[None, :, None] > 0, of_means, agreement)
  weights = jnp.where(counts, strength * agreement, 0.0)
  step_TxMxC = jnp.concatenate([jnp.ones_like(weights[:, :1]), weights], axis=1).swapaxes(1, 2)
  step_TxMxC = jnp.broadcast_to(step_TxMxC, gram_TxMxCxC.shape[:3])
  step_squared_TxM = jnp.einsum("tmc,tmcd,tmd->tm", step_TxMxC, gram_TxMxCxC, step_TxMxC, precision="highest")
  step_squared = _per_unit(step_squared_TxM[:, None], granularity)
  ratio = norm_cap * jnp.sqrt(own_squared / jnp.where(step_squared > 0, step_squared, 1.0))
  scale = jnp.where((own_squared > 0) & (step_squared > 0), jnp.minimum(1.0, ratio), 1.0)
  own_C = jnp.arange(step_TxMxC.shape[2]) == 0
  return scale.swapaxes(1, 2) * step_TxMxC - own_C[None, None, :], weights, cosines


def added_parts(config: KeyLayerConfig, payload: str) -> tuple[str, ...]:
  """The parts of a node's model to which its parent adds what it has mixed for it.

  None where the node can do that itself, from how far the model that it is handed has moved.
  """
  if config.values == "layers" or (config.candidates == "everybody" and payload == "float32"):
    return ()
  return ("key_layers", "backbone") if config.granularity == "model" else ("key_layers",)


def cosine(product: jax.Array, a_squared: jax.Array, b_squared: jax.Array) -> jax.Array:
  """The cosine of vectors from their inner products; 0 with a zero vector."""
  norms = jnp.sqrt(a_squared) * jnp.sqrt(b_squared)
  return jnp.where(norms > 0, product / jnp.where(norms > 0, norms, 1.0), 0.0)


def _expand(x: jax.Array, ndim: int) -> jax.Array:
  return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def _masked(candidates: PyTree, mask_SxM: jax.Array) -> PyTree:
  """Zeroes what is not there, so that not even its NaNs count."""
  return jax.tree.map(lambda leaf: jnp.where(_expand(mask_SxM, leaf.ndim), leaf, 0.0), candidates)


def _masked_mean(candidates: PyTree, mask_SxM: jax.Array) -> PyTree:
  count_M = jnp.maximum(jnp.sum(mask_SxM, axis=0), 1)
  return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0) / _expand(count_M, leaf.ndim - 1), candidates)


def _inner(query: PyTree, candidates: PyTree, granularity: str) -> jax.Array:
  """Inner products per unit: `[T or 1, S, M or 1]`."""
  per_tensor = [
    jnp.sum((q[None] * c).reshape(*c.shape[:2], -1), axis=-1, dtype=jnp.float32)
    for q, c in zip(jax.tree.leaves(query), jax.tree.leaves(candidates), strict=True)
  ]
  return _per_unit(jnp.stack(per_tensor), granularity)


def _inner_self(candidates: PyTree, granularity: str) -> jax.Array:
  squares = [jnp.sum(jnp.square(c).reshape(*c.shape[:2], -1), axis=-1) for c in jax.tree.leaves(candidates)]
  return _per_unit(jnp.stack(squares), granularity)


def _per_unit(values_TxSxM: jax.Array, granularity: str) -> jax.Array:
  axes = {"tensor": (), "layer": (0,)}.get(granularity, (0, 2))
  return jnp.sum(values_TxSxM, axis=axes, keepdims=True)


def _unit_sizes(query: PyTree, granularity: str) -> jax.Array:
  sizes = [[[math.prod(leaf.shape[1:])] * leaf.shape[0]] for leaf in jax.tree.leaves(query)]
  return _per_unit(jnp.asarray(sizes, jnp.float32), granularity)
