"""What a federation's rounds cost over a bare training loop of the same model on the same machine.

  python -m benchmarks.rounds [--models=tiny] [--nodes=1,4,16] [--algorithms=worldlm,fedavg] [--settings=lean,default]
                              [--blocks=5] [--rounds_per_block=2] [--out=FILE]

The federation is the whole program, `worldlm_jax.train.run`: its data pipeline, exchange, evaluation and logs. The
bare loop (`setups.BareLoop`) trains one node alone: the same model, clipping and AdamW in one jitted scan with donated
state, on the windows of the first node's first round, which are on the device already. It runs before and after each
block of rounds, when everything that the federation has begun is finished. The ratio is the tokens per second of the
one over those of the other, per device: 1 means that federating costs nothing. The first round, which compiles, and
the last, which saves, do not count.

Settings: `lean` scores one window per node and split, trusts training fully and saves at the end, so that the ratio
is what the machinery costs; `default` is what a run does unless told otherwise (32 windows as received and as
personalised, trust by 8 validation windows, a checkpoint and TensorBoard events every round).

For a short run of a large model on CPUs: --models=75m --nodes=1 --local_steps=2 --batch_size=1 --blocks=2.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import measuring, setups
from worldlm_jax import algorithms, config as c, federation as federation_lib, model, progress, train
from worldlm_jax.data import batches as batches_lib, tokenizer as tokenizer_lib

COLUMNS = {"model": "model", "nodes": "nodes", "algorithm": "algorithm", "settings": "settings",
           "tokens_per_second": "tokens/s", "bare_tokens_per_second": "bare loop, tokens/s",
           "ratio": "ratio to the bare loop"}


class Interleaved(progress.Silent):
  """Runs the bare loop between blocks of rounds, each with nothing else going on."""

  def __init__(self, loop: setups.BareLoop, last_round: int, rounds_per_block: int):
    self._loop, self._last, self._per_block = loop, last_round, rounds_per_block
    self._begin = 0.0
    self.seconds: list[float] = []  # per round, of each block
    self.bare: list[float] = []  # before the first block and after each
    jax.block_until_ready(loop.round())

  def round(self, round_index: int, rows: Sequence[progress.Row], seconds: float) -> None:
    """Books the block that ends with this round, and the bare loop's time after it."""
    if round_index % self._per_block or round_index >= self._last:
      return
    # Rounds that are already on their way belong to the federation.
    for array in jax.live_arrays():
      with contextlib.suppress(RuntimeError):  # it has been donated
        array.block_until_ready()
    now = time.perf_counter()
    if self.bare:
      self.seconds.append((now - self._begin) / self._per_block)
    begin = time.perf_counter()
    jax.block_until_ready(self._loop.round())
    self._begin = time.perf_counter()
    self.bare.append(self._begin - begin)


def measure(size: str, nodes: int, algorithm: str, settings: str, args: argparse.Namespace) -> dict[str, Any]:
  """One line of the table."""
  rounds = args.blocks * args.rounds_per_block + 2
  config = setups.config(size, (nodes,), local_steps=args.local_steps, batch_size=args.batch_size,
                         sequence_length=args.sequence_length, rounds=rounds, algorithm=algorithm)
  if settings == "default":
    config.node.trust = c.NodeSettings().trust
    config.evaluation = c.EvaluationConfig(matrix_windows=0)  # the matrix comes after the last round
    config.checkpoint, config.logging = c.CheckpointConfig(), c.LoggingConfig()
  with tempfile.TemporaryDirectory() as folder:
    config.data.cache = str(Path(folder) / "cache")
    interleaved = Interleaved(_bare_loop(config), rounds - 1, args.rounds_per_block)
    summary = train.run(config, Path(folder) / "run", reporter=interleaved)
  around = [(before + after) / 2 for before, after in zip(interleaved.bare, interleaved.bare[1:], strict=False)]
  bare = [nodes * seconds / jax.device_count() for seconds in around]
  tokens = args.local_steps * args.batch_size * args.sequence_length
  return {
    "model": size, "nodes": nodes, "algorithm": algorithm, "settings": settings,
    "ratio": measuring.ratios(bare, interleaved.seconds),
    "tokens_per_second": nodes * tokens / statistics.median(interleaved.seconds),
    "bare_tokens_per_second": tokens / statistics.median(interleaved.bare),
    "seconds_per_round": interleaved.seconds, "bare_seconds": interleaved.bare,
    "parts_seconds": summary["seconds"],  # of the whole run, where the time went
  }


def _bare_loop(config: c.Config) -> setups.BareLoop:
  """On the first round of the first node with text."""
  tokenizer = tokenizer_lib.load(config.data.tokenizer)
  member, source = next((m, m.data) for m in federation_lib.resolve(config).members if m.data is not None)
  text = batches_lib.load([(member.path, source)], config.data, tokenizer)[member.path]
  batches = batches_lib.NodeBatches(text.train, member.settings.batch_size, config.seed, member.path)
  num_key_layers = algorithms.num_key_layers(algorithms.adapted(config))
  arch = model.architecture(config.model, tokenizer.vocab_size, num_key_layers=num_key_layers)
  return setups.BareLoop(arch, config, batches.batches(0, member.settings.local_steps))


def main(argv: Sequence[str] | None = None) -> list[measuring.Table]:
  """Prints the table."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--models", default="tiny", help="of " + ", ".join(setups.MODELS))
  parser.add_argument("--nodes", default=[1, 4, 16], type=measuring.whole_numbers)
  parser.add_argument("--algorithms", default="worldlm,fedavg")
  parser.add_argument("--settings", default="lean,default")
  parser.add_argument("--blocks", type=int, default=5, help="how many ratios to take the median of")
  parser.add_argument("--rounds_per_block", type=int, default=2)
  parser.add_argument("--local_steps", type=int, default=100)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--sequence_length", type=int, default=128)
  args = measuring.parse(parser, argv, models=setups.MODELS, algorithms=c.ALGORITHMS, settings=("lean", "default"))
  table = measuring.Table(f"Whole program against a bare loop, {args.local_steps} local steps of {args.batch_size} x "
                          f"{args.sequence_length} tokens", COLUMNS)
  for size in args.models:
    for settings in args.settings:
      for algorithm in args.algorithms:
        for nodes in args.nodes:
          table.add(measure(size, nodes, algorithm, settings, args))
  measuring.finish(args, [table])
  return [table]


if __name__ == "__main__":
  main()
