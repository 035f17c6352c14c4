"""FedAvg: one server, every node with text its client, one model for all.

H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", arXiv:1602.05629.

  B <- server_optimizer(B, sum_c share_c (B_c - B)),   share_c by the tokens that client c trained on

`config.backbone` makes it FedAvgM and FedAdam (S. J. Reddi et al., arXiv:2003.00295) or DiLoCo's outer Nesterov
momentum (A. Douillard et al., arXiv:2311.08105); `config.optimizer.proximal` makes it FedProx (T. Li et al.,
arXiv:1812.06127). A given tree is flattened; inner nodes with text become clients like the leaves.
"""

from worldlm_jax import model
from worldlm_jax.algorithms.rules import Algorithm, KeptKeyLayers, averaged
from worldlm_jax.config import Config
from worldlm_jax.federation import Federation, flattened

arrange, has_key_layers = flattened, False
shares = ("backbone",)


def make(config: Config, arch: model.Architecture, federation: Federation) -> Algorithm:
  """The pair of rules."""
  return Algorithm(averaged(config.backbone), KeptKeyLayers(), shares=shares, weights=config.backbone.weights)
