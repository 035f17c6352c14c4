"""The flags that name an experiment, for the commands that take a config."""

import dataclasses
import itertools
import textwrap
import typing
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from worldlm_jax import checks, command, config as config_lib, federation, validation

CONFIG = config_flags.DEFINE_config_file("config", None, "File whose get_config() returns the experiment.")
NODE = flags.DEFINE_multi_string("node", [], "PATH.FIELD=VALUE: a node's own setting, inherited by all below it; may "
                                 "be repeated.")

LESS_MEMORY = "try a lower config.nodes_at_once or config.optimizer.microbatch_size, or config.model.remat"


class Flags(command.Flags):
  """The flags of a command that takes a config of the type `config_type`."""

  def __init__(self, *required: str, config_type: type = config_lib.Config):
    super().__init__("config", *required)
    self.config_type = config_type

  def parse(self, argv: list[str]) -> list[str]:
    """Parses them, and reads the config file."""
    validation.check_flags(argv, self.config_type)
    _check_file(argv)
    rest = super().parse(argv)
    if not isinstance(CONFIG.value, self.config_type):
      checks.fail("--config", config_flags.get_config_filename(flags.FLAGS["config"]),
                  f"a file whose get_config() returns a {self.config_type.__name__}",
                  "worldlm_jax.compare takes a Comparison, every other command a Config")
    return rest

  def meant(self, name: str) -> str:
    """A flag, or the field of the config that is called so."""
    fields = [full for full in _fields(self.config_type) if full.rpartition(".")[2] == name]
    return f"--config.{fields[0]}" if fields else super().meant(name)

  def help(self) -> str:
    """The help of the command, and the fields of the config."""
    groups: dict[str, list[str]] = {}
    for full in _fields(self.config_type):
      group, _, name = full.rpartition(".")
      groups.setdefault(group, []).append(name)
    lines = ["", "Fields of the config, each set by --config.FIELD=VALUE (see docs/configuration.md):"]
    for group, names in groups.items():
      text = f"{group}: {' '.join(names)}" if group else " ".join(names)
      lines += textwrap.wrap(text, command.WIDEST, initial_indent="  ", subsequent_indent="    ")
    return super().help() + "\n" + "\n".join(lines)


def configured() -> config_lib.Config:
  """The config of the flags, with the settings of single nodes put in."""
  return _with_nodes(CONFIG.value)


def compared() -> config_lib.Comparison:
  """The comparison of the flags, with the settings of single nodes put in for all entries."""
  _with_nodes(CONFIG.value.base)
  return CONFIG.value


def _check_file(argv: list[str]) -> None:
  """Raises `InputError` where the config file does not exist; what follows a colon is an argument of its own."""
  for word, following in itertools.pairwise([*argv[1:], ""]):
    flag, equals, value = word.partition("=")
    if flag in ("--config", "-config"):
      path = Path((value if equals else following).partition(":")[0])
      others = [str(other) for other in path.parent.glob("*.py")] if not path.is_file() else []
      checks.require(path.is_file(), "--config", str(path), "a file", checks.did_you_mean(str(path), others))


def _fields(kind: Any) -> list[str]:
  """The dotted names of the fields of a config that a flag can set, those that are not nested first."""
  own, nested = [], []
  for field in dataclasses.fields(kind):
    inner = config_lib.Files if field.type == config_lib.Source else field.type
    if dataclasses.is_dataclass(inner):
      nested += [f"{field.name}.{name}" for name in _fields(inner)]
    elif inner in (int, float, str, bool) or typing.get_origin(inner) is tuple:
      own.append(field.name)
  return own + nested


def _with_nodes(config: config_lib.Config) -> config_lib.Config:
  for text in NODE.value:
    path, field, value = federation.parse_override(text)
    config.federation.overrides.setdefault(path, {})[field] = value
  return config
