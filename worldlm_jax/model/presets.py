"""Model sizes. A test pins the exact number of parameters of each.

The larger ones follow the widths and depths that the Llama and MPT families use at these sizes, with
a vocabulary of 50,432 (that of GPT-NeoX's tokenizer, rounded up to a multiple of 128).
"""

import functools

from worldlm_jax.config import ModelConfig

_large = functools.partial(ModelConfig, vocab_size=50_432, compute_dtype="bfloat16", remat="blocks")

PRESETS = {
  # For many runs on a laptop: 0.05M parameters with the byte tokenizer.
  "nano": functools.partial(ModelConfig, num_layers=3, d_model=32, num_heads=2, num_kv_heads=1, d_ff=96),
  # For laptops and tests: 0.43M parameters with the byte tokenizer.
  "tiny": functools.partial(ModelConfig, num_layers=4, d_model=96, num_heads=4, num_kv_heads=2, d_ff=256),
  "75m": functools.partial(_large, num_layers=7, d_model=512, num_heads=8, num_kv_heads=8, d_ff=1408, tied_head=False),
  "125m": functools.partial(_large, num_layers=12, d_model=768, num_heads=12, num_kv_heads=12, d_ff=2048),
  "400m": functools.partial(_large, num_layers=24, d_model=1024, num_heads=16, num_kv_heads=8, d_ff=3072,
                            tied_head=False),
  "1b": functools.partial(_large, num_layers=20, d_model=2048, num_heads=16, num_kv_heads=8, d_ff=5632),
}
