"""The folder of a run: who has it, what it is a run of, and whether it may be continued."""

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from worldlm_jax import checks, config as config_lib, metrics
from worldlm_jax.data import tokenizer
from worldlm_jax.federation import Federation

TOKENIZER = "tokenizer.json"  # in the folder: a copy of the run's tokenizer, where it came from a file
LOCK = "lock"  # in the folder: says who has it, or had it last; a lock of the file system's says whether somebody does
SECONDS_TO_LET_GO = 120.0  # that a network file system may take to notice that a process on another machine is gone
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml-collections", "numpy")


def describe(config: config_lib.Config, federation: Federation, digests: Mapping[str, str]) -> dict[str, Any]:
  """What a run is of: its config, and every node's resolved settings and text."""
  nodes = {
    member.path: {
      "name": member.name,
      "parent": member.parent,
      "settings": config_lib.to_dict(dataclasses.asdict(member.settings)),
      "data": config_lib.to_dict(member.data),
      "digest": digests.get(member.path),
    }
    for member in federation.members
  }
  return {"config": config_lib.to_dict(config), "nodes": nodes}


def environment() -> dict[str, Any]:
  """Versions and commit, for the record."""
  versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
  try:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    commit = None
  return {
    "versions": versions | {"python": platform.python_version()}, "commit": commit,
    "devices": [str(device) for device in jax.devices()],
  }


def check_writable(workdir: Path) -> None:
  """Raises `ValueError` unless the folder, or the one that it would be made in, can be written to. Changes nothing."""
  there = next(folder for folder in (workdir, *workdir.absolute().parents) if os.path.exists(folder))
  checks.require(there.is_dir() and os.access(there, os.W_OK | os.X_OK), "--workdir", str(workdir),
                 "a folder that can be written to", f"{there} is none; choose another")


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
  """Makes the folder, and keeps other processes out of it; whoever dies lets go of it.

  Where the file system has no locks, nobody is kept out.

  Raises:
    ValueError: another process has it, or it holds something else than a run.
  """
  _make(workdir)
  with (workdir / LOCK).open("a+", encoding="utf-8") as file:
    begun = time.monotonic()
    while not _lock(file):
      file.seek(0)
      holder = file.read().strip() or "another process"
      here = holder.endswith(f" on {platform.node()}")
      checks.require(not here and time.monotonic() - begun < SECONDS_TO_LET_GO, "--workdir", str(workdir),
                     f"a folder that no other process works in ({holder} does)",
                     "wait until it has ended, or choose another folder")
      time.sleep(1.0)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    yield


def claim(workdir: Path, description: dict[str, Any], *, overwrite: bool) -> list[str]:
  """Makes the folder this run's own, or finds that it already is.

  Returns:
    What has changed around the run since it began, such as library versions, in words.

  Raises:
    ValueError: it holds something else, or a run that differs; names the fields.
  """
  _make(workdir)
  record = workdir / "config.json"
  there = read_record(record)
  if there and overwrite:
    for name in ("checkpoints", "damaged", "tensorboard", "report"):
      shutil.rmtree(workdir / name, ignore_errors=True)
    for name in ("metrics.jsonl", "receipts.jsonl", "summary.json", "stopped.json", "wandb_id.txt", "report.html",
                 TOKENIZER, "config.json"):
      (workdir / name).unlink(missing_ok=True)
  elif there:
    found = checks.differences(comparable(there), comparable(description))
    checks.require(not found, "--workdir", str(workdir), "a new folder or one that holds a run of this configuration",
                   f"it differs in: {'; '.join(found[:8])}{f' and {len(found) - 8} more' if len(found) > 8 else ''}. "
                   "Choose another folder, or start afresh with --overwrite")
    return _changed_versions(there)
  metrics.write_json(record, description | environment())
  return []


def keep_tokenizer(workdir: Path, spec: str) -> None:
  """Copies the tokenizer that `config.data.tokenizer` names beside the run's models, which are nothing without it."""
  source = tokenizer.file(spec)
  if source is not None and not (workdir / TOKENIZER).exists():
    partial = workdir / f"{TOKENIZER}.new"
    shutil.copyfile(source, partial)
    partial.replace(workdir / TOKENIZER)


def check_space(workdir: Path, state_bytes: int, config: config_lib.CheckpointConfig) -> None:
  """Raises `ValueError` unless the checkpoints that are kept, and one more being written, will fit."""
  kept = sorted((workdir / "checkpoints").glob("*")) if workdir.exists() else []
  needed = state_bytes * max(1, config.keep_last + config.keep_best + 1 - len(kept))
  existing = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
  free = shutil.disk_usage(existing).free
  checks.require(
    free > needed, "--workdir", str(workdir),
    f"a disk with {needed / 1e9:.2f} GB free for checkpoints ({state_bytes / 1e9:.2f} GB each)",
    f"{free / 1e9:.2f} GB are free: make room, choose another folder, or set config.checkpoint.keep_last or keep_best "
    "lower",
  )


def _make(workdir: Path) -> None:
  """Makes the folder. Raises `ValueError` if it holds something else than a run, or the beginnings of one."""
  checks.require(not workdir.exists() or workdir.is_dir(), "--workdir", str(workdir), "a folder")
  metrics.check_no_links_out("--workdir", workdir)
  begun = (LOCK, "config.json.new")
  foreign = workdir.exists() and any(path.name not in begun for path in workdir.iterdir())
  checks.require(not foreign or read_record(workdir / "config.json") is not None, "--workdir", str(workdir),
                 "a new or empty folder, or one that holds a run (it has files, but no config.json of a run)",
                 "choose another folder; --overwrite does not delete what is not a run's")
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    checks.fail("--workdir", str(workdir), "a folder that can be made", f"{error.strerror}; choose another")


def _lock(file: TextIO) -> bool:
  """Whether the file is ours now, until it is closed, or the file system cannot say."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    return error.errno not in (errno.EAGAIN, errno.EACCES)
  return True


def _changed_versions(there: dict[str, Any]) -> list[str]:
  now = environment()["versions"]
  return [f"{name} {old} then, {now.get(name)} now" for name, old in there["versions"].items() if now.get(name) != old]


def read_record(path: Path) -> dict[str, Any] | None:
  """The content of a run's config.json; None where there is none, or one that is not a run's."""
  try:
    content = checks.read_json(path)
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return None
  content = content if isinstance(content, dict) else {}
  if not all(isinstance(content.get(name), dict) for name in ("config", "nodes", "versions")):
    return None
  nodes = all(isinstance(node, dict) and {"settings", "digest"} <= node.keys() for node in content["nodes"].values())
  return content if nodes and isinstance(content["config"].get("data"), dict) else None


def comparable(description: dict[str, Any]) -> dict[str, Any]:
  """What two runs must have in common.

  Not where the tree came from, since the nodes say it all: folders may move as long as the tokens of the text,
  whose digest is compared, are the same. Not what changes no result, such as how many checkpoints are kept or who
  watches.
  """
  nodes = description["nodes"].items()
  other = ("federation", "node", "checkpoint", "logging", "nodes_at_once", "mesh", "waiting")
  config = {k: v for k, v in description["config"].items() if k not in other}
  config["data"] = {k: v for k, v in config["data"].items() if k not in ("cache", "tokenizer")}
  return {"config": config} | {
    f"node {path!r}": {"settings": value["settings"], "text, by its digest": value["digest"]} for path, value in nodes
  }
