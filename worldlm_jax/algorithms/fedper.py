"""FedPer: the backbone is averaged, the key layers never leave their node.

M. G. Arivazhagan, V. Aggarwal, A. K. Singh, S. Choudhary, "Federated Learning with Personalization Layers",
arXiv:1912.00818. The paper has one server; here every federation of the tree averages its members, as in HierFAVG.

  B_p <- server_optimizer(B_p, sum_c share_c (B_c - B_p)),   K_q <- K_q
"""

from worldlm_jax import model
from worldlm_jax.algorithms.rules import Algorithm, KeptKeyLayers, averaged
from worldlm_jax.config import Config
from worldlm_jax.federation import Federation, as_given

arrange, has_key_layers = as_given, True
shares = ("backbone",)


def make(config: Config, arch: model.Architecture, federation: Federation) -> Algorithm:
  """The pair of rules."""
  return Algorithm(averaged(config.backbone), KeptKeyLayers(), shares=shares, weights=config.backbone.weights)
