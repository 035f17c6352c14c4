"""What a federation's rounds cost over a bare training loop of the same model on the same machine.

  python benchmarks/rounds.py [--models=tiny] [--nodes=1,4,16] [--algorithms=worldlm,fedavg] [--rounds=8] [--out=FILE]

The federation is the real program, `worldlm_jax.train.run`: its data pipeline, exchange, evaluation (one window per
node) and logs. After each of its rounds a bare Optax loop, one jitted scan, makes as many steps of the same size on one
node, so that both see the same machine. The ratio is the bare loop's time per token over the federation's, the median
over rounds without the first (which compiles) and the last (which saves): 1 means that federating costs nothing.
Prints Markdown; --out also writes JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from worldlm_jax import config as c, model, progress, train

SIZES: dict[str, Callable[[], c.ModelConfig]] = {
  "tiny": model.PRESETS["tiny"],
  "10m": lambda: c.ModelConfig(num_layers=6, d_model=256, num_heads=8, num_kv_heads=8, d_ff=704, vocab_size=8192),
  "75m": model.PRESETS["75m"],
}


class BareLoop:
  """AdamW with clipping on one node: all steps of a round in one jitted scan, on batches that are on the device."""

  def __init__(self, config: c.Config, vocab_size: int):
    arch = model.architecture(config.model, vocab_size)
    settings = config.node
    tx = optax.chain(optax.clip_by_global_norm(settings.clip_norm),
                     optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay))
    self.params = jax.jit(model.init, static_argnums=0)(arch, jax.random.key(0))
    self.state = jax.jit(tx.init)(self.params)
    shape = settings.batch_size, config.data.sequence_length + 1
    windows = np.random.default_rng(0).integers(0, 256, (settings.local_steps, *shape))
    self.windows = jnp.asarray(windows, jnp.int32)
    everything = jnp.ones(settings.batch_size, bool)
    tokens = settings.batch_size * config.data.sequence_length

    def step(carry: tuple[Any, Any], windows: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
      params, state = carry
      loss, grads = jax.value_and_grad(lambda p: model.loss_sum(arch, p, windows, everything) / tokens)(params)
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), loss

    self.loop = jax.jit(lambda carry, windows: jax.lax.scan(step, carry, windows), donate_argnums=0)

  def seconds(self) -> float:
    """The time of as many steps as a node makes in a round."""
    begin = time.perf_counter()
    (self.params, self.state), losses = self.loop((self.params, self.state), self.windows)
    losses.block_until_ready()
    return time.perf_counter() - begin


class Interleaved(progress.Silent):
  """Runs the bare loop after each round of the federation."""

  def __init__(self, loop: BareLoop):
    self.loop, self.pairs = loop, list[tuple[float, float]]()
    loop.seconds()

  def round(self, round_index: int, rows: Sequence[progress.Row], seconds: float) -> None:
    """Books the round and the bare loop's time right after it."""
    self.pairs.append((seconds, self.loop.seconds()))


def measure(name: str, nodes: int, algorithm: str, args: argparse.Namespace) -> dict[str, Any]:
  """One line of the table."""
  rounds, steps, batch_size, length = args.rounds, args.local_steps, args.batch_size, args.sequence_length
  config = c.Config(
    algorithm=algorithm, rounds=rounds, model=SIZES[name](), data=c.DataConfig(sequence_length=length),
    federation=c.FederationConfig(synthetic=c.SyntheticTree((nodes,), train_bytes=200_000, eval_bytes=20_000)),
    node=c.NodeSettings(local_steps=steps, batch_size=batch_size),
    evaluation=c.EvaluationConfig(valid_windows=1, test_windows=1, matrix_windows=0),
    checkpoint=c.CheckpointConfig(every_rounds=rounds, keep_last=1, keep_best=0),
    logging=c.LoggingConfig(tensorboard=False),
  )
  interleaved = Interleaved(BareLoop(config, 257))
  with tempfile.TemporaryDirectory() as folder:
    train.run(config, Path(folder) / "run", reporter=interleaved)
  ratios = [nodes * bare / seconds for seconds, bare in interleaved.pairs[1:-1]]
  tokens = steps * batch_size * length
  return {"model": name, "nodes": nodes, "algorithm": algorithm, "ratio": statistics.median(ratios),
          "lowest": min(ratios), "highest": max(ratios), "rounds": len(ratios), "tokens_per_node_and_round": tokens,
          "bare_tokens_per_second": tokens / statistics.median(bare for _, bare in interleaved.pairs[1:-1])}


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--models", default="tiny", help="of " + ", ".join(SIZES))
  parser.add_argument("--nodes", default="1,4,16")
  parser.add_argument("--algorithms", default="worldlm,fedavg")
  parser.add_argument("--rounds", type=int, default=8, help="of which the first and the last do not count")
  parser.add_argument("--local_steps", type=int, default=100)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--sequence_length", type=int, default=128)
  parser.add_argument("--out", help="a JSON file")
  args = parser.parse_args()
  if args.rounds < 3:
    parser.error(f"--rounds={args.rounds}: expected at least 3, since the first and the last do not count")
  if unknown := set(args.models.split(",")) - SIZES.keys():
    parser.error(f"--models: {', '.join(sorted(unknown))}: expected of {', '.join(SIZES)}")
  print("| model | nodes | algorithm | ratio to the bare loop | from | to | bare, tokens/s |")
  print("|---|--:|---|--:|--:|--:|--:|")
  found = []
  for name in args.models.split(","):
    for algorithm in args.algorithms.split(","):
      for nodes in map(int, args.nodes.split(",")):
        found.append(line := measure(name, nodes, algorithm, args))
        ratios = " | ".join(f"{line[key]:.3f}" for key in ("ratio", "lowest", "highest"))
        print(f"| {name} | {nodes} | {algorithm} | {ratios} | {line['bare_tokens_per_second']:,.0f} |", flush=True)
  if args.out:
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
