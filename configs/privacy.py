"""Under differential privacy: four algorithms at several noise levels, on one's own folder tree of texts.

  python -m worldlm_jax.compare --config=configs/privacy.py --workdir=DIR \\
      --config.base.federation.folder=PATH [--node=law/eu.max_train_bytes=20000] [--only=local,fedavg_1,worldlm_1]

Machine: 2 CPU cores. With ten nodes a run takes about a minute and there are 17 entries with three seeds each; the same
command in a second terminal shares the work. Expect DIR/comparison.md; docs/results.md has ours.

Every node clips its update at a norm of 8 and adds noise before it leaves (local privacy of the whole text); the number
in an entry's name is the noise multiplier. At delta 1e-5, ten releases have an epsilon of 18 for a multiplier of 1, of
6,000 for 0.03 and of 560,000 for 0.003: the weaker two promise nothing, and show how an algorithm takes to noise.
Means of a few organisations cannot average the noise of 1 away; epsilons worth having need very many members, or
DP-SGD.
"""

from worldlm_jax import config as c, model

NOISE_MULTIPLIERS = (0.003, 0.03, 1.0)
CLIP = 8.0  # updates have norms of 15 in the first round, 9 in the second, and less later


def get_config() -> c.Comparison:
  base = c.Config(
    rounds=10,
    node=c.NodeSettings(local_steps=40, batch_size=4, learning_rate=8e-3, warmup_steps=20),
    model=model.PRESETS["nano"](),
    data=c.DataConfig(sequence_length=64),
    evaluation=c.EvaluationConfig(valid_windows=32, test_windows=128, acceptance_windows=32, personalised="best"),
    checkpoint=c.CheckpointConfig(every_rounds=10, keep_last=1, keep_best=0),
    logging=c.LoggingConfig(tensorboard=False),
  )
  entries = [c.Entry("local", {"algorithm": "local"})]
  for algorithm in ("fedavg", "fedper", "hierfavg", "worldlm"):
    entries.append(c.Entry(algorithm, {"algorithm": algorithm}))
    for noise in NOISE_MULTIPLIERS:
      entries.append(c.Entry(f"{algorithm}_{noise:g}", {
        "algorithm": algorithm, "node.privacy": "local", "node.privacy_clip": CLIP, "node.privacy_noise": noise,
      }))
  return c.Comparison(base, entries)
