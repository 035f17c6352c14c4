"""What fewer bits per value cost in accuracy, on the updates of a real training.

  python benchmarks/payload.py [--model=tiny] [--rounds=8] [--local_steps=50]

One node trains on an artificial language, byte by byte, and after each round sends what has changed (see
`worldlm_jax/exchange/payload.py`). For each kind of payload: its bytes and how often they go into those of float32;
the error of what arrives of an update by itself, in norms of that update, as the mean over the rounds; and the error of
everything that has arrived by the end, in norms of the sum of the updates, without error feedback and with it. Prints
Markdown.
"""

import argparse
import functools
import itertools
from collections.abc import Iterator

import jax
import numpy as np
import optax

from worldlm_jax import config as c, local, model, trees
from worldlm_jax.data import synthetic
from worldlm_jax.exchange import payload

LENGTH, SEPARATOR = 128, 256


def windows(count: int) -> np.ndarray:
  """Windows of an artificial language: int32 `[count, LENGTH + 1]`."""
  texts = synthetic.language(c.Synthetic(lineage="north/coast")).texts(np.random.default_rng(0))
  tokens = itertools.chain.from_iterable((SEPARATOR, *text.encode()) for text in texts)
  return np.fromiter(tokens, np.int32, count * (LENGTH + 1)).reshape(count, LENGTH + 1)


def updates(size: str, rounds: int, steps: int) -> Iterator[trees.PyTree]:
  """What changes in each round of a training."""
  arch = model.architecture(model.PRESETS[size](), SEPARATOR + 1)
  settings, optimizer = c.NodeSettings(), c.OptimizerConfig()
  batch = settings.batch_size
  batches = windows(rounds * steps * batch).reshape(rounds, steps, batch, LENGTH + 1)
  rates = local.learning_rates(settings, rounds * steps).reshape(rounds, steps)
  params = jax.jit(model.init, static_argnums=0)(arch, jax.random.key(0))
  state = jax.jit(local.optimizer(optimizer).init)(params)
  train = jax.jit(functools.partial(local.train_node, arch, optimizer))
  for r in range(rounds):
    settled = map(np.float32, (settings.weight_decay, settings.clip_norm, 1))
    trained = train(params, state, local.Workload(batches[r], rates[r], np.int32(steps), np.int32(batch), *settled))
    yield trees.subtract(trained.params, params)
    params, state = trained.params, trained.opt_state


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="tiny", choices=model.PRESETS)
  parser.add_argument("--rounds", type=int, default=8)
  parser.add_argument("--local_steps", type=int, default=50)
  args = parser.parse_args()
  if min(args.rounds, args.local_steps) < 1:
    parser.error(f"--rounds={args.rounds} --local_steps={args.local_steps}: expected at least 1 of both")
  sent = list(updates(args.model, args.rounds, args.local_steps))
  total, nothing = functools.reduce(trees.add, sent), trees.zeros_like(sent[0])
  error_of = jax.jit(lambda found, wanted: optax.tree.norm(trees.subtract(found, wanted)) / optax.tree.norm(wanted))
  print("| kind | bytes | float32 / kind | error of an update | of all, no feedback | of all, with feedback |")
  print("|---|--:|--:|--:|--:|--:|")
  for kind in payload.KINDS:
    transmit = jax.jit(functools.partial(payload.transmit, kind=kind))
    alone = [transmit(update, nothing)[0] for update in sent]
    single = np.mean([error_of(*pair) for pair in zip(alone, sent, strict=True)])
    error, arrived = nothing, nothing
    for update in sent:
      part, error = transmit(update, error)
      arrived = trees.add(arrived, part)
    size, ratio = payload.num_bytes(nothing, kind), trees.num_bytes(nothing) / payload.num_bytes(nothing, kind)
    whole = [error_of(found, total) for found in (functools.reduce(trees.add, alone), arrived)]
    print(f"| {kind} | {size:,} | {ratio:.2f} | {single:.2%} | {whole[0]:.2%} | {whole[1]:.2%} |", flush=True)


if __name__ == "__main__":
  main()
