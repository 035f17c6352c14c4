"""A consortium whose members have rules: what may leave, for whom, from whom, and how much anybody may weigh.

  python -m worldlm_jax.main --config=configs/consortium.py --workdir=runs/consortium
  python -m worldlm_jax.report --workdir=runs/consortium

Machine: 2 CPU cores, two to three minutes. The texts are those of the quick start; which rule does what stands beside
it, and docs/governance.md says it all. Expect a line per node with rules before the training, and in the report, under
"Who gave what to whom", what each of them decided; receipts.jsonl has every exchange. The mean personalised test
perplexity is 6.97 per byte (one seed).
"""

from worldlm_jax import config as c, model


def get_config() -> c.Config:
  prose = c.Node("prose", None, [
    c.Node("reference", c.StandardLibrary("prose/reference")),
    # Its backbone helps its own house alone: it is in the model of `prose`, and in none above.
    c.Node("docstrings", c.StandardLibrary("prose/docstrings"), settings={"share_backbone": "federation"}),
  ], settings={"share_key_layers": "prose"})  # what a key layer has learnt stays within the house
  code = c.Node("code", None, [
    c.Node("network", c.StandardLibrary("code/network"), settings={"share_residuals": "nobody"}),
    c.Node("data", c.StandardLibrary("code/data")),
    # It takes what the federation has, and gives nothing.
    c.Node("tools", c.StandardLibrary("code/tools"), settings={
      "share_backbone": "nobody", "share_key_layers": "nobody",
    }),
  ], settings={
    "member_weight_cap": 0.5,  # of `network` and `data`, which give, neither counts more than the other
    "quality_floor": 1.0,  # whoever is worse than the house's model on a text of its own does not count in that round
  })
  return c.Config(
    rounds=8,
    federation=c.FederationConfig(root=c.Node("library", None, [prose, code])),
    node=c.NodeSettings(
      local_steps=25, batch_size=8, learning_rate=3e-3, warmup_steps=20,
    ),
    model=model.PRESETS["tiny"](),
    evaluation=c.EvaluationConfig(valid_windows=16, test_windows=64),
  )
