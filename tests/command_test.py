"""The commands together: what there is, what they say of themselves, and how an interrupted one goes on."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import worldlm_jax
from worldlm_jax import __main__ as worldlm, command, experiment

REPOSITORY = Path(__file__).parent.parent
PACKAGE = Path(worldlm_jax.__file__).parent


def _documentation(module: str) -> str:
  return ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text())) or ""


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
  monkeypatch.setattr(sys, "argv", ["worldlm", *arguments])
  try:
    worldlm.main()
  except SystemExit as end:
    return int(end.code or 0)
  return 0


def test_every_module_that_can_be_started_is_a_command() -> None:
  starting = {path.stem for path in PACKAGE.glob("*.py") if "\nif __name__ == " in path.read_text()}
  assert starting - {"__main__"} == set(worldlm.COMMANDS.values())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"], ["-h"]], ids=str)
def test_the_overview_says_what_each_command_does(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
  assert _run(monkeypatch, *arguments) == 0
  output = capsys.readouterr().out
  for name, module in worldlm.COMMANDS.items():
    assert re.search(rf"^  {name} +{re.escape(_documentation(module).splitlines()[0])}$", output, re.MULTILINE)


def test_an_unknown_command_is_bad_input(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  assert _run(monkeypatch, "trian", "--config=x.py") == 2
  found = capsys.readouterr()
  assert found.out == "" and len(found.err.splitlines()) == 1
  assert found.err.startswith("error: command='trian': ") and found.err.endswith("did you mean 'train'?\n")


@pytest.mark.parametrize("module", worldlm.COMMANDS.values())
def test_every_command_shows_how_it_is_called(module: str) -> None:
  assert f"\n  python -m worldlm_jax.{module} --" in _documentation(module)


def test_help_has_the_description_the_flags_and_the_exit_codes() -> None:
  done = subprocess.run([sys.executable, "-m", "worldlm_jax", "report", "--help"], capture_output=True, text=True,
                        cwd=REPOSITORY, timeout=300)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.startswith(_documentation("report"))
  flags = done.stdout[done.stdout.index("\nFlags:") : done.stdout.index("\nExit codes:")]
  assert re.findall(r"--\S+", flags) == ["--workdir=...", "--[no]all"]
  assert re.search(r"--workdir=\.\.\. .*Required", flags)
  for code, meaning in command.EXIT_CODES.items():
    assert f"{code:<4}{meaning}\n" in done.stdout + "\n"


@pytest.mark.parametrize(("name", "meant"), [
  ("rounds", "--config.rounds"), ("num_layers", "--config.model.num_layers"), ("nod", "--node"), ("quux", ""),
  ("local_steps", "--config.node.local_steps"), ("branching", "--config.federation.synthetic.branching"),
])
def test_what_is_no_flag_may_be_a_field_or_close_to_one(name: str, meant: str) -> None:
  assert experiment.Flags().meant(name) == meant


@pytest.mark.parametrize(("started", "expected"), [
  ("python -m worldlm_jax.main --workdir=a", "python -m worldlm_jax.main --workdir=a"),
  ("python -m worldlm_jax.main --overwrite --workdir=a", "python -m worldlm_jax.main --workdir=a"),
  ("python -m worldlm_jax train --workdir='a b' --overwrite=true", "python -m worldlm_jax train '--workdir=a b'"),
  ("/v/python /v/bin/worldlm train --nooverwrite --workdir=a", "/v/bin/worldlm train --workdir=a"),
])
def test_what_was_interrupted_goes_on_without_starting_afresh(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], started: str, expected: str
) -> None:
  monkeypatch.setattr(sys, "orig_argv", shlex.split(started))
  assert command.interrupted("stopped") == 75
  assert capsys.readouterr().err == f"stopped:\n  {expected}\n"


def test_the_guide_has_all_commands_and_exit_codes() -> None:
  guide = (REPOSITORY / "docs" / "commands.md").read_text()
  for name in worldlm.COMMANDS:
    assert f"`worldlm {name}`" in guide
  for code, meaning in command.EXIT_CODES.items():
    assert f"| {code} | {meaning} |" in guide
