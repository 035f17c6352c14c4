"""A federation out of a folder tree: each folder is a node, its sub-folders are its children.

  python -m worldlm_jax.main --config=configs/folder.py --config.federation.folder=PATH --workdir=DIR

A folder that holds train.txt, valid.txt and test.txt (or other .txt files, which are then split by
document) has text of its own. Machine: 2 CPU cores; about 6 minutes for ten nodes. Expect a mean test
perplexity per byte of about 8, personalised: a first look, far from the end of training.
"""

from worldlm_jax import config as c, model


def get_config() -> c.Config:
  return c.Config(
    rounds=12,
    node=c.NodeSettings(local_steps=25, batch_size=8, learning_rate=3e-3, warmup_steps=20),
    model=model.PRESETS["tiny"](),
    evaluation=c.EvaluationConfig(valid_windows=32, test_windows=256),
  )
