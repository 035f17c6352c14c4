"""What one hostile member of six does to the others, and what guards and robust aggregation leave of it.

  python -m benchmarks.hostile [--attacks=nan,100x,flip,noise,constant] [--defences=none,guards,median]
                               [--algorithm=worldlm] [--branching=2,3] [--hostile=a/a] [--rounds=12]
                               [--local_steps=25] [--out=FILE]

A federation of artificial languages trains with the engine of the program, once for each attack and defence. Between
its training and its federation's up-phase, the hostile member's update is replaced: by NaN, by 100 times itself (100x),
by its negative (flip), or by a constant of the length of its own, the same in every round (constant). With `noise` its
text is random bytes, and what it learns from them is sent as it is. `none` attacks nobody, and with `lost` nothing of
that member's ever arrives.

Shown is the mean personalised test perplexity of the other members, per byte, and how much worse that is than without
an attack under the same defence (`over clean`); and of how many of its updates the guards rejected.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from worldlm_jax import (
  algorithms,
  config as c,
  engine as engine_lib,
  federation as federation_lib,
  feed,
  local,
  model,
  partition,
  schedule,
  state as state_lib,
  trees,
)
from worldlm_jax.data import batches, evaluation, tokenizer as tokenizer_lib
from worldlm_jax.exchange import guards
from worldlm_jax.scoring import Score

ATTACKS = ("none", "lost", "nan", "100x", "flip", "noise", "constant")
GUARDS = c.GuardConfig(norm_ratio=5.0, opposition=0.05, failing="leave_out")
DEFENCES: Mapping[str, tuple[c.GuardConfig, c.BackboneConfig]] = {
  "none": (c.GuardConfig(), c.BackboneConfig()),
  "guards": (GUARDS, c.BackboneConfig()),
  "trimmed": (GUARDS, c.BackboneConfig(aggregate="trimmed_mean", trim=0.34, weights="uniform")),
  "median": (GUARDS, c.BackboneConfig(aggregate="median", weights="uniform")),
  "bounded": (GUARDS, c.BackboneConfig(aggregate="norm_bounded", weights="uniform")),
}
COLUMNS = {"defence": "defence", "attack": "attack", "perplexity": "others' perplexity", "over_clean": "over clean",
           "rejected": "updates rejected", "rejected_honest": "honest ones rejected"}


def config(args: argparse.Namespace, defence: str) -> c.Config:
  """The experiment without an attack."""
  tree = c.SyntheticTree(tuple(args.branching), divergence=0.3, train_bytes=60_000, eval_bytes=15_000)
  limits, backbone = DEFENCES[defence]
  return c.Config(
    algorithm=args.algorithm, rounds=args.rounds, seed=args.seed, federation=c.FederationConfig(synthetic=tree),
    guards=limits, backbone=backbone,
    node=c.NodeSettings(local_steps=args.local_steps, batch_size=4, learning_rate=6e-3, warmup_steps=20),
    model=model.PRESETS["nano"](), data=c.DataConfig(sequence_length=64),
  )


class Federation:
  """Trains one tree under one defence, from the start for each attack; compiles once."""

  def __init__(self, config: c.Config, hostile: str):
    tokenizer = tokenizer_lib.load(config.data.tokenizer)
    self.config, self.hostile = config, hostile
    self.federation = algorithms.arranged(config, federation_lib.resolve(config))
    arch = model.architecture(config.model, tokenizer.vocab_size, num_key_layers=algorithms.num_key_layers(config))
    sources = [(m.path, m.data) for m in self.federation.members if m.data is not None]
    self.texts = batches.load(sources, config.data, tokenizer)
    self.tokens = {path: text.text.splits["train"].counts.tokens for path, text in self.texts.items()}
    algorithm = algorithms.make(config, arch, self.federation)
    algorithm = algorithm._replace(tracks=algorithm.shares)  # an attack is made of the update
    self.engine = engine_lib.Engine(
      config, self.federation, arch, partition.make_mesh(jax.devices()[:1]), algorithm, self.tokens,
      [e.arrays() for e in self._evaluations("valid", 8)],
    )
    self._test = self._evaluations("test", 0)

  def _evaluations(self, split: str, count: int) -> list[evaluation.Evaluation]:
    width = self.config.data.sequence_length + 1
    return [
      evaluation.Evaluation([getattr(self.texts[m.path], split) if m.path in self.texts else None for m in level],
                            count, width) for level in self.federation.levels
    ]

  def run(self, attack: str) -> tuple[float, int, int]:
    """The others' mean perplexity, and how many updates of the hostile member and of others were rejected."""
    settings = self.federation.by_path[self.hostile].settings
    settings.loss_before = float(attack == "lost")
    rounds = schedule.whole_run(self.config, self.federation)
    settings.loss_before = 0.0
    work = feed.workloads(self.config, self.federation, self.texts, self.tokens, rounds, (0, 0), {})
    state, rejected, scores = self.engine.init(), {True: 0, False: 0}, dict[str, float]()
    for index, steps in enumerate(rounds):
      for step in steps:
        if step.kind == "down":
          state, _ = self.engine.down(state, step, index)
        elif step.kind == "train":
          state, _ = self.engine.train(state, step.level, self._work(attack, step, next(work)))
          if index + 1 == len(rounds):
            scores |= self._scores(state, step)
          state = self._attacked(attack, state, step.level)
        else:
          state, log = self.engine.up(state, step, index)
          for m, verdict in zip(self.federation.levels[step.level + 1], np.asarray(log["verdict"]), strict=False):
            rejected[m.path == self.hostile] += guards.VERDICTS[verdict] != ""
    return float(np.mean([*scores.values()])), rejected[True], rejected[False]

  def _row(self, level: int) -> int | None:
    paths = [m.path for m in self.federation.levels[level]]
    return paths.index(self.hostile) if self.hostile in paths else None

  def _work(self, attack: str, step: schedule.Step, work: local.Workload) -> local.Workload:
    row = self._row(step.level)
    if attack == "noise" and row is not None:
      draw = np.random.default_rng(int(work.windows[row].sum()) % 2**32)
      work.windows[row] = draw.integers(0, 256, work.windows[row].shape)
    return work

  def _attacked(self, attack: str, state: state_lib.State, level: int) -> state_lib.State:
    row = self._row(level)
    if attack in ("none", "lost", "noise") or row is None:
      return state
    sent = trees.take(state[level].update, row)
    if attack == "constant":
      leaves, structure = jax.tree.flatten(sent)
      keys = jax.random.split(jax.random.key(0), len(leaves))
      random = jax.tree.unflatten(structure, [
        jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
      ])
      length, own = (jnp.linalg.norm(jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]))
                     for tree in (random, sent))
      sent = jax.tree.map(lambda leaf: leaf * own / length, random)
    else:
      sent = jax.tree.map(lambda leaf: leaf * {"nan": math.nan, "100x": 100.0, "flip": -1.0}[attack], sent)
    own = state[level]
    update = jax.tree.map(lambda leaf, new: leaf.at[row].set(new), own.update, sent)
    params = own.params
    if not self.engine.algorithm.goes_own_way:  # what is averaged are models, and the member's own does not last
      moved = {part: trees.subtract(update[part], own.update[part]) for part in update}
      params = params | {part: trees.add(params[part], moved[part]) for part in moved}
    changed = own._replace(update=update, params=params)
    changed = jax.device_put(changed, jax.tree.map(lambda leaf: leaf.sharding, own))
    return (*state[:level], changed, *state[level + 1 :])

  def _scores(self, state: state_lib.State, step: schedule.Step) -> dict[str, float]:
    found, test = self.engine.score(state, step.level, self._test[step.level], step.active), self._test[step.level]
    sums = engine_lib.scores_by_row(found, len(step.active))
    return {
      m.path: Score(float(sums[i]), test.num_targets(i)).perplexity
      for i, m in enumerate(self.federation.levels[step.level]) if step.active[i] and m.path != self.hostile
    }


def main(argv: Sequence[str] | None = None) -> list[measuring.Table]:
  """Prints the table."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--attacks", default="nan,100x,flip,noise,constant", help="of " + ", ".join(ATTACKS))
  parser.add_argument("--defences", default="none,guards,median", help="of " + ", ".join(DEFENCES))
  parser.add_argument("--algorithm", default="worldlm", choices=("worldlm", "fedavg", "hierfavg"))
  parser.add_argument("--branching", default=[2, 3], type=measuring.whole_numbers)
  parser.add_argument("--hostile", default="a/a", help="path of the hostile member")
  parser.add_argument("--rounds", type=int, default=12)
  parser.add_argument("--local_steps", type=int, default=25)
  parser.add_argument("--seed", type=int, default=0)
  args = measuring.parse(parser, argv, attacks=ATTACKS, defences=tuple(DEFENCES))
  table = measuring.Table(f"One hostile member among {math.prod(args.branching)}", COLUMNS)
  for defence in args.defences:
    federation = Federation(config(args, defence), args.hostile)
    clean = None
    for attack in dict.fromkeys(["none", "lost", *args.attacks]):
      perplexity, rejected, honest = federation.run(attack)
      clean = clean or perplexity
      row: dict[str, Any] = {"defence": defence, "attack": attack, "perplexity": perplexity, "rejected": rejected,
                             "over_clean": f"{100 * (perplexity / clean - 1):+.1f} %", "rejected_honest": honest}
      table.add(row)
  measuring.finish(args, [table])
  return [table]


if __name__ == "__main__":
  main()
