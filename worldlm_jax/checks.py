"""Validators: each raises `InputError`, a `ValueError`, with name=value, what was expected, and the remedy."""

import difflib
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

  Of paths, the last name alone may be close: 'tools' to 'code/tools'.
  """
  choices = list(choices)
  last = {choice.rpartition("/")[2]: choice for choice in choices}
  close = difflib.get_close_matches(str(value), choices, n=1)
  close = close or [last[name] for name in difflib.get_close_matches(str(value).rpartition("/")[2], last, n=1)]
  return f"did you mean {close[0]!r}?" if close else ""
