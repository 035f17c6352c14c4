"""Records on disk: JSON that is never half written, and JSONL that a resumed run continues."""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from worldlm_jax import checks


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file in one step: readers see the old content or the new."""
  _replace(path, json.dumps(_finite(value), indent=2) + "\n")


def check_writable(name: str, path: Path) -> None:
  """Raises `InputError` unless a file can be written at `path`, whose folder is made; `name` is the flag's."""
  checks.require(not path.is_dir(), name, str(path), "a file, but it is a folder")
  partial = path.with_name(path.name + ".new")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    partial.unlink()
  except OSError as error:
    checks.fail(name, str(path), f"a file that can be written ({error.strerror})", "choose another place")


def check_no_links_out(name: str, folder: Path) -> None:
  """Raises `InputError` where something in a folder that will be written to is a link that leads out of it.

  Within `wandb/`, Weights & Biases has links of its own to its logs.
  """
  if not folder.is_dir():
    return
  real = folder.resolve()
  links = (path for path in folder.rglob("*") if path.is_symlink() and folder / "wandb" not in path.parents)
  out = [str(link) for link in links if not _resolved(link).is_relative_to(real)]
  checks.require(not out, name, str(folder), "a folder without links that lead out of it",
                 f"remove {', '.join(sorted(out)[:3])}, or put there what it leads to")


def _resolved(link: Path) -> Path:
  try:
    return link.resolve()
  except (OSError, RuntimeError):  # links that lead to each other
    return link.absolute()


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
  """Appends one line per row, and returns once they would survive a power cut."""
  with _no_space_explained(path), path.open("a", encoding="utf-8") as file:
    _write(file, "".join(json.dumps(_finite(row)) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
  """All complete rows, up to a line that is none: the last one may have been cut short."""
  rows = []
  for line in path.read_bytes().splitlines() if path.exists() else ():
    try:
      row = json.loads(line)
    except (ValueError, RecursionError):
      break
    if not isinstance(row, dict):
      break
    rows.append(row)
  return rows


def keep_jsonl(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
  """Drops the rows for which `keep` is false, and a last line that was cut short."""
  if path.exists():
    _replace(path, "".join(json.dumps(row) + "\n" for row in read_jsonl(path) if keep(row)))


def out_of_space(error: BaseException) -> bool:
  """Whether an error, or what caused it, says that the disk is full."""
  full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
  causes = [cause for cause in (error.__cause__, error.__context__) if cause is not None]
  return full or "No space left" in str(error) or any(out_of_space(cause) for cause in causes)


def no_space_error(path: Path) -> OSError:
  """What to tell a person whose disk is full."""
  return OSError(
    errno.ENOSPC, f"no space left while writing {path}: the newest complete checkpoint is kept; free some space "
    "(or set config.checkpoint.keep_last lower) and run the same command again to resume"
  )


class _no_space_explained:
  def __init__(self, path: Path):
    self.path = path

  def __enter__(self) -> None:
    pass

  def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
    if error is not None and out_of_space(error):
      raise no_space_error(self.path) from error


def _replace(path: Path, text: str) -> None:
  temporary = path.with_name(path.name + ".new")
  with _no_space_explained(path):
    with temporary.open("w", encoding="utf-8") as file:
      _write(file, text)
    temporary.replace(path)


def _write(file: TextIO, text: str) -> None:
  """Returns once it would survive a power cut."""
  file.write(text)
  file.flush()
  os.fsync(file.fileno())


def _finite(value: Any) -> Any:
  """JSON has no NaN or infinity: they become null."""
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
