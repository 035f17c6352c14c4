"""One node's model out of a run's work directory, finished or not: to be scored, exported or asked for text.

Nothing of the federation is needed but its record and its newest intact checkpoint: neither the texts nor the devices
that the run had. A node's model is the one in use (see exchange/trust.py): what its training made, mixed with its
parent's as far as it trusts the former. It is as the checkpoint has it, so a federation has merged its members since
it trained itself. The numbers of `summary["matrix"]` are of exactly these models, once a run is finished.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from worldlm_jax import (
  algorithms,
  checkpoint,
  checks,
  config as config_lib,
  model,
  trees,
  validation,
  workdir as workdir_lib,
)
from worldlm_jax.data import tokenizer as tokenizer_lib
from worldlm_jax.exchange import trust as trust_lib
from worldlm_jax.reporting import files


@dataclasses.dataclass(frozen=True)
class Released:
  """A node's model, and where it comes from."""

  path: str  # of the node; the root is ".", or ".." where the algorithm put a server above the tree
  arch: model.Architecture
  params: model.Params  # numpy, float32
  tokenizer: tokenizer_lib.Tokenizer
  config: config_lib.Config  # of the run, as far as the model is concerned: `algorithm`, `model` and `data`
  run: files.Run  # the tree, the settings of every node, its metrics and summary
  trust: float  # 1: the node's own training; 0: its parent's model
  round: int  # rounds finished at the checkpoint
  step: int  # phases of the next round done since; 0 after a finished run
  tokens_by_node: Mapping[str, int]  # that nodes had trained on by then, by path

  @property
  def tokens(self) -> int:
    """That the node itself had trained on by then."""
    return self.tokens_by_node.get(self.path, 0)

  @property
  def is_final(self) -> bool:
    """Whether the run is finished, so that what its summary says is about this model."""
    return self.run.summary is not None and (self.round, self.step) == (self.run.rounds_done, 0)


def load(
  workdir: str | Path, path: str, *, tokenizer: str = "", say: Callable[[str], None] | None = None
) -> Released:
  """The model in use of one node.

  Args:
    workdir: of a run of `worldlm_jax.main`, or of one of a comparison's.
    path: of the node, as in the run's records.
    tokenizer: "bytes" or a file, in the place of where the run found it.
    say: is told of damaged checkpoints that were passed over.

  Raises:
    checks.InputError: the folder holds no run with an intact checkpoint, the run has no such node, or the tokenizer is
      not where it was.
  """
  return load_nodes(workdir, [path], tokenizer=tokenizer, say=say)[0]


def load_nodes(
  workdir: str | Path, paths: Sequence[str], *, tokenizer: str = "", say: Callable[[str], None] | None = None
) -> list[Released]:
  """The models in use of several nodes, all in memory; see `load`."""
  run = open_run(workdir)
  check_nodes(run, paths)
  with files.as_written(run.folder):
    config = _config(run)
    loaded = tokenizer_lib.load(tokenizer or _tokenizer_of(run))
    arch = algorithms.architecture(config, loaded)
  stored, models = _newest(run, arch, paths, say or (lambda line: None))
  with files.as_written(stored.folder):
    now = stored.record
    return [
      Released(path, arch, params, loaded, config, run, trust, int(now["round"]), int(now["step"]), dict(now["tokens"]))
      for path, (params, trust) in zip(paths, models, strict=True)
    ]


def open_run(workdir: str | Path) -> files.Run:
  """What a run's folder says of it. Raises `InputError` where it holds none, or a comparison."""
  found = files.load(workdir)
  if isinstance(found, files.Comparison):
    runs = [str(run["workdir"]) for run in found.content["runs"]]
    checks.fail("--workdir", str(workdir), "the folder of a run, not of a comparison", f"name one of {', '.join(runs)}")
  return found


def check_nodes(run: files.Run, paths: Sequence[str]) -> None:
  """Raises `InputError` unless all of them are nodes of the run."""
  for path in paths:
    checks.require(path in run.tree.parents, "--node", path, f"the path of a node of {run.folder}",
                   checks.did_you_mean(path, run.tree.paths) or f"it has {', '.join(map(repr, run.tree.paths[:20]))}")


def _config(run: files.Run) -> config_lib.Config:
  """The parts of a run's config that make its models; fields that it did not know have their defaults."""
  record = run.record["config"]

  def known(kind: Any, values: Mapping[str, Any], name: str) -> Any:
    fields = {field.name for field in dataclasses.fields(kind)}
    foreign = sorted(values.keys() - fields)
    checks.require(not foreign, f"{run.folder / 'config.json'}: {name}", foreign, f"fields of {kind.__name__}",
                   f"the run was made by another version (commit {run.record.get('commit')})")
    return kind(**values)

  config = config_lib.Config(algorithm=run.algorithm)
  checks.one_of(f"{run.folder / 'config.json'}: algorithm", config.algorithm, config_lib.ALGORITHMS)
  config.model = known(config_lib.ModelConfig, record["model"], "model")
  config.model.attention = "auto"  # the run may have had another device
  config.data = known(config_lib.DataConfig, record["data"], "data")
  validation.validate(config)
  return config


def _tokenizer_of(run: files.Run) -> str:
  """The run's own copy of its tokenizer, or where it found it."""
  spec = str(run.record["config"]["data"]["tokenizer"])
  copy = run.folder / workdir_lib.TOKENIZER
  return str(copy) if spec != "bytes" and copy.exists() else spec


def _newest(
  run: files.Run, arch: model.Architecture, paths: Sequence[str], say: Callable[[str], None]
) -> tuple[checkpoint.Stored, list[tuple[model.Params, float]]]:
  """The newest checkpoint that can be read, and the nodes' parameters and trust in it."""
  folders = checkpoint.stored(run.folder / "checkpoints")
  for folder in folders:
    try:
      found = checkpoint.Stored(folder)
      return found, _models(found, run, arch, paths)
    except (checks.InputError, MemoryError, PermissionError):
      raise
    except Exception as error:  # whatever Orbax raises at what it cannot read
      say(f"checkpoint {folder.name} is damaged ({(str(error).splitlines() or [type(error).__name__])[0][:160]}); "
          "trying the one before it")
  checks.fail("--workdir", str(run.folder), "a run with a checkpoint that is intact",
              "all of them are damaged" if folders else "it has saved none yet")


def _models(
  stored: checkpoint.Stored, run: files.Run, arch: model.Architecture, paths: Sequence[str]
) -> list[tuple[model.Params, float]]:
  places = {path: _place(run, path) for path in paths}
  abstract = model.abstract_params(arch)
  found: dict[str, tuple[model.Params, float]] = {}
  for level in sorted({level for level, _ in places.values()}):
    here = [path for path in places if places[path][0] == level]
    rows = [places[path][1] for path in here]
    _check_structure(stored, level, abstract)
    used = stored.rows(level, "params", abstract, rows)
    trusts = stored.rows(level, "trust", np.float32(0), rows)
    if (trusts != 1).any():
      with jax.default_device(jax.local_devices(backend="cpu")[0]):  # all of them may be too many for an accelerator
        used = jax.device_get(trust_lib.used(used, _parents(stored, run, abstract, level, here), trusts))
    for i, path in enumerate(here):
      found[path] = jax.tree.map(lambda leaf, i=i: leaf[i], used), float(trusts[i])
  for path, (params, _) in found.items():
    bad = [jax.tree_util.keystr(place) for place, leaf in jax.tree_util.tree_leaves_with_path(params)
           if not np.isfinite(leaf).all()]
    checks.require(not bad, "--node", path, f"a model of finite numbers, but of checkpoint {stored.folder.name} "
                   f"{', '.join(bad[:3])} is not", run.stopped or "the run must have diverged")
  return [found[path] for path in paths]


def _parents(
  stored: checkpoint.Stored, run: files.Run, abstract: trees.PyTree, level: int, paths: Sequence[str]
) -> model.Params:
  """The parents' models as the nodes of one level know them, leaves `[paths, ...]`; see `engine.Engine._used`."""
  if any(name.startswith(f"[{level}].handed") for name in stored.structure):
    return stored.rows(level, "handed", abstract, [_place(run, path)[1] for path in paths])
  return stored.rows(level - 1, "params", abstract, [_place(run, str(run.tree.parents[path]))[1] for path in paths])


def _place(run: files.Run, path: str) -> tuple[int, int]:
  """A node's level, and its row there: records name the nodes level by level, as the state stacks them."""
  level = run.tree.depth(path)
  return level, [other for other in run.record["nodes"] if run.tree.depth(other) == level].index(path)


def _check_structure(stored: checkpoint.Stored, level: int, abstract: model.Params) -> None:
  """Raises `InputError` unless the checkpoint's models are of the shapes that this version makes of the config."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
    name = f"[{level}].params{jax.tree_util.keystr(path)}"
    saved = stored.structure.get(name, "nothing")
    expected = str(list(leaf.shape))[1:-1]
    fits = saved.startswith("float32[") and saved.removesuffix("]").partition(", ")[2] == expected
    checks.require(fits, f"{stored.folder}: {name}", saved, f"float32[nodes, {expected}]",
                   "load it with the version of the package that the run was made with, which its config.json names")
