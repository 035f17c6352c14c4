"""Partners that fail: in every round 30 % of the nodes are lost, half of them after they have trained.

  python -m worldlm_jax.main --config=configs/unreliable.py --workdir=runs/unreliable
  python -m worldlm_jax.main --config=configs/unreliable.py --workdir=runs/reliable \
    --config.node.loss_before=0.0 --config.node.loss_after=0.0

Machine: 2 CPU cores, a few minutes each. Two families of three artificial languages. Expect a mean
personalised test perplexity of 2.62 and of 2.56: within 5 % (docs/results.md). In
metrics.jsonl, `turnout` says what happened to a node in a round, and in summary.json how often in all.
"""

from worldlm_jax import config as c, model


def get_config() -> c.Config:
  tree = c.SyntheticTree(branching=(2, 3), divergence=0.3, train_bytes=60_000, eval_bytes=15_000)
  return c.Config(
    rounds=40,
    federation=c.FederationConfig(synthetic=tree),
    node=c.NodeSettings(
      local_steps=25, batch_size=4, learning_rate=6e-3, warmup_steps=20,
      loss_before=0.16, loss_after=0.167,  # 1 - (1 - 0.16)(1 - 0.167) = 0.3
    ),
    model=model.PRESETS["nano"](),
    data=c.DataConfig(sequence_length=64),
    evaluation=c.EvaluationConfig(valid_windows=16, test_windows=100, matrix_windows=0),
  )
