"""WorldLM against what one would do otherwise, on artificial languages whose entropy is known. No download.

  python -m worldlm_jax.compare --config=configs/compare_synthetic.py --workdir=DIR
  python -m worldlm_jax.compare --config=configs/compare_synthetic.py --workdir=DIR \\
      --config.base.federation.synthetic.train_bytes=20000 --config.base.federation.synthetic.imbalance=1.2

Machine: 2 CPU cores, half a minute a run. Expect DIR/comparison.md, with what is left above the entropy of each
language; docs/results.md has ours. The second command gives the six languages texts of 20 kB down to 2 kB.
"""

from worldlm_jax import config as c, model


def get_config() -> c.Comparison:
  base = c.Config(
    rounds=20,
    federation=c.FederationConfig(synthetic=c.SyntheticTree(branching=(2, 3), train_bytes=150_000)),
    node=c.NodeSettings(local_steps=40, batch_size=4, learning_rate=8e-3, warmup_steps=20),
    model=model.PRESETS["nano"](),
    data=c.DataConfig(sequence_length=64),
    evaluation=c.EvaluationConfig(valid_windows=32, test_windows=128, acceptance_windows=32, personalised="best"),
    checkpoint=c.CheckpointConfig(every_rounds=20, keep_last=1, keep_best=0),
    logging=c.LoggingConfig(tensorboard=False),
  )
  return c.Comparison(base, [
    c.Entry("local", {"algorithm": "local"}),
    c.Entry("centralized", {"algorithm": "centralized"}),
    c.Entry("fedavg", {"algorithm": "fedavg"}),
    c.Entry("fedavg_larger_steps", {"algorithm": "fedavg", "backbone.server_learning_rate": 1.3}),
    c.Entry("hierfavg", {"algorithm": "hierfavg", "rounds": 10, "node.rounds_per_parent_round": 2}),
    c.Entry("fedper", {"algorithm": "fedper"}),
    c.Entry("worldlm_paper", {"algorithm": "worldlm_paper"}),
    c.Entry("worldlm", {"algorithm": "worldlm"}),
  ])
