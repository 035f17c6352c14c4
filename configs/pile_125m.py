"""The Pile's domains as a federation of federations, 125M parameters for each node.

  bash launch/prepare.sh --corpus=pile --out=data/pile --max_bytes_per_node=1_000_000_000
  curl -L -o data/gpt-neox.json https://huggingface.co/EleutherAI/gpt-neox-20b/resolve/main/tokenizer.json
  python -m worldlm_jax.main --config=configs/pile_125m.py --workdir=runs/pile_125m

The root has general text (Pile-CC); below it are academic, code, encyclopedic, legal, medical and web, with 16
more parts. worldlm_jax/data/natural.py lists them, and those of The Pile that are no longer distributed. All
three sizes use the same prepared text: about 9 GB, out of about half of a download of 330 GB.

Machine: an accelerator with 80 GB; parameters and moments take 1.5 GB for each of 23 nodes. Training
sees 2.7 billion tokens in all: 2.6e18 operations, 2.5 hours of an H100 at 3e14 a second. These are
estimates: it has not been run yet, so no result to expect is known.

Learning rate, warm-up, moments and clipping are those of mpt-125m.yaml in llm-foundry (weight decay is not: 0.1
here). Its batch of 256 windows of 2,048 tokens is spread over the 17 nodes with text, for as many steps as there.
"""

from worldlm_jax import config as c, model


def get_config() -> c.Config:
  return c.Config(
    rounds=48,
    federation=c.FederationConfig(folder="data/pile"),
    node=c.NodeSettings(
      local_steps=100, batch_size=16, learning_rate=6e-4, warmup_steps=100, max_train_bytes=700_000_000
    ),
    model=model.PRESETS["125m"](),
    data=c.DataConfig(tokenizer="data/gpt-neox.json", sequence_length=2048),
    optimizer=c.OptimizerConfig(microbatch_size=4),
    evaluation=c.EvaluationConfig(valid_windows=32, test_windows=256),
  )
