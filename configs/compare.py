"""WorldLM against what one would do otherwise, on the quick start's tree. No download.

  python -m worldlm_jax.compare --config=configs/compare.py --workdir=runs/compare

Machine: 2 CPU cores; eight entries with three seeds each are 24 times the quick start's training. Expect
`runs/compare/comparison.md`: the mean test perplexity per byte of every entry, and what joining brings each node.

The tree is that of configs/quickstart.py: prose (the language reference, docstrings) and code (network, data,
tools) out of the running Python's own standard library. All entries train on equally many tokens.
"""

from worldlm_jax import config as c, model


def get_config() -> c.Comparison:
  prose = c.Node("prose", None, [
    c.Node("reference", c.StandardLibrary("prose/reference")),
    c.Node("docstrings", c.StandardLibrary("prose/docstrings")),
  ])
  code = c.Node("code", c.StandardLibrary("code"), [
    c.Node("network", c.StandardLibrary("code/network")),
    c.Node("data", c.StandardLibrary("code/data")),
    c.Node("tools", c.StandardLibrary("code/tools")),
  ])
  base = c.Config(
    rounds=8,
    inner_text="before",  # with so much text, it helps that `code` trains first and hands the result to its members
    federation=c.FederationConfig(root=c.Node("library", None, [prose, code])),
    node=c.NodeSettings(
      local_steps=25, batch_size=8, learning_rate=3e-3, warmup_steps=20,
    ),
    model=model.PRESETS["tiny"](),
    evaluation=c.EvaluationConfig(valid_windows=16, test_windows=64),
    checkpoint=c.CheckpointConfig(keep_last=1, keep_best=0),
  )
  diloco = {"backbone.server_optimizer": "nesterov", "backbone.server_learning_rate": 0.7}  # arXiv:2311.08105
  return c.Comparison(base, [
    c.Entry("local", {"algorithm": "local"}),
    c.Entry("centralized", {"algorithm": "centralized"}),
    c.Entry("fedavg", {"algorithm": "fedavg"}),
    c.Entry("fedavg_nesterov", {"algorithm": "fedavg"} | diloco),
    c.Entry("hierfavg", {"algorithm": "hierfavg"}),
    c.Entry("fedper", {"algorithm": "fedper"}),
    c.Entry("worldlm_paper", {"algorithm": "worldlm_paper"}),
    c.Entry("worldlm", {"algorithm": "worldlm"}),
  ])
