"""Trains a federation of language models from a config file.

  python -m worldlm_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m worldlm_jax.main --config=configs/folder.py --config.federation.folder=PATH --workdir=DIR \\
      --config.rounds=20 --node=law/eu.local_steps=40

The same command again resumes. Exit codes: 0 finished, 1 stopped by an error in the run, 2 bad input,
75 interrupted with everything saved.
"""

import sys

import jax
from absl import app, flags

from worldlm_jax import checks, command, progress, train

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; it is made, or resumed from.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Start afresh where the folder holds a run.")


def main(_: list[str]) -> int:
  """Runs the experiment of the flags and returns the exit code."""
  reporter = progress.for_stdout()
  try:
    summary = train.run(command.configured(), str(_WORKDIR.value), overwrite=_OVERWRITE.value, reporter=reporter)
  except train.Interrupted as stop:
    print(stop, file=sys.stderr)
    return command.INTERRUPTED
  except (checks.InputError, FloatingPointError, OSError, jax.errors.JaxRuntimeError) as error:
    return command.failed(error)
  print(progress.closing_lines(summary, str(_WORKDIR.value)))
  return command.OK


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=command.parse_flags)
