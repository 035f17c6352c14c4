"""Centralised training: one model on everybody's text, as if it could be pooled.

It trains on the very windows that the nodes would train on, evenly mixed, in steps of a node's size; so it makes as
many steps as all nodes together. In the last round the nodes make their own steps from its model of the round
before, so that it has a personalised score too (see `federation.pooled`).

  B_q <- B_pool,   B_pool never changes but by training
"""

from worldlm_jax import model
from worldlm_jax.algorithms.rules import Algorithm, BackboneRule, KeptKeyLayers, take_over
from worldlm_jax.config import Config
from worldlm_jax.federation import Federation, pooled

arrange, has_key_layers = pooled, False
shares = ()


def make(config: Config, arch: model.Architecture, federation: Federation) -> Algorithm:
  """The pair of rules."""
  handed_out = BackboneRule(take_over, lambda own, server, *members: (own, server))
  return Algorithm(handed_out, KeptKeyLayers(), shares=shares)
