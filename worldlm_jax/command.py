"""What the commands share: the flags that name an experiment, how mistakes in them end, and the exit codes."""

import os
import sys

import jax
from absl import flags, logging
from ml_collections import config_flags

from worldlm_jax import checks, config as config_lib, federation, validation
from worldlm_jax.data import cache

CONFIG = config_flags.DEFINE_config_file("config", None, "File whose get_config() returns a worldlm_jax Config.")
NODE = flags.DEFINE_multi_string("node", [], "PATH.FIELD=VALUE: a node's own setting, inherited by all below it.")

LEAST_SECONDS_TO_KEEP = 0.2  # that compiling takes, for a program to be worth a file

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 75


def parse_flags(argv: list[str], config_type: type = config_lib.Config) -> list[str]:
  """Parses the flags; a mistake in them is bad input like any other. The config must be a `config_type`."""
  logging.set_verbosity(logging.FATAL)  # libraries log every file, and tracebacks of what we say in one line
  try:
    validation.check_flags(argv, config_type)
    rest = flags.FLAGS(argv)
    checks.require(not rest[1:], "arguments", rest[1:], "only flags", "see --help")
    if not isinstance(CONFIG.value, config_type):
      getattr(CONFIG.value, "seed", None)  # only now is a missing config file noticed
      checks.fail("--config", config_flags.get_config_filename(flags.FLAGS["config"]),
                  f"a file whose get_config() returns a {config_type.__name__}",
                  "worldlm_jax.compare takes a Comparison, every other command a Config")
    return rest
  except (flags.Error, ValueError, OSError, KeyError) as error:  # a KeyError: a field of another kind of source
    print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def keep_compiled() -> None:
  """Has JAX keep compiled programs in the user's cache folder, for the next run; its own variables come first."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(cache.user_folder() / "compiled"))
  if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS_TO_KEEP)


def configured() -> config_lib.Config:
  """The config of the flags, with the settings of single nodes put in."""
  return _with_nodes(CONFIG.value)


def compared() -> config_lib.Comparison:
  """The comparison of the flags, with the settings of single nodes put in for all entries."""
  _with_nodes(CONFIG.value.base)
  return CONFIG.value


def failed(error: Exception) -> int:
  """Says what ended a command, and returns its exit code. Raises errors that are nobody's input or machine."""
  if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
    raise error
  if isinstance(error, jax.errors.JaxRuntimeError):
    print(f"error: {str(error).splitlines()[0]}\ntry a lower config.nodes_at_once or "
          "config.optimizer.microbatch_size, or config.model.remat", file=sys.stderr)
  else:
    print(f"error: {error}", file=sys.stderr)
  return BAD_INPUT if isinstance(error, checks.InputError) else FAILED


def _with_nodes(config: config_lib.Config) -> config_lib.Config:
  for text in NODE.value:
    path, field, value = federation.parse_override(text)
    config.federation.overrides.setdefault(path, {})[field] = value
  return config
