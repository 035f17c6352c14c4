"""What each part of WorldLM is worth: every entry changes one choice, on one's own folder tree of texts.

  python -m worldlm_jax.compare --config=configs/ablations.py --workdir=DIR --config.base.federation.folder=PATH

Machine: 2 CPU cores, a minute a run with ten nodes; one seed by default (--config.seeds=0,1,2). Expect
DIR/comparison.md; docs/results.md has ours. The tree can be made not to fit the texts, too:

  --config.base.federation.swap.nodes="'law/eu','code/python'" --config.base.federation.swap.share=0.5
"""

import math

from worldlm_jax import config as c, model


def get_config() -> c.Comparison:
  base = c.Config(
    rounds=20,
    node=c.NodeSettings(local_steps=40, batch_size=4, learning_rate=8e-3, warmup_steps=20),
    model=model.PRESETS["nano"](),
    data=c.DataConfig(sequence_length=64),
    evaluation=c.EvaluationConfig(valid_windows=32, test_windows=128, acceptance_windows=32, personalised="best"),
    checkpoint=c.CheckpointConfig(every_rounds=20, keep_last=1, keep_best=0),
    logging=c.LoggingConfig(tensorboard=False),
  )
  # Attention over layers is seen where the key layers are a node's own from the start.
  layers = {
    "key_layers.values": "layers", "key_layers.granularity": "layer", "node.key_layer_independence": math.inf,
  }

  def temperature(value: float) -> dict[str, float]:
    return {"node.down_temperature": value, "node.up_temperature": value}

  entries = {
    "worldlm": {},
    "local": {"algorithm": "local"},
    "worldlm_paper": {"algorithm": "worldlm_paper"},
    "no_attention": {"key_layers.update_strength": 0.0},
    "siblings": {"key_layers.candidates": "siblings", "key_layers.update_threshold": 0.1},
    "siblings_too": {"key_layers.candidates": "both", "key_layers.update_threshold": 0.1},
    "key_layers_attend": {"key_layers.granularity": "all"},
    "each_layer_attends": {"key_layers.granularity": "layer"},
    "no_residuals": {"key_layers.residuals_per_layer": 0},
    "key_layers_own": {"node.key_layer_independence": math.inf},
    "backbone_shared": {"node.backbone_independence": 0.0},
    "all_shared": {"node.backbone_independence": 0.0, "node.key_layer_independence": 0.0},
    "independence_1": {"node.backbone_independence": 1.0, "node.key_layer_independence": 1.0},
    "independence_9": {"node.backbone_independence": 9.0, "node.key_layer_independence": 9.0},
    "key_layers_first": {"node.key_layer_independence": 30.0},
    "full_trust": {"node.trust": "full"},
    "inner_text_before": {"inner_text": "before"},
    "share_0": {"model.key_layer_share": 0.0},
    "share_67": {"model.key_layer_share": 0.67},
    "share_100": {"model.key_layer_share": 1.0},
    "weights_uniform": {"backbone.weights": "uniform"},
    "server_nesterov": {"backbone.server_optimizer": "nesterov", "backbone.server_learning_rate": 0.7},
    "moments_reset": {"optimizer.moments": "reset"},
    "acceptance": {"node.acceptance": "validated"},
    "sequential": {"schedule": "sequential"},
    "layers_param_cosine": layers | {"key_layers.similarity": "param_cosine"},
    "layers_scaled_dot": layers | {"key_layers.similarity": "scaled_dot"},
    "layers_centered_cosine": layers | {"key_layers.similarity": "centered_cosine"},
    "layers_update_cosine": layers | {"key_layers.similarity": "update_cosine"},
    "layers_validation_loss": layers | {"key_layers.similarity": "validation_loss"},
    "layers_mean": layers | {"key_layers.similarity": "param_cosine"} | temperature(math.inf),
    "layers_temperature_1": layers | {"key_layers.similarity": "centered_cosine"} | temperature(1.0),
    # FedAMP (Huang et al., arXiv:2007.03797) mixes whole models by how alike they are.
    "fedamp": layers | {"key_layers.similarity": "centered_cosine", "model.key_layer_share": 1.0},
    "fedprox": {"algorithm": "fedavg", "optimizer.proximal": 0.01},
  }
  return c.Comparison(base, [c.Entry(name, overrides) for name, overrides in entries.items()], seeds=(0,))
