"""Every setting is checked, named in its error, and can be overridden by a flag that is checked too."""

import copy
import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from absl import flags
from ml_collections import config_flags

from worldlm_jax import checks, config as c, federation, validation

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
# Any value of the type is one; or what it names is looked for later, as a tokenizer and a model to start from are.
UNCHECKED = {"seed", "data.tokenizer", "data.cache", "logging.wandb_project", "model.init_from"}


def _leaves(value: Any, kind: type, path: str = "") -> list[str]:
  """The dotted names of the fields that hold exactly this type."""
  found = []
  for field in dataclasses.fields(value):
    name, inner = f"{path}{field.name}", getattr(value, field.name)
    found += _leaves(inner, kind, name + ".") if dataclasses.is_dataclass(inner) else [name] * (type(inner) is kind)
  return found


def _changed(config: c.Config, path: str, value: Any) -> c.Config:
  config = copy.deepcopy(config)
  *parents, name = path.split(".")
  holder = config
  for parent in parents:
    holder = getattr(holder, parent)
  setattr(holder, name, value)
  return config


def _tree() -> c.Config:
  return c.Config(federation=c.FederationConfig(root=c.Node("world", c.Files("unread"))))


def _message(config: c.Config) -> str:
  with pytest.raises(ValueError) as caught:
    federation.resolve(config)
  return str(caught.value)


def _named(path: str) -> str:
  return f"node '.': {path.removeprefix('node.')}" if path.startswith("node.") else f"config.{path}"


def test_defaults_are_valid() -> None:
  assert [m.path for m in federation.resolve(_tree()).members] == ["."]


def _cases() -> list[tuple[str, Any]]:
  wrong = ((float, math.nan), (int, -2), (str, "nonsense"))
  found = [(path, value) for kind, value in wrong for path in _leaves(c.Config(), kind)]
  return [case for case in found if not case[0].startswith("federation.")]  # tree_sources_test has those


@pytest.mark.parametrize(("path", "value"), [case for case in _cases() if case[0] not in UNCHECKED])
def test_no_number_is_nan_or_negative_and_no_word_is_unknown(path: str, value: Any) -> None:
  message = _message(_changed(_tree(), path, value))
  assert message.startswith(f"{_named(path)}={value!r}: expected ")


def test_the_cases_cover_all_kinds_of_fields() -> None:
  paths = {path for path, _ in _cases()}
  assert {"rounds", "node.clip_norm", "optimizer.b1", "backbone.weights", "checkpoint.keep_best"} <= paths
  assert paths >= UNCHECKED


@pytest.mark.parametrize(("path", "value", "expected"), [
  ("rounds", 0, "at least 1"),
  ("schedule", "paralel", "one of 'parallel', 'sequential'; did you mean 'parallel'?"),
  ("model.d_model", 90, "a multiple of twice num_heads=4"),
  ("model.num_kv_heads", 3, "a divisor of num_heads=4"),
  ("model.compute_dtype", "float16", "one of 'float32', 'bfloat16'; did you mean 'bfloat16'?"),
  ("model.key_layer_share", 1.5, "a number from 0 to 1"),
  ("model.rope_base", math.inf, "a positive number"),
  ("data.sequence_length", 1, "at least 2"),
  ("data.packing", "document", "one of 'stream', 'documents'; did you mean 'documents'?"),
  ("data.invalid_utf8", "ignore", "one of 'error', 'replace'"),
  ("optimizer.b2", 1.0, "a number from 0 to 1 (exclusive)"),
  ("optimizer.epsilon", 0.0, "a positive number"),
  ("backbone.server_momentum", 1.0, "a number from 0 to 1 (exclusive)"),
  ("key_layers.similarity", "param_cosine", "'update_cosine' with values='updates'; attend over updates compares "
   "updates; set config.key_layers.values=layers"),
  ("key_layers.update_threshold", 1.01, "a number from -1 to 1"),
  ("evaluation.acceptance_windows", 0, "at least 1"),
  ("checkpoint.keep_last", 0, "at least 1"),
  ("node.batch_size", 0, "at least 1"),
  ("node.rounds_per_parent_round", 0, "at least 1"),
  ("node.learning_rate", math.inf, "a positive number"),
  ("node.lr_schedule", "cosin", "one of 'constant', 'cosine', 'wsd'; did you mean 'cosine'?"),
  ("node.clip_norm", 0.0, "a positive norm; inf switches clipping off"),
])
def test_errors_say_what_was_expected(path: str, value: Any, expected: str) -> None:
  assert _message(_changed(_tree(), path, value)).startswith(f"{_named(path)}={value!r}: expected {expected}")


@pytest.mark.parametrize(("path", "value"), [
  ("nodes_at_once", 0), ("node.local_steps", 0), ("node.clip_norm", math.inf), ("node.up_temperature", math.inf),
  ("node.down_temperature", 0.0), ("key_layers.update_norm_cap", math.inf), ("key_layers.update_threshold", -1.0),
  ("optimizer.b1", 0.0), ("checkpoint.keep_best", 0), ("model.key_layer_share", 0.0), ("evaluation.test_windows", 0),
  ("evaluation.matrix_windows", 0), ("node.max_train_bytes", 0),
])
def test_the_ends_of_ranges_are_allowed(path: str, value: Any) -> None:
  federation.resolve(_changed(_tree(), path, value))


def test_similarities_other_than_of_updates_go_with_layers() -> None:
  for similarity in validation.SIMILARITIES:
    federation.resolve(_changed(_changed(_tree(), "key_layers.values", "layers"), "key_layers.similarity", similarity))


@pytest.mark.parametrize(("num_layers", "share", "count"), [
  (4, 0.3, 1), (7, 0.5, 4), (5, 0.0, 0), (1, 0.3, 0), (3, 1.0, 3),
])
def test_number_of_key_layers(num_layers: int, share: float, count: int) -> None:
  model = c.ModelConfig(num_layers=num_layers, key_layer_share=share)
  assert c.num_key_layers(model) == count
  federation.resolve(dataclasses.replace(_tree(), model=model))


def test_to_dict_is_json_that_survives_a_round_trip() -> None:
  root = c.Node("world", c.StandardLibrary("code"), [c.Node("a", c.Files("x"), settings={"clip_norm": -math.inf})])
  config = c.Config(federation=c.FederationConfig(root=root), node=c.NodeSettings(clip_norm=math.inf))
  plain = c.to_dict(config)
  assert json.loads(json.dumps(plain, allow_nan=False)) == plain
  assert plain["node"]["clip_norm"] == "inf"
  assert plain["federation"]["root"]["data"] == {"kind": "StandardLibrary", "family": "code"}
  child = plain["federation"]["root"]["children"][0]
  files = {"kind": "Files", "path": "x", "text_field": "text", "node_field": ""}
  assert (child["data"], child["settings"]) == (files, {"clip_norm": "-inf"})


def test_differences_name_fields_with_both_values() -> None:
  old, new = c.to_dict(_tree()), c.to_dict(_changed(_changed(_tree(), "rounds", 11), "node.clip_norm", math.inf))
  assert checks.differences(old, new) == ["node.clip_norm: 1.0 there, \"inf\" here", "rounds: 10 there, 11 here"]
  assert checks.differences(old, old) == []


def test_differences_of_lists_and_of_missing_fields() -> None:
  assert checks.differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ["a[1].b: 2 there, 3 here"]
  assert checks.differences({"a": [1]}, {"a": [1, 2]}) == ["a: [1] there, [1, 2] here"]
  found = checks.differences({"old": 1}, {"new": {"b": 2}})
  assert found == ['new: null there, {"b": 2} here', "old: 1 there, null here"]


# ml_collections loads config files with importlib's old interface.
_OLD_LOADER = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def _flags(*arguments: str) -> c.Config:
  values = flags.FlagValues()
  argv = ["test", f"--config={CONFIGS[0].with_name('folder.py')}", *arguments]
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  values(argv)
  return values["config"].value


@_OLD_LOADER
def test_flags_override_fields_with_their_types() -> None:
  config = _flags("--config.rounds=7", "--config.node.clip_norm=inf", "--config.model.tied_head=false",
                  "--config.data.tokenizer=words.json", "--config.key_layers.update_threshold=-0.5")
  assert (config.rounds, config.node.clip_norm, config.model.tied_head) == (7, math.inf, False)
  assert (config.data.tokenizer, config.key_layers.update_threshold) == ("words.json", -0.5)


@_OLD_LOADER
@pytest.mark.parametrize("flag", ["rounds=abc", "rounds=2.0", "model.num_layers=2.5", "node.learning_rate=fast",
                                  "model.tied_head=maybe"])
def test_flags_of_the_wrong_type_are_named(flag: str) -> None:
  with pytest.raises(flags.IllegalFlagValueError, match=re.escape(f"flag --config.{flag}: ")):
    _flags(f"--config.{flag}")


@pytest.mark.parametrize(("flag", "message"), [
  ("--config.rouns=3", "--config.rouns: field='rouns': expected one of 'algorithm', .*; did you mean 'rounds'"),
  ("--config.model.num_layer=3", "--config.model.num_layer: field='num_layer': .*; did you mean 'num_layers'"),
  ("-config.modl.num_layers", "--config.modl.num_layers: field='modl': .*; did you mean 'model'"),
  ("--noconfig.model.tied=1", "--config.model.tied: field='tied': .*; did you mean 'tied_head'"),
  ("--config.federation.documents.pth=3", "--config.federation.documents.pth: field='pth': .*; did you mean 'path'"),
  ("--config.rounds.x=3", "--config.rounds.x: field='x': expected a flag that ends before it"),
  ("--config.federation.root.name=a", "--config.federation.root.name: .*; --node changes the settings of one node"),
])
def test_flags_that_lead_to_no_field_are_refused(flag: str, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    validation.check_flags(["main", flag])


def test_other_flags_are_let_through() -> None:
  validation.check_flags(["main", "--config.federation.documents.path=x", "--config.federation.documents.subset=fr",
                          "--config.federation.partition.alphas=(1.0,)"])
  validation.check_flags(["main", "--config=configs/x.py", "--config.rounds=3", "--config.model.tied_head",
                          "--noconfig.model.tied_head", "--config.node.clip_norm", "inf", "--node=a.rouns=3",
                          "--configs.a=1"])


def _load(path: Path) -> ModuleType:
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_says_its_command_and_is_valid(path: Path) -> None:
  module = _load(path)
  assert f"configs/{path.name}" in (module.__doc__ or "")
  config = module.get_config()
  config = config.base if isinstance(config, c.Comparison) else config
  validation.validate(config)
  validation.validate_node_settings(config.node, "node")
  if config.federation.root or config.federation.synthetic.branching:
    assert len(federation.resolve(config).members) > 1
  else:
    with pytest.raises(ValueError, match=r"config\.federation.*folder"):
      federation.resolve(config)


@pytest.mark.parametrize(("change", "message"), [
  ({"rounds": "3"}, r"config.rounds='3': expected a whole number"),
  ({"rounds": 2.5}, r"config.rounds=2.5: expected a whole number"),
  ({"rounds": True}, r"config.rounds=True: expected a whole number"),
  ({"node": c.NodeSettings(local_steps="5")}, r"config.node.local_steps='5': expected a whole number"),
  ({"node": c.NodeSettings(learning_rate="fast")}, r"config.node.learning_rate='fast': expected a number"),
  ({"model": c.ModelConfig(tied_head=1)}, r"config.model.tied_head=1: expected True or False"),
  ({"model": c.ModelConfig(remat=True)}, r"config.model.remat=True: expected a string"),
  ({"model": c.ModelConfig(remat="block")}, r"config.model.remat='block': expected one of .*; did you mean 'blocks'"),
  ({"model": c.ModelConfig(attention="flash")}, r"config.model.attention='flash': expected one of 'auto', 'xla', .*"),
  ({"model": "tiny"}, r"config.model='tiny': expected a ModelConfig"),
  ({"federation": c.FederationConfig(documents=c.Node())}, r"config.federation.documents=Node.*: expected a source"),
  ({"federation": c.FederationConfig(documents=c.Tfds(name=3))}, r"federation.documents.name=3: expected a string"),
])
def test_a_value_of_the_wrong_type_in_a_config_file_is_named(change, message):
  with pytest.raises(ValueError, match=message):
    validation.validate(c.Config(**change))


def test_a_whole_number_serves_as_a_number():
  validation.validate(c.Config(node=c.NodeSettings(learning_rate=1)))
