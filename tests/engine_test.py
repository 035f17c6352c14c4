"""Law 6: the vectorised engine equals the plain Python loop over nodes; and the same on 8 devices."""

import pytest

from worldlm_jax import schedule


def ragged(rounds, **root):
  """Three levels, ragged, data at the root and at one inner node, unequal steps and batches."""
  node = rounds.node
  return node(
    "world",
    node("a", node("p"), node("q", local_steps=3, batch_size=3), node("r", learning_rate=0.02), data=False,
         rounds_per_parent_round=2),
    node("b", node("s"), node("t", local_steps=1, weight_decay=0.0)),
    node("c", clip_norm=0.1),
    **root,
  )


def check_against_oracle(rounds, config, num_rounds=2, absent=(), atol=2e-5):
  harness = rounds.run(config, num_rounds, absent=absent)
  oracle = harness.oracle()
  index = 0
  for stage in schedule.stages(harness.federation, config.schedule):
    for _ in range(num_rounds):
      oracle.round(index, stage, absent[index] if index < len(absent) else ())
      index += 1
  for path, params in harness.params().items():
    rounds.assert_trees_close(params, oracle.params(path), atol, f"node {path}: ")


@pytest.mark.parametrize("key_layers", [
  {"values": "layers", "similarity": "param_cosine"},
  {"values": "layers", "similarity": "scaled_dot", "granularity": "tensor"},
  {"values": "layers", "similarity": "centered_cosine", "prior": "tokens"},
  {"values": "layers", "similarity": "update_cosine", "granularity": "all", "residuals_per_layer": 2},
  {"values": "layers", "similarity": "validation_loss", "residuals_received": 2},
  {"values": "updates", "update_threshold": -0.2},
  {"values": "updates", "granularity": "tensor", "update_norm_cap": 0.7, "residuals_per_layer": 2},
  {"values": "updates", "granularity": "all", "residuals_per_layer": 0},
], ids=lambda options: " ".join(map(str, options.values())))
def test_engine_equals_the_loop(rounds, key_layers):
  check_against_oracle(rounds, rounds.tiny_config(ragged(rounds), **key_layers))
