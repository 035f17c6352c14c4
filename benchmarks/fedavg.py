"""A round of FedAvg, here and written with DrJAX: tokens per second, memory, and that both give the same model.

  python -m benchmarks.fedavg [--models=tiny,10m] [--nodes=4,16] [--moments=keep,reset] [--repeats=5] [--out=FILE]

DrJAX (github.com/google-research/drjax) is a library for such rounds: broadcast the model, map the clients' local
steps, reduce by a weighted mean. The round here is `Engine.down`, `Engine.train` and `Engine.up` of `fedavg`. Both
have the same model functions, clipping, AdamW, rates, weights and windows, which start as NumPy arrays; DrJAX's round
is one jitted program, with donated state and its clients on a mesh axis of their own, whose local steps are the plain
Optax loop of `setups.local_steps`. `moments` says whether clients keep AdamW's moments from round to round or start
from zero each time.

Memory is what two rounds take at their peak, the state that lives between them included, after a first one that
compiles; each contender in a process of its own (`measuring.PeakMemory`). The models are compared after the first
round: the largest difference of any parameter, in float32 and with an epsilon of AdamW that keeps it from blowing
rounding errors of tiny gradients up to whole steps.
"""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring, setups
from worldlm_jax import config as c, model, partition, rngs, trees

EPSILON = 1e-3  # of AdamW where models are compared
COLUMNS = {"model": "model", "nodes": "nodes", "moments": "moments", "tokens_per_second": "tokens/s",
           "drjax_tokens_per_second": "DrJAX, tokens/s", "ratio": "ratio of tokens/s", "peak_mb": "peak memory, MB",
           "drjax_peak_mb": "DrJAX, MB", "memory_ratio": "ratio of memory", "difference": "largest difference"}


class DrJaxRounds:
  """FedAvg as a DrJAX program."""

  def __init__(self, own: setups.Rounds):
    import drjax  # type: ignore[import-untyped]

    config, arch = own.config, own.arch
    clients = len(own.text_tokens)
    loop, tx = setups.local_steps(arch, config), setups.adamw(config)
    keeps = config.optimizer.moments == "keep"

    @drjax.program(placements={partition.NODE: clients})
    def round_(params: model.Params, state: Any, windows: jax.Array, rates: jax.Array, weights: jax.Array) -> tuple:
      def client(params: model.Params, state: Any, windows: jax.Array) -> tuple[model.Params, Any]:
        params, state, _ = loop(params, state if keeps else tx.init(params), windows, rates)
        return params, state if keeps else None

      trained, state = drjax.map_fn(client, (drjax.broadcast(params), state, windows))
      # reduce_weighted_mean wants one weight per client for every leaf, in its shape.
      each = jax.tree.map(lambda leaf: weights.reshape(-1, *[1] * (leaf.ndim - 1)), trained)
      return drjax.reduce_weighted_mean(trained, each), state

    def begin(key: jax.Array) -> tuple[model.Params, Any]:
      params = model.init(arch, key)
      every = lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape))
      return params, jax.tree.map(every, tx.init(params)) if keeps else None

    self._begin, self._key = jax.jit(begin), rngs.key(config.seed, "init")
    # In the order of the level that trains: each node's windows, and its text as its weight.
    self._windows = setups.random_windows(config, clients)
    self._rates = setups.rates(config)
    self._weights = np.array(list(own.text_tokens.values()), np.float32)
    # The model's own constraints know this axis, and leave it alone.
    self._mesh = jax.make_mesh((1,), (partition.NODE,), axis_types=(jax.sharding.AxisType.Auto,),
                               devices=jax.devices()[:1])
    self._round = jax.jit(round_, donate_argnums=(0, 1))
    self.begin()

  def begin(self) -> None:
    """Starts from the initial model."""
    self.params, self.state = self._begin(self._key)

  def end(self) -> None:
    """Lets go of all arrays."""
    self.params = self.state = None

  def round(self) -> Any:
    """One round; gives the new model and the clients' moments."""
    with jax.set_mesh(self._mesh):
      self.params, self.state = self._round(self.params, self.state, self._windows, self._rates, self._weights)
    return self.params, self.state


def contenders(setting: dict[str, Any], epsilon: float) -> dict[str, Callable[[], Any]]:
  """By name, what sets a contender up."""

  def own() -> setups.Rounds:
    config = setups.config(
      setting["model"], (setting["nodes"],), algorithm="fedavg", local_steps=setting["local_steps"],
      batch_size=setting["batch_size"], sequence_length=setting["sequence_length"],
    )
    config.optimizer = c.OptimizerConfig(moments=setting["moments"], epsilon=epsilon)
    return setups.Rounds(config)

  return {"own": own, "drjax": lambda: DrJaxRounds(own())}


def peak_bytes(name: str, setting: dict[str, Any]) -> int:
  """The memory of one contender's rounds."""
  contender = contenders(setting, c.OptimizerConfig().epsilon)[name]()
  for _ in range(2):  # compiles; JAX takes what a program gave, for the next call of it, for another kind of argument
    jax.block_until_ready(contender.round())
  contender.end()
  with measuring.PeakMemory() as memory:
    contender.begin()
    for _ in range(2):
      jax.block_until_ready(contender.round())
  return memory.bytes


def throughput(setting: dict[str, Any], repeats: int) -> dict[str, Any]:
  """Both contenders' tokens per second and how far apart their models are."""
  both = {name: make() for name, make in contenders(setting, EPSILON).items()}
  for contender in both.values():
    contender.round()
  ours, theirs = trees.take(both["own"].state[0].params, 0), both["drjax"].params
  difference = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b), initial=0)), ours, theirs)))
  moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b), initial=0)), ours,
                       both["own"].engine.initial_params())
  seconds = measuring.interleaved({name: contender.round for name, contender in both.items()}, repeats)
  tokens = both["own"].tokens
  return {
    "tokens_per_second": tokens / measuring.spread(seconds["own"]).median,
    "drjax_tokens_per_second": tokens / measuring.spread(seconds["drjax"]).median,
    "ratio": measuring.ratios(seconds["drjax"], seconds["own"]), "difference": difference,
    "largest_step": max(jax.tree.leaves(moved)),
  }


def measure(setting: dict[str, Any], repeats: int) -> dict[str, Any]:
  """One line of the table."""
  peak = {name: measuring.in_child(peak_bytes, name=name, setting=setting) for name in ("own", "drjax")}
  found = measuring.in_child(throughput, setting=setting, repeats=repeats)
  return setting | found | {
    "peak_mb": peak["own"] / 1e6, "drjax_peak_mb": peak["drjax"] / 1e6, "memory_ratio": peak["own"] / peak["drjax"],
  }


def main(argv: Sequence[str] | None = None) -> list[measuring.Table]:
  """Prints the table."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--models", default="tiny,10m", help="of " + ", ".join(setups.MODELS))
  parser.add_argument("--nodes", default=[4, 16], type=measuring.whole_numbers)
  parser.add_argument("--moments", default="keep,reset")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--local_steps", type=int, default=10)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--sequence_length", type=int, default=128)
  args = measuring.parse(parser, argv, models=setups.MODELS, moments=("keep", "reset"))
  if importlib.util.find_spec("drjax") is None:
    parser.error("drjax is not installed; pip install -e '.[bench]', or pip install drjax")
  table = measuring.Table(_title(args), COLUMNS)
  for size in args.models:
    for moments in args.moments:
      for nodes in args.nodes:
        table.add(measure({
          "model": size, "nodes": nodes, "moments": moments, "local_steps": args.local_steps,
          "batch_size": args.batch_size, "sequence_length": args.sequence_length,
        }, args.repeats))
  measuring.finish(args, [table])
  return [table]


def _title(args: argparse.Namespace) -> str:
  return f"FedAvg against DrJAX, {args.local_steps} local steps of {args.batch_size} x {args.sequence_length} tokens"


if __name__ == "__main__":
  main()
