"""What the commands share: the flags that name an experiment, how mistakes in them end, and the exit codes."""

import sys

from absl import flags, logging
from ml_collections import config_flags

from worldlm_jax import checks, config as config_lib, federation, validation

CONFIG = config_flags.DEFINE_config_file("config", None, "File whose get_config() returns a worldlm_jax Config.")
NODE = flags.DEFINE_multi_string("node", [], "PATH.FIELD=VALUE: a node's own setting, inherited by all below it.")

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; a mistake in them is bad input like any other."""
  logging.set_verbosity(logging.FATAL)  # libraries log every file, and tracebacks of what we say in one line
  try:
    validation.check_flags(argv)
    rest = flags.FLAGS(argv)
    checks.require(not rest[1:], "arguments", rest[1:], "only flags", "see --help")
    _ = CONFIG.value.seed  # only now is a missing config file noticed
    return rest
  except (flags.Error, ValueError, OSError, KeyError) as error:  # a KeyError: a field of another kind of source
    print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def configured() -> config_lib.Config:
  """The config of the flags, with the settings of single nodes put in."""
  config = CONFIG.value
  for text in NODE.value:
    path, field, value = federation.parse_override(text)
    config.federation.overrides.setdefault(path, {})[field] = value
  return config
