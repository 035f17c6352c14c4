"""A federation of federations on the text that every Python brings along. No download.

  bash launch/quickstart.sh
  python -m worldlm_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Machine: 2 CPU cores, one to two minutes of training. Expect a mean test perplexity per byte of 6.7 to 7.0
(the text differs between versions of Python), personalised; `docs/quickstart.md` shows the whole output.

The tree: prose (the language reference, docstrings) and code (network, data, tools), each node with a
model of its own. The inner node `code` has text of its own too, and trains.
"""

from worldlm_jax import config as c, model


def get_config() -> c.Config:
  prose = c.Node("prose", None, [
    c.Node("reference", c.StandardLibrary("prose/reference")),
    c.Node("docstrings", c.StandardLibrary("prose/docstrings")),
  ])
  code = c.Node("code", c.StandardLibrary("code"), [
    c.Node("network", c.StandardLibrary("code/network")),
    c.Node("data", c.StandardLibrary("code/data")),
    c.Node("tools", c.StandardLibrary("code/tools")),
  ])
  return c.Config(
    rounds=8,
    inner_text="before",  # with so much text, it helps that `code` trains first and hands the result to its members
    federation=c.FederationConfig(root=c.Node("library", None, [prose, code])),
    node=c.NodeSettings(
      local_steps=25, batch_size=8, learning_rate=3e-3, warmup_steps=20,
    ),
    model=model.PRESETS["tiny"](),
    evaluation=c.EvaluationConfig(valid_windows=16, test_windows=64),
  )
