"""Training alone: nothing is exchanged, every node with text has a model of its own.

  B_q <- B_q,   K_q <- K_q
"""

from worldlm_jax import model
from worldlm_jax.algorithms.rules import KEPT_BACKBONE, Algorithm, KeptKeyLayers
from worldlm_jax.config import Config
from worldlm_jax.federation import Federation, as_given

arrange, has_key_layers = as_given, False
shares = ()


def make(config: Config, arch: model.Architecture, federation: Federation) -> Algorithm:
  """The pair of rules."""
  return Algorithm(KEPT_BACKBONE, KeptKeyLayers(), shares=shares)
