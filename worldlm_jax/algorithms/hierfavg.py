"""HierFAVG: FedAvg at every federation of the tree, one model for all.

L. Liu, J. Zhang, S. H. Song, K. B. Letaief, "Client-Edge-Cloud Hierarchical Federated Learning", arXiv:1905.06641.

  B_p <- server_optimizer(B_p, sum_c share_c (B_c - B_p))   at every federation p, `rounds_per_parent_round` times
                                                            (the paper's kappa_2) for each time at p's parent
"""

from worldlm_jax import model
from worldlm_jax.algorithms.rules import Algorithm, KeptKeyLayers, averaged
from worldlm_jax.config import Config
from worldlm_jax.federation import Federation, as_given

arrange, has_key_layers = as_given, False
shares = ("backbone",)


def make(config: Config, arch: model.Architecture, federation: Federation) -> Algorithm:
  """The pair of rules."""
  return Algorithm(averaged(config.backbone), KeptKeyLayers(), shares=shares, weights=config.backbone.weights)
