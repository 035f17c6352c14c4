"""Arithmetic on layers as plain lists of flat float64 arrays: slow, and nothing to get wrong. For the oracle."""

from typing import Any

import jax
import numpy as np

Layers = list[list[np.ndarray]]  # key layers as [tensor][layer], each flat and float64


def softmax(scores: np.ndarray, prior: list[float] | None, temperature: float) -> np.ndarray:
  """Weights `[S]` of the scores; without priors all count the same."""
  prior_S = np.ones(len(scores)) if prior is None else np.asarray(prior, np.float64)
  if not prior_S.any():
    return prior_S
  scores = np.where(prior_S > 0, scores, -np.inf)
  if temperature == 0:
    return np.eye(len(scores))[np.argmax(scores)]
  logits = scores / temperature if np.isfinite(temperature) else np.where(prior_S > 0, 0.0, -np.inf)
  weights = prior_S * np.exp(logits - logits.max())
  return weights / weights.sum()


def layer(layers: Layers, i: int) -> list[np.ndarray]:
  """The tensors of layer i."""
  return [tensor[i] for tensor in layers]


def displacement(layer: list[np.ndarray], origin: Layers | None, i: int) -> list[np.ndarray]:
  """How far the i-th layer is from that of `origin`; None means zero."""
  return layer if origin is None else [t - tensor[i] for t, tensor in zip(layer, origin, strict=True)]


def combine(terms: list[Layers], factors: list[float]) -> Layers:
  """The sum of the terms, each times its factor."""
  return [
    [np.sum([f * term[t][i] for f, term in zip(factors, terms, strict=True)], axis=0) for i in range(len(tensor))]
    for t, tensor in enumerate(terms[0])
  ]


def units(granularity: str, num_tensors: int, num_layers: int) -> list[list[tuple[int, int]]]:
  """What attention treats as one: lists of (tensor, layer)."""
  tensors, layers = range(num_tensors), range(num_layers)
  return {
    "layer": [[(t, i) for t in tensors] for i in layers],
    "tensor": [[(t, i)] for t in tensors for i in layers],
  }.get(granularity, [[(t, i) for t in tensors for i in layers]])


def scaled(layers: Layers, factor: float) -> Layers:
  """All of it times the factor."""
  return [[factor * layer for layer in tensor] for tensor in layers]


def minus(a: Any, b: Any) -> Any:
  """a - b in float64."""
  return np.float64(a) - np.float64(b)


def weighted(like: Any, trees: list[Any], factors: list[float]) -> Any:
  """The sum of trees of the same shapes as `like`, each times its factor, in float64."""

  def add(own: Any, *theirs: Any) -> Any:
    return sum((f * np.float64(t) for f, t in zip(factors, theirs, strict=True)), np.zeros(np.shape(own)))

  return jax.tree.map(add, like, *trees)


def zeros(tree: Any) -> Any:
  """Zeros of the same shapes."""
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape), tree)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
  """The cosine of two vectors; 0 with a zero vector."""
  norms = float(np.linalg.norm(a) * np.linalg.norm(b))
  return float(a @ b) / norms if norms else 0.0


def flat(tree: Any) -> np.ndarray:
  """All of a tree's numbers in one vector."""
  return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def unflattened(vector: np.ndarray, like: Any) -> Any:
  """The inverse of `flat`, in the shapes of `like`."""
  leaves, structure = jax.tree.flatten(like)
  ends = np.cumsum([np.size(leaf) for leaf in leaves])
  return jax.tree.unflatten(structure, [
    piece.reshape(np.shape(leaf)) for piece, leaf in zip(np.split(vector, ends[:-1]), leaves, strict=True)
  ])
