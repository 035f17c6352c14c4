"""Trains language models over federations of federations, and makes use of them.

  worldlm COMMAND --help
  worldlm train --config=configs/quickstart.py --workdir=runs/quickstart
  worldlm report --workdir=runs/quickstart
"""

import ast
import importlib.util
import runpy
import sys
from pathlib import Path

from worldlm_jax import __version__, checks

COMMANDS = {  # name -> module, of which `python -m worldlm_jax.MODULE` does the same
  "train": "main",
  "compare": "compare",
  "report": "report",
  "evaluate": "evaluate",
  "export": "export",
  "generate": "generate",
  "tokenizer": "tokenizer",
  "prepare": "prepare",
}


def main() -> None:
  """Runs the command that the first argument names, with the others, or says which there are."""
  name, *rest = sys.argv[1:] or ["--help"]
  if name in ("--help", "-h", "help"):
    print(_overview())
    return
  if name == "--version":
    print(__version__)
    return
  try:
    checks.one_of("command", name, COMMANDS)
  except checks.InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  sys.argv[1:] = rest
  try:
    runpy.run_module(f"worldlm_jax.{COMMANDS[name]}", run_name="__main__", alter_sys=True)
  except KeyboardInterrupt:  # while the command was still being loaded
    print("interrupted before anything was begun", file=sys.stderr)
    sys.exit(75)


def _overview() -> str:
  lines = [f"{__doc__.strip()}\n\nCommands:"]
  for name, module in COMMANDS.items():
    found = importlib.util.find_spec(f"worldlm_jax.{module}")
    assert found and found.origin
    doc = ast.get_docstring(ast.parse(Path(found.origin).read_text(encoding="utf-8"))) or ""  # importing takes seconds
    lines.append(f"  {name:<11}{doc.splitlines()[0]}")
  return "\n".join([*lines, "", "worldlm COMMAND is the same as python -m worldlm_jax.MODULE, where MODULE is COMMAND "
                                "(main for train)."])


if __name__ == "__main__":
  main()
