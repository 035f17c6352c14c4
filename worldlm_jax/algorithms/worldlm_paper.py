"""WorldLM to the letter: scaled dot-product attention over whole layers, key layers that are personal from the start.

A. Iacob, L. Sani, B. Marino, P. Aleksandrov, W. F. Shen, N. D. Lane, "Worldwide Federated Training of Language
Models", arXiv:2405.14446.

  K_q <- softmax(K_q . K_s / sqrt(d)) K_s   over the memory, both down and up;   B_p <- mean_c B_c

`worldlm` with these choices; the schedule is the config's own, since the number of tokens depends on it.
"""

import copy
import dataclasses
import math

from worldlm_jax.algorithms.worldlm import arrange, has_key_layers, make, shares
from worldlm_jax.config import Config

__all__ = ["adapt", "arrange", "has_key_layers", "make", "shares"]


def adapt(config: Config) -> Config:
  """The config with the paper's choices in the place of its own."""
  config = copy.copy(config)
  config.inner_text = "before"
  config.key_layers = dataclasses.replace(
    config.key_layers, values="layers", similarity="scaled_dot", granularity="layer", prior="uniform"
  )
  config.node = dataclasses.replace(
    config.node, down_temperature=1.0, up_temperature=1.0, backbone_independence=0.0, key_layer_independence=math.inf,
    trust="full",
  )
  return config
