"""WorldLM against what one would do otherwise, on one's own folder tree of texts.

  python -m worldlm_jax.compare --config=configs/compare_folder.py --workdir=DIR \\
      --config.base.federation.folder=PATH [--node=law/eu.max_train_bytes=20000] [--only=local,fedavg,worldlm]

Machine: 2 CPU cores. With ten nodes a run takes about a minute, so that all entries and seeds take half an hour; the
same command in a second terminal shares the work. Expect DIR/comparison.md; docs/results.md has ours.

`--config=configs/compare_folder.py:2` lets HierFAVG's federations run two rounds for each of the root; all entries
then still train on equally many tokens as long as only leaves have text.

A model of 45 thousand parameters, small enough that every entry can be trained three times on a laptop. Each node's
personalised model is that of the round in which its validation loss was lowest, for all entries alike.
"""

from worldlm_jax import config as c, model

ROUNDS = 20


def get_config(kappa: str = "1") -> c.Comparison:
  """`kappa`: rounds that HierFAVG's federations run for each round of the root, a divisor of ROUNDS."""
  base = c.Config(
    rounds=ROUNDS,
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
    c.Entry("hierfavg", {
      "algorithm": "hierfavg", "rounds": ROUNDS // int(kappa), "node.rounds_per_parent_round": int(kappa),
    }),
    c.Entry("fedper", {"algorithm": "fedper"}),
    c.Entry("worldlm_paper", {"algorithm": "worldlm_paper"}),
    c.Entry("worldlm", {"algorithm": "worldlm"}),
  ])
