"""Trains a federation of language models from a config file.

  python -m worldlm_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m worldlm_jax.main --config=configs/folder.py --config.federation.folder=PATH --workdir=DIR \\
      --config.rounds=20 --node=law/eu.local_steps=40

The same command again resumes. Exit codes: 0 finished, 1 stopped by an error in the run, 2 bad input,
75 interrupted with everything saved.
"""

import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from worldlm_jax import federation, progress, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "File whose get_config() returns a worldlm_jax Config.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; it is made, or resumed from.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Start afresh where the folder holds a run.")
_NODE = flags.DEFINE_multi_string("node", [], "PATH.FIELD=VALUE: a node's own setting, inherited by all below it.")

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75


def main(argv: Sequence[str]) -> int:
  """Runs the experiment of the flags and returns the exit code."""
  if argv[1:]:
    print(f"error: unexpected {argv[1:]}: expected only flags; see --help", file=sys.stderr)
    return BAD_INPUT
  logging.set_verbosity(logging.ERROR)  # Orbax logs every file
  reporter = progress.for_stdout()
  try:
    config = _CONFIG.value
    for text in _NODE.value:
      path, field, value = federation.parse_override(text)
      config.federation.overrides.setdefault(path, {})[field] = value
    summary = train.run(config, str(_WORKDIR.value), overwrite=_OVERWRITE.value, reporter=reporter)
  except train.Interrupted as stop:
    print(stop, file=sys.stderr)
    return INTERRUPTED
  except (ValueError, FloatingPointError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT if isinstance(error, ValueError) else FAILED
  print(progress.closing_lines(summary, str(_WORKDIR.value)))
  return OK


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(lambda argv: sys.exit(main(argv)))
