"""The node x corpus matrix: each entry is what its model makes of its text."""

import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldlm_jax import matrix, model
from worldlm_jax.data.windows import Windows, evenly_spaced


def test_every_model_is_scored_on_every_text(rounds: Any) -> None:
  tree = rounds.node("world", rounds.node("a", rounds.node("p"), rounds.node("q"), data=False), rounds.node("b"))
  config = rounds.tiny_config(tree)
  config.nodes_at_once = 2
  harness, generator = rounds.Harness(config), np.random.default_rng(0)
  vary = lambda leaf: leaf + generator.normal(0, 0.1, leaf.shape).astype(np.float32)
  harness.state = tuple(own._replace(params=jax.tree.map(vary, own.params)) for own in harness.state)
  texts = {}
  for path, size in ((".", 200), ("b", 99), ("a/p", 31), ("a/q", 640)):
    starts = np.arange(0, size, 13) if path.startswith("a") else None  # windows of whole documents, and of a stream
    texts[path] = types.SimpleNamespace(test=Windows(generator.integers(0, rounds.vocab, size), 7, starts))
  found = matrix.score(harness.engine, harness.state, types.SimpleNamespace(here=texts, held=texts), 5)
  assert found["models"] == [".", "a", "a/p", "a/q", "b"]
  assert found["corpora"] == [".", "a/p", "a/q", "b"]
  loss = jax.jit(model.loss_sum, static_argnums=0)
  for name, row in zip(found["models"], found["perplexity"], strict=True):
    for corpus, perplexity in zip(found["corpora"], row, strict=True):
      windows = texts[corpus].test
      chosen = jnp.array([windows[int(i)] for i in evenly_spaced(windows, 5)])
      everything = jnp.ones(len(chosen), bool)
      sum_nats = loss(harness.arch, harness.params()[name], chosen, everything)
      assert perplexity == pytest.approx(math.exp(sum_nats / model.num_targets(chosen, everything)), rel=1e-5)
  assert len(np.unique(np.round(found["perplexity"], 6))) == 20  # no two are the same by mistake
