"""Continuing windows with a cache: the same hidden states as of whole windows, however they are cut."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldlm_jax import config as config_lib, model

V, SEPARATOR = 23, 5


def _architecture(**changes) -> model.Architecture:
  config = config_lib.ModelConfig(num_layers=3, d_model=24, num_heads=6, num_kv_heads=2, d_ff=29, key_layer_share=0.34)
  return dataclasses.replace(model.architecture(config, V), **changes)


@pytest.mark.parametrize(
  "changes", [{}, {"document_separator": SEPARATOR, "num_key_layers": 0, "tied_head": False, "num_kv_heads": 6}],
  ids=str,
)
def test_windows_in_pieces_give_what_whole_windows_give(changes) -> None:
  """Each window goes on from where it is, after pieces of other lengths; what was put there in vain does not matter."""
  arch = _architecture(**changes)
  params = model.init(arch, jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, V, (2, 13))
  tokens[0, [4, 9]], tokens[1, [0, 8]] = SEPARATOR, SEPARATOR
  expected = model.apply(arch, params, jnp.asarray(tokens))
  assert expected.shape == (2, 13, V)
  extend = jax.jit(lambda tokens, cache, start: model.extend(arch, params, tokens, cache, start))
  cache, found = model.empty_cache(arch, 2, 18), np.full(expected.shape, np.nan)
  start = np.zeros(2, np.int32)
  for lengths in ((5, 3), (1, 1), (5, 2), (2, 5), (0, 2)):
    piece = np.full((2, 5 if max(lengths) > 1 else 1), SEPARATOR)  # padded: two programs for all pieces
    for row, length in enumerate(lengths):
      piece[row, :length] = tokens[row, start[row] : start[row] + length]
    hidden, cache = extend(piece, cache, start)
    for row, length in enumerate(lengths):
      found[row, start[row] : start[row] + length] = model.logits(arch, params, hidden)[row, :length]
    start += np.array(lengths, np.int32)
  assert list(start) == [13, 13]
  np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
