"""A family tree of artificial languages, of which the lowest possible loss is known exactly.

  python -m worldlm_jax.main --config=configs/synthetic.py --workdir=runs/synthetic \
    --config.federation.synthetic.divergence=0.1

Machine: 2 CPU cores, about three minutes. Two families of three languages, of which the smallest has 0.4 times
the text of the largest. Expect a mean of 1.39 bits per byte, personalised, where the floors of the six languages
are between 1.07 and 1.17 (`floor` in summary.json); `divergence` says how
different relatives are, from 0 (all speak the same) to 1 (no more alike than strangers), `imbalance` how
different their amounts of text, `branching` which tree they form.
"""

from worldlm_jax import config as c, model


def get_config() -> c.Config:
  tree = c.SyntheticTree(branching=(2, 3), divergence=0.3, train_bytes=200_000, imbalance=0.5, eval_bytes=30_000)
  return c.Config(
    rounds=12,
    federation=c.FederationConfig(synthetic=tree),
    node=c.NodeSettings(local_steps=25, batch_size=8, learning_rate=3e-3, warmup_steps=20),
    model=model.PRESETS["tiny"](),
    evaluation=c.EvaluationConfig(valid_windows=32, test_windows=200),
  )
