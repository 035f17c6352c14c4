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


def combine(terms: list[Layers], factors: list[float]) -> Layers:
  """The sum of the terms, each times its factor."""
  return [
    [np.sum([f * term[t][i] for f, term in zip(factors, terms, strict=True)], axis=0) for i in range(len(tensor))]
    for t, tensor in enumerate(terms[0])
  ]


def scaled(layers: Layers, factor: float) -> Layers:
  """All of it times the factor."""
  return [[factor * layer for layer in tensor] for tensor in layers]


def minus(a: Any, b: Any) -> Any:
  """a - b in float64."""
  return np.float64(a) - np.float64(b)


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
