"""Validators: each raises `InputError`, a `ValueError`, with name=value, what was expected, and the remedy."""

import difflib
import json
from collections.abc import Collection, Iterable
from typing import Any, NoReturn


class InputError(ValueError):
  """Something that the person who started the run can put right."""


def fail(name: str, value: Any, expected: str, remedy: str = "") -> NoReturn:
  """Raises `InputError("name=value: expected ...; remedy")`."""
  raise InputError(f"{name}={value!r}: expected {expected}{'; ' + remedy if remedy else ''}")


def require(ok: bool, name: str, value: Any, expected: str, remedy: str = "") -> None:
  """Raises as `fail` does unless `ok`."""
  if not ok:
    fail(name, value, expected, remedy)


def one_of(name: str, value: str, choices: Collection[str]) -> None:
  """Raises unless `value` is one of `choices`, naming the closest of them."""
  if value not in choices:
    fail(name, value, f"one of {', '.join(map(repr, choices))}", did_you_mean(value, choices))


def did_you_mean(value: str, choices: Iterable[str]) -> str:
  """`did you mean 'x'?` for the choice closest to `value`, or an empty string.

  A single name may be close to the last one of a path: 'tools' to 'code/tools'.
  """
  choices = list(choices)
  last = {choice.rpartition("/")[2]: choice for choice in choices}
  close = difflib.get_close_matches(str(value), choices, n=1)
  if not close and "/" not in str(value):
    close = [last[name] for name in difflib.get_close_matches(str(value), last, n=1)]
  return f"did you mean {close[0]!r}?" if close else ""


def differences(old: Any, new: Any, path: str = "") -> list[str]:
  """The dotted names of the fields in which two `config.to_dict` results differ, with both values."""
  if isinstance(old, dict) and isinstance(new, dict):
    found = []
    for name in sorted(old.keys() | new.keys()):
      found += differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    return found
  if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{path}[{i}]")]
  return [] if old == new else [f"{path}: {json.dumps(old)} there, {json.dumps(new)} here"]
