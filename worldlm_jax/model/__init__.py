"""The language model: pure `init` and `apply` over `{"backbone", "key_layers"}`; Flax NNX stays inside."""

from worldlm_jax.model.presets import PRESETS
from worldlm_jax.model.transformer import (
  Architecture,
  Params,
  abstract_params,
  apply,
  architecture,
  init,
  loss_sum,
  num_targets,
  token_scores,
)

__all__ = ["PRESETS", "Architecture", "Params", "abstract_params", "apply", "architecture", "init", "loss_sum",
           "num_targets", "token_scores"]
