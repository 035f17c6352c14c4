"""What the exchange of key layers costs over a copy of them: attention over updates with residual routing.

  python -m benchmarks.exchange [--models=tiny,10m,75m] [--candidates=everybody,both] [--nodes=8] [--repeats=5]
                                [--out=FILE]

The tree has two federations with half of the nodes each, so that residual layers travel between them. A node holds
the key layers of the named model, at their widths and in their number, and next to nothing else: no other blocks, a
vocabulary of two, no moments. All nodes have trained and go their own way, so that every one of them attends. Timed
are `Engine.up` of both levels of federations and `Engine.down` of all levels, and, by itself, the down-phase of the
nodes, which is the attention. The rival is a copy of the nodes' key layers on the device, one read and one write, into
memory that is there already. Candidates are how far everybody's model has moved, as by default, or `both` that and the
siblings' updates, the most that attention does. Extra memory is what the exchange takes at its peak beyond the state,
in copies of the nodes' key layers.

Memory in all, with 8 nodes: about 40 times a node's key layers for the state, and the extra memory (7 key layers of
the 400m model are 353 MB).
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring, setups
from worldlm_jax import config as c, schedule, state as state_lib, trees

COLUMNS = {"model": "model", "candidates": "candidates", "key_layer_mb": "key layers of a node, MB",
           "copy_ms": "copy, ms", "attention_ratio": "attention, in copies",
           "exchange_ratio": "whole exchange, in copies", "extra_memory_ratio": "extra memory, in copies"}


class Exchange:
  """Up- and down-phases over and over, between which the nodes get new updates."""

  def __init__(self, size: str, nodes: int, candidates: str):
    config = setups.config(size, (2, nodes // 2), local_steps=1, batch_size=1, sequence_length=8)
    config.node.key_layer_independence = math.inf
    config.key_layers = c.KeyLayerConfig(candidates=candidates, granularity="all")
    config.optimizer = c.OptimizerConfig(name="sgd")
    config.model = dataclasses.replace(
      config.model, num_layers=c.num_key_layers(config.model), key_layer_share=1.0, vocab_size=2, tied_head=True
    )
    self.rounds = setups.Rounds(config)
    levels = self.rounds.federation.levels
    self._last = len(levels) - 1
    self._steps = [schedule.Step(kind, level, np.ones(len(levels[level]), bool), True)
                   for kind, order in (("up", range(self._last - 1, -1, -1)), ("down", range(self._last + 1)))
                   for level in order]
    self._train = jax.jit(_trained, donate_argnums=0)
    self._copy = jax.jit(lambda into, layers: jax.tree.map(jnp.copy, layers), donate_argnums=0, keep_unused=True)
    self._into = jax.tree.map(jnp.zeros_like, self.key_layers())

  def key_layers(self) -> trees.PyTree:
    """Those of all nodes, leaves `[n, M, ...]`."""
    return self.rounds.state[self._last].params["key_layers"]

  def train(self) -> None:
    """Gives the nodes new updates."""
    state = self.rounds.state
    self.rounds.state = (*state[: self._last], self._train(state[self._last]))
    jax.block_until_ready(self.rounds.state)

  def copy(self) -> float:
    """Seconds of the copy."""
    begin = time.perf_counter()
    self._into = jax.block_until_ready(self._copy(self._into, self.key_layers()))
    return time.perf_counter() - begin

  def exchange(self) -> tuple[float, float]:
    """Seconds of the whole exchange and of the nodes' down-phase alone."""
    engine, index, begin = self.rounds.engine, self.rounds.index, time.perf_counter()
    for step in self._steps:
      at = time.perf_counter()
      if step.kind == "up":
        self.rounds.state, _ = engine.up(self.rounds.state, step, index)
      else:
        self.rounds.state, _ = engine.down(self.rounds.state, step, index + 1)
      jax.block_until_ready(self.rounds.state)
    self.rounds.index += 1
    end = time.perf_counter()
    return end - begin, end - at


def _trained(level: state_lib.LevelState) -> state_lib.LevelState:
  """The level as after training that changed the nodes' layers, each in a way of its own."""

  def update(leaf: jax.Array) -> jax.Array:
    place = sum(jax.lax.broadcasted_iota(jnp.float32, leaf.shape, axis) * (axis + 1.7) for axis in range(leaf.ndim))
    return 1e-3 * jnp.sin(place)

  ones = jnp.ones_like(level.weight)
  return level._replace(update=jax.tree.map(update, level.update), own_weight=ones, weight=ones,
                        trained=jnp.ones_like(level.trained), fresh=jnp.ones_like(level.fresh))


def measure(size: str, nodes: int, candidates: str, repeats: int) -> dict[str, Any]:
  """One line of the table."""
  exchange = Exchange(size, nodes, candidates)
  turns = []
  for _ in range(repeats + 1):
    exchange.train()
    turns.append((exchange.copy(), *exchange.exchange()))
  copies, wholes, attentions = zip(*turns[1:], strict=True)  # the first of each compiles
  exchange.train()
  with measuring.PeakMemory() as memory:
    exchange.exchange()
  num_bytes = trees.num_bytes(exchange.key_layers())
  return {
    "model": size, "candidates": candidates, "nodes": nodes, "key_layer_mb": num_bytes / nodes / 1e6,
    "copy_ms": measuring.spread(1000 * seconds for seconds in copies),
    "attention_ratio": measuring.ratios(attentions, copies), "exchange_ratio": measuring.ratios(wholes, copies),
    "extra_memory_ratio": memory.bytes / num_bytes, "extra_memory_mb": memory.bytes / 1e6,
  }


def main(argv: Sequence[str] | None = None) -> list[measuring.Table]:
  """Prints the table."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--models", default="tiny,10m,75m", help="of " + ", ".join(setups.MODELS))
  parser.add_argument("--candidates", default="everybody,both", help="everybody, siblings, both")
  parser.add_argument("--nodes", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=5)
  args = measuring.parse(parser, argv, models=setups.MODELS, candidates=("everybody", "siblings", "both"))
  if args.nodes < 4 or args.nodes % 2:
    parser.error(f"--nodes={args.nodes}: expected an even number of at least 4, half of them for each federation")
  table = measuring.Table(f"Exchange of the key layers of {args.nodes} nodes", COLUMNS)
  for size in args.models:
    for candidates in args.candidates:
      table.add(measuring.in_child(measure, size=size, nodes=args.nodes, candidates=candidates, repeats=args.repeats))
  measuring.finish(args, [table])
  return [table]


if __name__ == "__main__":
  main()
