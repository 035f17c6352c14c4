"""The Pile's domains as a federation of federations, 400M parameters for each node.

  bash launch/prepare.sh --corpus=pile --out=data/pile --max_bytes_per_node=1_000_000_000
  curl -L -o data/gpt-neox.json https://huggingface.co/EleutherAI/gpt-neox-20b/resolve/main/tokenizer.json
  python -m worldlm_jax.main --config=configs/pile_400m.py --workdir=runs/pile_400m

The root has general text (Pile-CC); below it are academic, code, encyclopedic, legal, medical and web, with 16
more parts. worldlm_jax/data/natural.py lists them, and those of The Pile that are no longer distributed. All
three sizes use the same prepared text: about 9 GB, out of about half of a download of 330 GB.

Machine: 8 accelerators with 80 GB each; parameters and moments take 4.9 GB for each of 23 nodes. Training
sees 7.5 billion tokens in all (two passes over each node's text): 2.4e19 operations, 22 hours of
an H100 at 3e14 a second. These are estimates: it has not been run yet, so no result to expect is known.

Learning rate, warm-up, moments and clipping are those of mpt-350m.yaml in llm-foundry (weight decay is not: 0.1
here). Its batch of 256 windows of 2,048 tokens is spread over the 17 nodes with text, for as many steps as there.
"""

from worldlm_jax import config as c, model


def get_config() -> c.Config:
  return c.Config(
    rounds=134,
    federation=c.FederationConfig(folder="data/pile"),
    node=c.NodeSettings(local_steps=100, batch_size=16, learning_rate=3e-4, warmup_steps=100),
    model=model.PRESETS["400m"](),
    data=c.DataConfig(tokenizer="data/gpt-neox.json", sequence_length=2048),
    optimizer=c.OptimizerConfig(microbatch_size=4),
    evaluation=c.EvaluationConfig(valid_windows=32, test_windows=256),
  )
