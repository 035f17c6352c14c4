"""The command as a person sees it: one model as it writes, several beside or below each other."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from worldlm_jax import checks, generate, generation, released

SAMPLING = generation.Sampling(temperature=0)


@pytest.fixture(scope="module")
def models(stored: tuple[Path, Any]) -> list[released.Released]:
  return released.load_nodes(stored[0], ["a", "b/p"])


def _console(width: int, terminal: bool = True) -> Console:
  return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)


def _shown(console: Console, models: list[released.Released], added: list[str]) -> list[str]:
  generate.show(models, "Once \x1b[2J", [iter(added[:1]), iter(added[1:])], console)
  return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_streams_add_what_each_model_writes(models: list[released.Released]) -> None:
  both = generate.streams(models, "Once", SAMPLING, 9, 0)
  alone = generate.streams(models[1:], "Once", SAMPLING, 9, 0)
  first, second = ("".join(stream) for stream in both)
  assert first != second == "".join(alone[0])


def test_one_model_is_written_as_it_is(models: list[released.Released], capsys: pytest.CaptureFixture[str]) -> None:
  generate.show(models[:1], "Once", [iter([" upon", " a\x1b"])], _console(80, terminal=False))
  assert capsys.readouterr().out == "Once upon a\x1b\n"
  generate.show(models[:1], "Once", [iter([" upon", " a\x1b\n"])], _console(80))
  assert capsys.readouterr().out == "Once upon a\ufffd\n\n"


def test_several_stand_side_by_side_where_there_is_room(models: list[released.Released]) -> None:
  lines = _shown(_console(80), models, ["first model", "second"])
  text = next(line for line in lines if "first model" in line)
  assert "second" in text and "\x1b[2J" not in text.replace("\x1b[2K", "")
  stacked = _shown(_console(40), models, ["first model", "second"])
  assert not any("first" in line and "second" in line for line in stacked)
  plain = _shown(_console(80, terminal=False), models, ["first model", "second"])
  assert not any("first" in line and "second" in line for line in plain)
  assert [word in "\n".join(plain) for word in ("a", "b/p", "first model", "second")] == [True] * 4


def test_what_is_beyond_training_and_what_is_unfinished_is_said(models: list[released.Released]) -> None:
  said = generate.warnings(models[0], "Once", 9)
  assert len(said) == 2 and "windows of 7 tokens" in said[0] and "after 2 round(s)" in said[1]
  assert len(generate.warnings(models[0], "On", 4)) == 1


def test_bad_numbers_are_refused_before_anything_is_drawn(models: list[released.Released]) -> None:
  with pytest.raises(checks.InputError, match="--top_p=0"):
    generate.streams(models, "Once", SAMPLING._replace(top_p=0), 9, 0)
