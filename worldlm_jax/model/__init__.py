"""The language model: pure `init` and `apply` over `{"backbone", "key_layers"}`; Flax NNX stays inside."""

from worldlm_jax.model.presets import PRESETS
from worldlm_jax.model.transformer import (
  Architecture,
  Cache,
  Params,
  abstract_params,
  apply,
  architecture,
  empty_cache,
  extend,
  init,
  logits,
  loss_sum,
  num_targets,
  token_scores,
)

__all__ = ["PRESETS", "Architecture", "Cache", "Params", "abstract_params", "apply", "architecture", "empty_cache",
           "extend", "init", "logits", "loss_sum", "num_targets", "token_scores"]
