"""Trains a federation of language models from a config file.

  python -m worldlm_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m worldlm_jax.main --config=configs/folder.py --config.federation.folder=PATH --workdir=DIR \\
      --config.rounds=20 --node=law/eu.local_steps=40

The same command again resumes. Exit codes: 0 finished, 1 stopped by an error in the run, 2 bad input,
75 interrupted with everything saved.
"""

import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from worldlm_jax import checks, config as config_lib, federation, progress, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "File whose get_config() returns a worldlm_jax Config.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; it is made, or resumed from.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Start afresh where the folder holds a run.")
_NODE = flags.DEFINE_multi_string("node", [], "PATH.FIELD=VALUE: a node's own setting, inherited by all below it.")

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; a mistake in them is bad input like any other."""
  try:
    config_lib.check_flags(argv)
    rest = flags.FLAGS(argv)
    checks.require(not rest[1:], "arguments", rest[1:], "only flags", "see --help")
    _ = _CONFIG.value.seed  # only now is a missing config file noticed
    return rest
  except (flags.Error, ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def main(_: list[str]) -> int:
  """Runs the experiment of the flags and returns the exit code."""
  logging.set_verbosity(logging.FATAL)  # Orbax logs every file, and tracebacks of what we say in one line
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
  except (checks.InputError, FloatingPointError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT if isinstance(error, checks.InputError) else FAILED
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    print(f"error: {str(error).splitlines()[0]}\ntry a lower --config.nodes_at_once or "
          "--config.optimizer.microbatch_size, or --config.model.remat", file=sys.stderr)
    return FAILED
  print(progress.closing_lines(summary, str(_WORKDIR.value)))
  return OK


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=parse_flags)
