"""Model FLOP utilisation: the share of a device's peak that training makes use of.

  python -m benchmarks.utilisation [--model=400m] [--nodes=1,4] [--sequence_length=2048] [--batch_size=8]
                                   [--peak_tflops=989] [--out=FILE]

For one accelerator. The nodes of a federation train stacked, all at once; timed are whole rounds of `worldlm` without
files, logs and scores (`setups.Rounds`), against the bare loop of the same model on one node (`setups.BareLoop`), in
turn. A token takes 6 P + 6 L D T floating-point operations: P are the parameters that take part in matrix products
(not the table of embeddings where the head has a matrix of its own), the second term is causal attention in L layers
of width D over T positions (Q K^T and the weighted sum, forward and backward, half of which the mask leaves out).
What is computed again to save memory does not count. The peak is that of dense bfloat16 products.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import measuring, setups
from worldlm_jax import model, trees

# Of the makers' data sheets: dense bfloat16, in TFLOP/s, by a part of JAX's name of the device; the first that fits.
PEAK_TFLOPS = {
  "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121,
  "TPU v6 lite": 918, "TPU v5 lite": 197, "TPU v5": 459, "TPU v4": 275, "TPU v3": 123,
}
COLUMNS = {"model": "model", "nodes": "nodes", "tokens_per_second": "tokens/s",
           "bare_tokens_per_second": "bare loop, tokens/s", "ratio": "ratio to the bare loop",
           "tflops": "TFLOP/s", "utilisation": "utilisation", "bare_utilisation": "bare loop's"}


def flops_per_token(arch: model.Architecture, sequence_length: int) -> float:
  """Of forward and backward pass; see the module's docstring."""
  params = model.abstract_params(arch)
  multiplied = trees.num_parameters(params)
  if not arch.tied_head:
    multiplied -= trees.num_parameters(params["backbone"]["embedding"])
  return 6.0 * multiplied + 6.0 * arch.num_layers * arch.d_model * sequence_length


def peak_tflops(device_kind: str) -> float | None:
  """None for a device that is not in the table."""
  return next((float(peak) for name, peak in PEAK_TFLOPS.items() if name in device_kind), None)


def measure(setting: dict[str, Any], repeats: int, peak: float | None) -> dict[str, Any]:
  """One line of the table."""
  nodes, length = setting["nodes"], setting["sequence_length"]
  config = setups.config(setting["model"], (nodes,), local_steps=setting["local_steps"],
                         batch_size=setting["batch_size"], sequence_length=length)
  config.nodes_at_once = nodes
  config.model = dataclasses.replace(config.model, compute_dtype="bfloat16")
  rounds = setups.Rounds(config)
  bare = setups.BareLoop(rounds.arch, rounds.config, setups.random_windows(rounds.config, 1)[0])
  seconds = measuring.interleaved({"round": rounds.round, "bare": bare.round}, repeats)
  flops = flops_per_token(rounds.arch, length)
  peak = peak or peak_tflops(jax.devices()[0].device_kind)
  share = lambda speed: None if peak is None else speed * flops / (peak * 1e12)
  speed = rounds.tokens / measuring.spread(seconds["round"]).median
  bare_speed = rounds.tokens / nodes / measuring.spread(seconds["bare"]).median
  return setting | {
    "device": jax.devices()[0].device_kind, "tokens_per_second": speed, "bare_tokens_per_second": bare_speed,
    "ratio": measuring.ratios([nodes * bare for bare in seconds["bare"]], seconds["round"]),
    "flops_per_token": flops, "tflops": speed * flops / 1e12, "peak_tflops": peak,
    "utilisation": share(speed), "bare_utilisation": share(bare_speed),
  }


def main(argv: Sequence[str] | None = None) -> list[measuring.Table]:
  """Prints the table."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--model", default="400m", choices=setups.MODELS)
  parser.add_argument("--nodes", default=[1, 4], type=measuring.whole_numbers)
  parser.add_argument("--peak_tflops", type=float, help="of the device; a few are known")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--local_steps", type=int, default=20)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--sequence_length", type=int, default=2048)
  args = measuring.parse(parser, argv)
  table = measuring.Table(f"Model FLOP utilisation, {args.local_steps} local steps of {args.batch_size} x "
                          f"{args.sequence_length} tokens in bfloat16", COLUMNS)
  for nodes in args.nodes:
    setting = {"model": args.model, "nodes": nodes, "local_steps": args.local_steps, "batch_size": args.batch_size,
               "sequence_length": args.sequence_length}
    table.add(measuring.in_child(measure, setting=setting, repeats=args.repeats, peak=args.peak_tflops))
  if table.rows[0]["peak_tflops"] is None:
    print(f"\nThe peak of {table.rows[0]['device']!r} is not known: say it with --peak_tflops.")
  measuring.finish(args, [table])
  return [table]


if __name__ == "__main__":
  main()
