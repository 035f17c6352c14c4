"""Languages of mC4 as a federation of language families, 400M parameters for each node.

  bash launch/prepare.sh --corpus=mc4 --out=data/mc4 --max_bytes_per_node=500_000_000
  python -m worldlm_jax.tokenizer --config=configs/mc4_400m.py --config.node.max_train_bytes=20000000 \\
      --vocab_size=50432 --out=data/mc4.json
  python -m worldlm_jax.main --config=configs/mc4_400m.py --workdir=runs/mc4_400m

The root has English; below it are eight families of 31 languages, high-resource ones beside low-resource ones,
which worldlm_jax/data/natural.py lists. All three sizes use the same prepared text (at most 8 GB) and tokenizer.

Machine: 8 accelerators with 80 GB each; parameters and moments take 4.9 GB for each of 40 nodes. Training
sees 7.0 billion tokens in all (two passes over each node's text): 2.3e19 operations, 21 hours of
an H100 at 3e14 a second. These are estimates: it has not been run yet, so no result to expect is known.

Learning rate, warm-up, moments and clipping are those of mpt-350m.yaml in llm-foundry (weight decay is not: 0.1
here). Its batch of 256 windows of 2,048 tokens is spread over the 32 nodes with text, for as many steps as there.
"""

from worldlm_jax import config as c, model


def get_config() -> c.Config:
  return c.Config(
    rounds=134,
    federation=c.FederationConfig(folder="data/mc4"),
    node=c.NodeSettings(local_steps=100, batch_size=8, learning_rate=3e-4, warmup_steps=100),
    model=model.PRESETS["400m"](),
    data=c.DataConfig(tokenizer="data/mc4.json", sequence_length=2048),
    optimizer=c.OptimizerConfig(microbatch_size=4),
    evaluation=c.EvaluationConfig(valid_windows=32, test_windows=256),
  )
