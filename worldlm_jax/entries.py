"""The entries of a comparison as configs, checked before anything runs: their names, fields and fairness."""

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from worldlm_jax import algorithms, checks, federation as federation_lib, schedule
from worldlm_jax.config import Comparison, Config, Entry

# What must be the same for all entries, and what of it decides neither on the data nor on the start.
HELD = ("seed", "federation", "data", "model", "evaluation", "node.max_train_bytes")
FREE = ("model.key_layer_share", "evaluation.acceptance_windows")


@dataclasses.dataclass(frozen=True, eq=False)
class Planned:
  """One run of a comparison."""

  entry: str
  seed: int
  config: Config

  @property
  def folder(self) -> PurePosixPath:
    """Of the run, within that of the comparison."""
    return PurePosixPath("runs") / self.entry / f"seed{self.seed}"

  def __str__(self) -> str:
    return f"{self.entry}, seed {self.seed}"


def plan(comparison: Comparison) -> list[Planned]:
  """All runs of a comparison, every entry with the first seed first.

  Raises:
    checks.InputError: a name, field or value is wrong, or nodes would not train on equally many windows.
  """
  _check(comparison)
  first: tuple[str, dict[str, tuple[int, int]]] | None = None
  for entry in comparison.entries:
    config = _configured(comparison.base, entry, comparison.seeds[0])
    try:
      windows = windows_per_node(config)
    except checks.InputError as error:
      raise checks.InputError(f"entry {entry.name!r}: {error}") from None
    first = first or (entry.name, windows)
    _check_windows(entry.name, windows, *first)
  return [
    Planned(entry.name, seed, _configured(comparison.base, entry, seed))
    for seed in comparison.seeds for entry in comparison.entries
  ]


def chosen(comparison: Comparison, only: Iterable[str]) -> set[str]:
  """The names of the entries to run: those of `only`, or all where it is empty."""
  names = [entry.name for entry in comparison.entries]
  for name in only:
    checks.one_of("--only", name, names)
  return set(only) or set(names)


def windows_per_node(config: Config) -> dict[str, tuple[int, int]]:
  """By path, the optimizer steps of a whole run and the windows of each, for the nodes that train.

  Raises `InputError` where the config is wrong.
  """
  federation = federation_lib.resolve(config)
  steps: dict[str, int] = {}
  for stage in schedule.stages(federation, config.schedule):
    for path, count in schedule.steps_per_round(federation, stage).items():
      steps[path] = steps.get(path, 0) + config.rounds * count
  return {m.path: (steps[m.path], m.settings.batch_size) for m in federation.members if steps.get(m.path)}


def _check(comparison: Comparison) -> None:
  entries, seeds = comparison.entries, comparison.seeds
  checks.require(isinstance(comparison.base, Config), "config.base", comparison.base, "a Config")
  ok = isinstance(entries, (list, tuple)) and len(entries) > 0 and all(isinstance(e, Entry) for e in entries)
  checks.require(ok, "config.entries", entries, "a list with at least one Entry")
  ok = isinstance(seeds, tuple) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
  checks.require(ok and 0 < len(set(seeds)) == len(seeds), "config.seeds", seeds,
                 "different whole numbers, at least one", "such as --config.seeds=0,1,2")
  names = [entry.name for entry in entries]
  for i, name in enumerate(names):
    ok = isinstance(name, str) and re.fullmatch(r"\w[\w.+-]{0,63}", name, re.ASCII) is not None
    checks.require(ok, f"config.entries[{i}].name", name, "up to 64 letters, digits and any of _ . + -",
                   "it names the folder of the entry's runs")
    checks.require(name.lower() not in [other.lower() for other in names[:i]], f"config.entries[{i}].name", name,
                   "a name that no other entry has, in lower or upper case", "rename one of the two")
  checks.one_of("config.own", comparison.own, names)
  if comparison.alone:
    checks.require(comparison.alone in names, "config.alone", comparison.alone,
                   f"the entry that trains alone, one of {', '.join(map(repr, names))}, or '' for none",
                   checks.did_you_mean(comparison.alone, names))
  known = _field_names(Config)
  for entry in entries:
    checks.require(isinstance(entry.overrides, dict), f"entry {entry.name!r}: overrides", entry.overrides, "a dict")
    for name, value in entry.overrides.items():
      checks.require(name in known, f"entry {entry.name!r}: override", name,
                     "the dotted name of a field of Config, such as 'node.local_steps'",
                     checks.did_you_mean(name, known))
      checks.require(not _within(name, HELD) or _within(name, FREE), f"entry {entry.name!r}: override {name}", value,
                     f"none of what all entries share ({', '.join(HELD)})",
                     "seeds are set in config.seeds" if name == "seed" else f"set --config.base.{name} for all of them")


def _check_windows(name: str, windows: Mapping[str, tuple[int, int]], first_name: str,
                   first: Mapping[str, tuple[int, int]]) -> None:
  for path in sorted(windows.keys() | first.keys()):
    (steps, batch), (first_steps, first_batch) = windows.get(path, (0, 0)), first.get(path, (0, 0))
    checks.require(
      steps * batch == first_steps * first_batch, f"entry {name!r}: windows that node {path!r} trains on",
      steps * batch, f"{first_steps * first_batch}, as in entry {first_name!r}",
      f"all its optimizer steps x batch_size are {steps} x {batch} here and {first_steps} x {first_batch} there: "
      "change the overrides of rounds, node.local_steps or node.batch_size"
    )


def _configured(base: Config, entry: Entry, seed: int) -> Config:
  config = copy.deepcopy(base)
  config.seed = seed
  for dotted, value in entry.overrides.items():
    *parents, name = dotted.split(".")
    holder: Any = config
    for parent in parents:
      holder = getattr(holder, parent)
    setattr(holder, name, copy.deepcopy(value))
  return algorithms.adapted(config)  # as its run will record it


def _field_names(kind: type, prefix: str = "") -> list[str]:
  """The dotted names of the fields that hold values, not further fields."""
  found = []
  for field in dataclasses.fields(kind):
    if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
      found += _field_names(field.type, f"{prefix}{field.name}.")
    else:
      found.append(prefix + field.name)
  return found


def _within(name: str, sections: Iterable[str]) -> bool:
  return any(name == section or name.startswith(section + ".") for section in sections)
