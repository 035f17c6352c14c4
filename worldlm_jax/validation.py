"""Checks of everything in a config that can be wrong by itself, before anything is read or compiled."""

import dataclasses
import math
import re
import typing
from collections.abc import Iterable
from typing import Any

from worldlm_jax import checks
from worldlm_jax.config import (
  ALGORITHMS,
  PAYLOADS,
  Config,
  FederationConfig,
  Files,
  HuggingFace,
  ModelConfig,
  Node,
  NodeSettings,
  Source,
  Tfds,
)

SIMILARITIES = ("param_cosine", "scaled_dot", "centered_cosine", "update_cosine", "validation_loss")


def check_flags(argv: Iterable[str], config_type: type = Config) -> None:
  """Raises `ValueError` at a flag such as `--config.model.layers=4` whose name leads to no field of the config."""
  for text in argv:
    found = re.match(r"--?(?:no)?config\.([\w.]+)", text)
    name = found[1] if found else ""
    kind: Any = config_type
    for part in name.split(".") if found else ():
      where = f"--config.{name}: field"
      if not dataclasses.is_dataclass(kind) and kind != Source:
        checks.fail(where, part, "a flag that ends before it", "--node changes the settings of one node")
      kinds = (Files, Tfds, HuggingFace) if kind == Source else (kind,)
      types = {field.name: field.type for member in kinds for field in dataclasses.fields(member)}
      checks.one_of(where, part, types)
      kind = types[part]
      checks.require(typing.get_origin(kind) is not list, "flag", f"--config.{name}", "a single value",
                     "a list is written in the config file; --only chooses some of its entries")


def validate(config: Config) -> None:
  """Checks every field that does not belong to one node. Raises `InputError` naming the field."""
  validate_types(config, "config")
  _validate_federation(config.federation)
  for name, least in (("rounds", 1), ("nodes_at_once", 0)):
    _at_least(f"config.{name}", getattr(config, name), least)
  for name in ("node", "fsdp", "tensor"):
    _at_least(f"config.mesh.{name}", getattr(config.mesh, name), 0)
  checks.one_of("config.algorithm", config.algorithm, ALGORITHMS)
  checks.one_of("config.schedule", config.schedule, ("parallel", "sequential"))
  checks.one_of("config.waiting", config.waiting, ("device", "host", "auto"))
  checks.one_of("config.payload", config.payload, PAYLOADS)
  checks.one_of("config.inner_text", config.inner_text, ("beside", "before"))
  _validate_model(config.model)
  data, optimizer = config.data, config.optimizer
  _at_least("config.data.sequence_length", data.sequence_length, 2)
  checks.one_of("config.data.packing", data.packing, ("stream", "documents"))
  checks.one_of("config.data.invalid_utf8", data.invalid_utf8, ("error", "replace"))
  checks.one_of("config.optimizer.name", optimizer.name, ("adamw", "sgd"))
  checks.one_of("config.optimizer.moments", optimizer.moments, ("keep", "reset"))
  _at_least("config.optimizer.microbatch_size", optimizer.microbatch_size, 0)
  for name in ("b1", "b2"):
    _in_range(f"config.optimizer.{name}", getattr(optimizer, name), 0, 1, right_open=True)
  _at_least("config.optimizer.proximal", optimizer.proximal, 0)
  _positive("config.optimizer.epsilon", optimizer.epsilon)
  checks.one_of("config.backbone.weights", config.backbone.weights, ("text", "tokens", "uniform"))
  checks.one_of("config.backbone.server_optimizer", config.backbone.server_optimizer, ("sgd", "nesterov", "adam"))
  _positive("config.backbone.server_learning_rate", config.backbone.server_learning_rate)
  _in_range("config.backbone.server_momentum", config.backbone.server_momentum, 0, 1, right_open=True)
  checks.one_of("config.backbone.aggregate", config.backbone.aggregate,
                ("mean", "trimmed_mean", "median", "norm_bounded"))
  checks.require(0 <= config.backbone.trim < 0.5, "config.backbone.trim", config.backbone.trim,
                 "a share from 0 to 0.5 (exclusive)", "config.backbone.aggregate=median leaves the middle alone")
  _positive("config.backbone.norm_bound", config.backbone.norm_bound)
  checks.require(config.guards.norm_ratio >= 1, "config.guards.norm_ratio", config.guards.norm_ratio, "at least 1",
                 "inf rejects no update for its length")
  _in_range("config.guards.opposition", config.guards.opposition, 0, 1)
  checks.one_of("config.guards.failing", config.guards.failing, ("stop", "leave_out"))
  key_layers = config.key_layers
  checks.one_of("config.key_layers.values", key_layers.values, ("layers", "updates"))
  checks.one_of("config.key_layers.similarity", key_layers.similarity, SIMILARITIES)
  if key_layers.values == "updates":
    checks.require(key_layers.similarity == "update_cosine", "config.key_layers.similarity", key_layers.similarity,
                   "'update_cosine' with values='updates'",
                   "attend over updates compares updates; set config.key_layers.values=layers for the others")
  checks.one_of("config.key_layers.granularity", key_layers.granularity, ("layer", "tensor", "all", "model"))
  checks.one_of("config.key_layers.candidates", key_layers.candidates, ("everybody", "siblings", "both"))
  checks.one_of("config.key_layers.prior", key_layers.prior, ("uniform", "weights"))
  _in_range("config.key_layers.update_threshold", key_layers.update_threshold, -1, 1)
  _at_least("config.key_layers.update_strength", key_layers.update_strength, 0)
  _at_least("config.key_layers.update_norm_cap", key_layers.update_norm_cap, 1)  # a node's own update stays whole
  for name in ("residuals_per_layer", "residuals_received"):
    _at_least(f"config.key_layers.{name}", getattr(key_layers, name), 0)
  for name, least in (("valid_windows", 0), ("test_windows", 0), ("acceptance_windows", 1), ("matrix_windows", 0)):
    _at_least(f"config.evaluation.{name}", getattr(config.evaluation, name), least)
  checks.one_of("config.evaluation.personalised", config.evaluation.personalised, ("last", "best"))
  for name, least in (("every_rounds", 1), ("keep_last", 1), ("keep_best", 0)):
    _at_least(f"config.checkpoint.{name}", getattr(config.checkpoint, name), least)


def validate_types(value: Any, name: str) -> None:
  """Config files are Python, where nothing else keeps a word from standing where a number should."""
  for field in dataclasses.fields(value):
    inner, where = getattr(value, field.name), f"{name}.{field.name}"
    if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
      checks.require(isinstance(inner, field.type), where, inner, f"a {field.type.__name__}")
      validate_types(inner, where)
    elif field.type in _WORDS:
      accepted: Any = (int, float) if field.type is float else field.type
      ok = isinstance(inner, accepted) and (field.type is bool or not isinstance(inner, bool))
      checks.require(ok, where, inner, _WORDS[field.type])
    elif (element := _element(field.type)) is not None:
      ok = isinstance(inner, tuple) and all(isinstance(i, (int, float) if element is float else element) for i in inner)
      checks.require(ok, where, inner, f"a tuple, each {_WORDS[element]}", "one alone is written (3,)")
    elif field.type == Source or field.name in ("source", "own", "other"):
      validate_source(inner, where)


def validate_source(value: Any, name: str) -> None:
  """A node's data, or another source within a config."""
  checks.require(isinstance(value, Source), name, value, "a source, such as Files(path)")
  validate_types(value, name)


def validate_node(node: Any, name: str) -> None:
  """A node of a config file: the types of its fields; its children are nodes by themselves."""
  checks.require(isinstance(node, Node), name, node, "a Node")
  checks.require(isinstance(node.name, str), f"{name}: name", node.name, "a string")
  children = node.children if isinstance(node.children, list) else [None]
  checks.require(all(isinstance(child, Node) for child in children), f"{name}: children", node.children,
                 "a list of nodes")
  checks.require(isinstance(node.settings, dict), f"{name}: settings", node.settings, "a dict of settings")
  if node.data is not None:
    validate_source(node.data, f"{name}: data")


_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}


def _element(kind: Any) -> Any:
  """The type of a tuple's elements, or None for another type."""
  return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def _validate_federation(federation: FederationConfig) -> None:
  """The tree's sizes; `synthetic` checks its own."""
  partition, swap = federation.partition, federation.swap
  name = "config.federation.partition"
  checks.require(all(count >= 1 for count in partition.branching), f"{name}.branching", partition.branching,
                 "at least one child at each level")
  checks.require(len(partition.alphas) == len(partition.branching), f"{name}.alphas", partition.alphas,
                 f"one number for each level of branching={partition.branching}")
  checks.require(all(0 < alpha < math.inf for alpha in partition.alphas), f"{name}.alphas", partition.alphas,
                 "positive numbers")
  checks.require(len(swap.nodes) in (0, 2) and len(set(swap.nodes)) == len(swap.nodes), "config.federation.swap.nodes",
                 swap.nodes, "the paths of two different nodes")
  _in_range("config.federation.swap.share", swap.share, 0, 1)
  checks.require(bool(swap.nodes) or not swap.share, "config.federation.swap.share", swap.share,
                 "two nodes in config.federation.swap.nodes", "name them, such as ('law/eu','code/python')")


def _validate_model(model: ModelConfig) -> None:
  for name in ("num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff"):
    _at_least(f"config.model.{name}", getattr(model, name), 1)
  _at_least("config.model.vocab_size", model.vocab_size, 0)
  checks.require(model.d_model % (2 * model.num_heads) == 0, "config.model.d_model", model.d_model,
                 f"a multiple of twice num_heads={model.num_heads} (rotary positions turn pairs)")
  checks.require(model.num_heads % model.num_kv_heads == 0, "config.model.num_kv_heads", model.num_kv_heads,
                 f"a divisor of num_heads={model.num_heads}")
  checks.one_of("config.model.compute_dtype", model.compute_dtype, ("float32", "bfloat16"))
  checks.one_of("config.model.attention", model.attention, ("auto", "xla", "cudnn", "splash"))
  checks.one_of("config.model.remat", model.remat, ("none", "blocks", "dots"))
  _positive("config.model.rope_base", model.rope_base)
  _positive("config.model.norm_epsilon", model.norm_epsilon)
  _in_range("config.model.key_layer_share", model.key_layer_share, 0, 1)


def validate_node_settings(settings: NodeSettings, where: str) -> None:
  """Checks one node's settings; `where` names the node in the error."""
  leasts = {"local_steps": 0, "batch_size": 1, "warmup_steps": 0, "rounds_per_parent_round": 1, "max_train_bytes": 0,
            "joins_round": 0, "leaves_round": 0, "loses_data_round": 0, "member_count": 0}
  for name, least in leasts.items():
    _at_least(f"{where}: {name}", getattr(settings, name), least)
  _positive(f"{where}: learning_rate", settings.learning_rate)
  checks.one_of(f"{where}: lr_schedule", settings.lr_schedule, ("constant", "cosine", "wsd"))
  _at_least(f"{where}: weight_decay", settings.weight_decay, 0)
  checks.require(settings.clip_norm > 0, f"{where}: clip_norm", settings.clip_norm, "a positive norm",
                 "inf switches clipping off")
  for name in ("down_temperature", "up_temperature", "backbone_independence", "key_layer_independence"):
    _at_least(f"{where}: {name}", getattr(settings, name), 0)
  for name in ("loss_before", "loss_after", "late_weight", "quorum"):
    _in_range(f"{where}: {name}", getattr(settings, name), 0, 1)
  for name in ("step_seconds", "step_seconds_spread"):
    _in_range(f"{where}: {name}", getattr(settings, name), 0, 1e9)
  checks.require(0 < settings.member_share <= 1, f"{where}: member_share", settings.member_share,
                 "a share of the members, above 0 and at most 1", "member_count takes a number of them")
  checks.require(settings.deadline_seconds > 0, f"{where}: deadline_seconds", settings.deadline_seconds,
                 "a positive number of seconds", "inf waits for everybody")
  checks.require(settings.leaves_round == 0 or settings.leaves_round > settings.joins_round, f"{where}: leaves_round",
                 settings.leaves_round, f"a round after joins_round={settings.joins_round}", "0 stays to the end")
  checks.one_of(f"{where}: trust", settings.trust, ("validated", "full"))
  checks.one_of(f"{where}: acceptance", settings.acceptance, ("always", "validated"))
  cap = settings.member_weight_cap
  checks.require(0 < cap <= 1, f"{where}: member_weight_cap", cap, "a number above 0, up to 1 (no cap)")
  _in_range(f"{where}: quality_floor", settings.quality_floor, 0, math.inf, right_open=True)
  _validate_privacy(settings, where)


def _validate_privacy(settings: NodeSettings, where: str) -> None:
  """One node's own settings; `privacy.policy.check` sees how they go together with everybody else's."""
  checks.one_of(f"{where}: privacy", settings.privacy, ("none", "local", "central"))
  checks.one_of(f"{where}: privacy_clip_by", settings.privacy_clip_by, ("model", "layer"))
  for name in ("privacy_noise", "privacy_quantile_noise", "privacy_quantile_rate", "example_noise"):
    value = getattr(settings, name)
    checks.require(0 <= value < math.inf, f"{where}: {name}", value, "a number from 0")
  for name in ("privacy_clip", "privacy_budget", "example_clip"):
    value = getattr(settings, name)
    checks.require(value > 0, f"{where}: {name}", value, "a positive number, or inf")
  _in_range(f"{where}: privacy_quantile", settings.privacy_quantile, 0, 1, right_open=True)
  checks.require(0 < settings.privacy_delta < 1, f"{where}: privacy_delta", settings.privacy_delta,
                 "a number between 0 and 1")
  for noise, clip in (("privacy_noise", "privacy_clip"), ("privacy_quantile", "privacy_clip"),
                      ("example_noise", "example_clip")):
    checks.require(getattr(settings, noise) == 0 or getattr(settings, clip) < math.inf, f"{where}: {clip}",
                   getattr(settings, clip), f"a finite norm with {noise}={getattr(settings, noise)}",
                   "noise hides nothing of a size that is not bounded")


def _at_least(name: str, value: float, least: float) -> None:
  checks.require(value >= least, name, value, f"at least {least}")


def _positive(name: str, value: float) -> None:
  checks.require(0 < value < math.inf, name, value, "a positive number")


def _in_range(name: str, value: float, low: float, high: float, *, right_open: bool = False) -> None:
  ok = low <= value < high if right_open else low <= value <= high
  checks.require(ok, name, value, f"a number from {low} to {high}{' (exclusive)' if right_open else ''}")
