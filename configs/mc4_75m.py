"""Languages of mC4 as a federation of language families, 75M parameters for each node.

  bash launch/prepare.sh --corpus=mc4 --out=data/mc4 --max_bytes_per_node=500_000_000
  python -m worldlm_jax.tokenizer --config=configs/mc4_75m.py --config.node.max_train_bytes=20000000 \\
      --vocab_size=50432 --out=data/mc4.json
  python -m worldlm_jax.main --config=configs/mc4_75m.py --workdir=runs/mc4_75m

The root has English; below it are eight families of 31 languages, high-resource ones beside low-resource ones,
which worldlm_jax/data/natural.py lists. All three sizes use the same prepared text (at most 8 GB) and tokenizer.

Machine: an accelerator with 80 GB; parameters and moments take 0.9 GB for each of 40 nodes. Training
sees 1.5 billion tokens in all: 8.7e17 operations, an hour of an H100 at 3e14 a second. These are
estimates: it has not been run yet, so no result to expect is known.

Learning rate, warm-up, moments and clipping are those of mpt-125m.yaml in llm-foundry (weight decay is not: 0.1
here). Its batch of 256 windows of 2,048 tokens is spread over the 32 nodes with text, for 20 tokens per parameter.
"""

from worldlm_jax import config as c, model


def get_config() -> c.Config:
  return c.Config(
    rounds=28,
    federation=c.FederationConfig(folder="data/mc4"),
    node=c.NodeSettings(
      local_steps=100, batch_size=8, learning_rate=6e-4, warmup_steps=100, max_train_bytes=200_000_000
    ),
    model=model.PRESETS["75m"](),
    data=c.DataConfig(tokenizer="data/mc4.json", sequence_length=2048),
    optimizer=c.OptimizerConfig(microbatch_size=4),
    evaluation=c.EvaluationConfig(valid_windows=32, test_windows=256),
  )
