"""What all commands do alike: they read their flags, explain themselves, and end with one of a few exit codes.

A command is a module whose docstring says what it does, with examples, and which ends in

  if __name__ == "__main__":
    define_flags()
    command.start(main, command.Flags("out"))  # --out has to be given

`main` takes what absl gives it, and returns an exit code. `worldlm NAME` runs the same modules (`__main__.py`).
"""

import difflib
import re
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging

from worldlm_jax import checks

EXIT_CODES = {
  0: "done",
  1: "stopped by an error that is not the input's, such as a full disk or a loss that is not finite",
  2: "bad input",
  75: "interrupted; the same command goes on from what is saved",
}
OK, FAILED, BAD_INPUT, INTERRUPTED = EXIT_CODES

WIDEST = 110  # of a line of help
REPEATED = ";\n    repeat this option"  # absl's words about flags that may be repeated, which say so themselves
ASKING = ("--help", "-help", "-h", "--helpfull", "--helpshort")


class Flags:
  """The flags of a command, of which the `required` have to be given."""

  def __init__(self, *required: str):
    self.required = required

  def parse(self, argv: list[str]) -> list[str]:
    """Parses them. Raises `InputError`, or an error of absl, at the first mistake."""
    try:
      rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
      name = error.flagname.partition("=")[0]
      meant = self.meant(name)
      hint = f"did you mean {meant}?" if meant else "see --help"
      raise checks.InputError(f"--{name} is no flag of this command; {hint}") from None
    for word in rest[1:]:
      hint = f"did you mean --{word}?" if word.partition("=")[0] in flags.FLAGS else "see --help"
      checks.fail("argument", word, "only flags, each --NAME=VALUE", hint)
    for name in self.required:
      if flags.FLAGS[name].value is None:
        raise checks.InputError(f"--{name} is missing: {flags.FLAGS[name].help}")
    return rest

  def meant(self, name: str) -> str:
    """What to write instead of --`name`, which is no flag; "" for no idea."""
    close = difflib.get_close_matches(name, [flag.name for flag in _own_flags()], n=1)
    return f"--{close[0]}" if close else ""

  def help(self) -> str:
    """What the command does, its flags, and its exit codes."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    own, lines = _own_flags(), [str(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
    column = 4 + max((len(_usage(flag)) for flag in own), default=0)
    for flag in sorted(own, key=lambda flag: flag.name not in self.required):
      text = (flag.help or "").partition(REPEATED)[0]
      if flag.default not in (None, False, "", 0, -1, []):
        text += f" Default: {str(flag.default_as_str).strip(chr(39))}."
      if flag.name in self.required:
        text += " Required."
      first, *rest = textwrap.wrap(text, max(width - column, 30))
      lines += [f"  {_usage(flag):{column - 2}}{first}", *(" " * column + line for line in rest)]
    codes = [f"  {code:<4}{meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join([*lines, "", "Exit codes:", *codes])


def start(main: Callable[[list[str]], int], own: Flags) -> None:
  """Runs a command with the flags of `sys.argv`, and ends this process with its exit code.

  SIGTERM stops it as Ctrl-C does: both raise `KeyboardInterrupt` where the command does not handle them itself.
  """
  signal.signal(signal.SIGTERM, signal.default_int_handler)

  def parse(argv: list[str]) -> list[str]:
    if any(word in ASKING for word in argv[1:]):
      print(own.help())
      sys.exit(OK)
    logging.set_verbosity(logging.FATAL)  # libraries log every file, and tracebacks of what we say in one line
    try:
      return own.parse(argv)
    except (flags.Error, ValueError, OSError, KeyError) as error:  # a KeyError: a field of another kind of source
      print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
      sys.exit(BAD_INPUT)

  def run(argv: list[str]) -> int:
    try:
      return main(argv)
    except KeyboardInterrupt:
      return interrupted()

  app.run(run, flags_parser=parse)


def failed(error: Exception, remedy: str = "") -> int:
  """Says what ended a command, and returns its exit code; `remedy` is what to do where memory is short.

  Raises errors that are nobody's input or machine.
  """
  message = str(error)
  if isinstance(error, RuntimeError):  # JAX's are
    if "RESOURCE_EXHAUSTED" not in message:
      raise error
    message = "\n".join(filter(None, [message.splitlines()[0], remedy]))
  print(f"error: {message}", file=sys.stderr)
  return BAD_INPUT if isinstance(error, checks.InputError) else FAILED


def interrupted(what: object = "interrupted; run the same command again to go on") -> int:
  """Says what was interrupted, and with what command line to go on; returns the exit code."""
  print(f"{what}:\n  {_again()}", file=sys.stderr)
  return INTERRUPTED


def _again() -> str:
  """This command line without --overwrite, which would start afresh."""
  words = [word for word in sys.orig_argv if not re.fullmatch(r"--?(no)?overwrite(=.*)?", word)]
  if len(words) > 1 and Path(words[1]).name == "worldlm":  # the installed script, not the interpreter that runs it
    words = words[1:]
  return shlex.join(words)


def _own_flags() -> list[flags.Flag]:
  """The flags of the command and of what it shares with others, not those of libraries."""
  by_module = flags.FLAGS.flags_by_module_dict()
  names = [name for name in by_module if name.startswith("worldlm_jax.")]
  return [flag for name in [*names, sys.argv[0]] for flag in by_module.get(name, ())]


def _usage(flag: flags.Flag) -> str:
  """How a flag is written."""
  if flag.boolean:
    return f"--[no]{flag.name}"
  return f"--{flag.name}=" + {"int": "N", "comma separated list of strings": "A,B"}.get(flag.flag_type(), "...")
