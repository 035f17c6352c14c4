"""How a round's time and memory, and the time to compile it, grow with the tree and with the model.

  python -m benchmarks.growth [--axes=nodes,depths,models,layers] [--nodes=1,2,4,8,16,32,64] [--depths=1,2,3,4,5,6]
                              [--models=nano,tiny,10m] [--layers=2,4,8,16,32] [--out=FILE] [--png=FILE]

One axis at a time: that many nodes under one root; `--leaves` nodes under a chain of federations, so that only the
depth of the tree grows; four nodes with models of other sizes; four nodes in two federations with a model of `--model`
that has that many layers. A round is made of the engine's phases, without files, logs and scores (`setups.Rounds`);
every point has a process of its own, without a compilation cache. The rival is the bare loop of the same model on one
node (`setups.BareLoop`): a round's time over that of the loop, per token; its peak memory over that of the loop, per
node that trains; the time to compile the round over the time to compile the loop. The time to the first step begins
when the packages are imported, and ends when the first optimizer steps of the first nodes are done.
"""

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from benchmarks import measuring, setups
from worldlm_jax import config as c, trees

COLUMNS = {"value": "", "levels": "levels", "parameters": "parameters", "round_ratio": "round, in bare loops",
           "memory_ratio": "memory, in bare loops", "compile_seconds": "compiling, s",
           "compile_ratio": "compiling, in bare loops", "first_step_seconds": "to the first step, s"}
CURVES = {"round_ratio": "time of a round, in bare loops", "memory_ratio": "memory, in bare loops",
          "compile_ratio": "compiling, in bare loops"}


def _config(point: Mapping[str, Any]) -> c.Config:
  found = setups.config(point["model"], tuple(point["branching"]), local_steps=point["local_steps"],
                        batch_size=point["batch_size"], sequence_length=point["sequence_length"])
  found.model = dataclasses.replace(found.model, num_layers=point["layers"] or found.model.num_layers)
  return found


def measure_round(point: dict[str, Any], repeats: int) -> dict[str, Any]:
  """A federation's times and memory, and its time over the bare loop's."""
  jax.config.update("jax_enable_compilation_cache", False)
  begin, first_step = time.perf_counter(), 0.0
  rounds = setups.Rounds(_config(point))
  for kind in rounds.phases():
    if kind == "train" and not first_step:
      jax.block_until_ready(rounds.state)
      first_step = time.perf_counter() - begin
  jax.block_until_ready(rounds.round())
  compiling = rounds.engine.compile_seconds
  rounds.end()
  with measuring.PeakMemory() as memory:
    rounds.begin()
    for _ in range(2):
      jax.block_until_ready(rounds.round())
  bare = setups.BareLoop(rounds.arch, rounds.config, setups.random_windows(rounds.config, 1)[0])
  seconds = measuring.interleaved({"round": rounds.round, "bare": bare.round}, repeats)
  nodes = len(rounds.text_tokens)
  return {
    "nodes": nodes, "levels": len(rounds.federation.levels), "parameters": trees.num_parameters(bare.params),
    "round_seconds": measuring.spread(seconds["round"]),
    "round_ratio": measuring.ratios(seconds["round"], [nodes * bare for bare in seconds["bare"]]),
    "memory_mb": memory.bytes / 1e6, "compile_seconds": compiling, "first_step_seconds": first_step,
  }


def measure_bare(point: dict[str, Any]) -> dict[str, Any]:
  """The bare loop's compile time and memory."""
  jax.config.update("jax_enable_compilation_cache", False)
  rounds = setups.Rounds(_config(point | {"branching": (1,)}))
  rounds.end()
  make = lambda: setups.BareLoop(rounds.arch, rounds.config, setups.random_windows(rounds.config, 1)[0])
  bare = make()
  begin = time.perf_counter()
  bare.compile()
  compiling = time.perf_counter() - begin
  jax.block_until_ready(bare.round())
  bare.end()
  with measuring.PeakMemory() as memory:
    bare.begin()
    for _ in range(2):
      jax.block_until_ready(bare.round())
  return {"bare_memory_mb": memory.bytes / 1e6, "bare_compile_seconds": compiling}


def points(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
  """By axis, what to measure."""
  base = {"model": args.model, "layers": 0, "local_steps": args.local_steps, "batch_size": args.batch_size,
          "sequence_length": args.sequence_length}
  every = {
    "nodes": [{"value": nodes, "branching": (nodes,)} for nodes in args.nodes],
    "depths": [{"value": depth, "branching": (1,) * (depth - 1) + (args.leaves,)} for depth in args.depths],
    "models": [{"value": size, "branching": (4,), "model": size} for size in args.models],
    "layers": [{"value": layers, "branching": (2, 2), "layers": layers} for layers in args.layers],
  }
  return {axis: [base | point for point in every[axis]] for axis in args.axes}


def chart(tables: Sequence[measuring.Table], path: str) -> None:
  """Draws a row of curves for every axis."""
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  figure, all_axes = plt.subplots(len(tables), len(CURVES), figsize=(4 * len(CURVES), 3 * len(tables)), squeeze=False,
                                  layout="constrained")
  for table, row in zip(tables, all_axes, strict=True):
    names = [str(line["value"]) for line in table.rows]
    for (key, title), axes in zip(CURVES.items(), row, strict=True):
      values = [line[key] if isinstance(line[key], float) else line[key][0] for line in table.rows]
      axes.plot(names, values, marker="o")
      axes.set(xlabel=table.columns["value"], title=title, ylim=(0, None))
  figure.savefig(path)
  plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[measuring.Table]:
  """Prints a table per axis."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--axes", default="nodes,depths,models,layers")
  parser.add_argument("--nodes", type=measuring.whole_numbers, default=[1, 2, 4, 8, 16, 32, 64])
  parser.add_argument("--depths", type=measuring.whole_numbers, default=[1, 2, 3, 4, 5, 6])
  parser.add_argument("--models", default="nano,tiny,10m", help="of " + ", ".join(setups.MODELS))
  parser.add_argument("--layers", type=measuring.whole_numbers, default=[2, 4, 8, 16, 32])
  parser.add_argument("--model", default="tiny", choices=setups.MODELS, help="of the other axes")
  parser.add_argument("--leaves", type=int, default=4, help="under the chain of the axis `depths`")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--local_steps", type=int, default=10)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--sequence_length", type=int, default=128)
  parser.add_argument("--png", help="an image of the curves (extra `report`)")
  args = measuring.parse(parser, argv, models=setups.MODELS, axes=("nodes", "depths", "models", "layers"))
  tables, bare = [], dict[tuple, dict[str, Any]]()
  for axis, line in points(args).items():
    table = measuring.Table(f"Growth with {axis}", COLUMNS | {"value": axis})
    for point in line:
      key = point["model"], point["layers"]
      if key not in bare:
        bare[key] = measuring.in_child(measure_bare, point=point)
      found = measuring.in_child(measure_round, point=point, repeats=args.repeats) | bare[key]
      table.add(point | found | {
        "memory_ratio": found["memory_mb"] / found["bare_memory_mb"] / found["nodes"],
        "compile_ratio": found["compile_seconds"] / found["bare_compile_seconds"],
      })
    tables.append(table)
  if args.png:
    chart(tables, args.png)
  measuring.finish(args, tables)
  return tables


if __name__ == "__main__":
  main()
