"""Algorithms: each a rule for the backbone and a rule for the key layers, in a file of its own.

A row says how it arranges the configured tree (`arrange`), whether its models have key layers (`has_key_layers`;
without them the backbone is the whole model), which parts of a model cross an edge (`shares`), and how its pair of
rules is made (`make`).
"""

import dataclasses
import math
from types import ModuleType

from worldlm_jax import checks, governance as governance_lib, model
from worldlm_jax.algorithms import centralized, fedavg, fedper, hierfavg, local, worldlm, worldlm_paper
from worldlm_jax.algorithms.rules import Algorithm, averaged
from worldlm_jax.config import ALGORITHMS, Config, num_key_layers as configured_key_layers
from worldlm_jax.data.tokenizer import Tokenizer
from worldlm_jax.federation import Federation
from worldlm_jax.model import llama
from worldlm_jax.privacy import policy

ROWS: dict[str, ModuleType] = dict(zip(
  ALGORITHMS, (worldlm, worldlm_paper, fedavg, hierfavg, fedper, local, centralized), strict=True
))


def arranged(config: Config, federation: Federation) -> Federation:
  """The configured tree as the config's algorithm sees it. Raises `InputError` where rules cannot hold together."""
  found: Federation = ROWS[config.algorithm].arrange(federation)
  governance_lib.check(governance(config, found), config.backbone.server_optimizer)
  return found


def governance(config: Config, federation: Federation) -> governance_lib.Governance:
  """The rules of a tree; where a model has no key layers of its own, those about them hold for all of it."""
  whole = configured_key_layers(config.model) > 0 and not ROWS[config.algorithm].has_key_layers
  keys = config.key_layers
  over_layers = keys.values == "layers"
  attended = ("key_layers", "backbone") if keys.granularity == "model" and not over_layers else ("key_layers",)
  siblings = keys.candidates != "everybody" and not over_layers
  return governance_lib.Governance(federation, ROWS[config.algorithm].shares, whole, over_layers, attended, siblings)


def adapted(config: Config) -> Config:
  """The config as its run records it: as its algorithm wants it, with the sizes of the model that it starts from."""
  config = worldlm_paper.adapt(config) if config.algorithm == "worldlm_paper" else config
  return dataclasses.replace(config, model=llama.adopted(config.model)) if config.model.init_from else config


def make(config: Config, arch: model.Architecture, federation: Federation) -> Algorithm:
  """The pair of rules of the config's algorithm, with those that the nodes have set themselves."""
  algorithm: Algorithm = ROWS[config.algorithm].make(config, arch, federation)
  policy.check(config, federation, algorithm.shares)
  rules = governance(config, federation)
  _check_together(config, federation, rules)
  algorithm = algorithm._replace(guards=config.guards)
  judges = _limits(config) or config.backbone.aggregate != "mean" or policy.any_updates(federation)
  if algorithm.shares and rules.restricts:  # an update is what can be kept apart from everybody else's
    algorithm = algorithm._replace(
      governance=rules, needs_validation=algorithm.needs_validation or rules.has_floor,
      backbone=averaged(config.backbone, by_updates=True) if algorithm.shares == ("backbone",) else algorithm.backbone,
    )
  if not algorithm.shares or (config.payload == "float32" and not judges and not rules.restricts):
    return algorithm
  return algorithm._replace(payload=config.payload, tracks=algorithm.shares)


def _limits(config: Config) -> bool:
  """Whether honest updates might be rejected, too."""
  return config.guards.norm_ratio < math.inf or config.guards.opposition < 1


def _check_together(config: Config, federation: Federation, rules: governance_lib.Governance) -> None:
  """Raises `InputError` where privacy, or what nodes say in their rules, would not be what is claimed for it."""
  if rules.restricts:
    noised = policy.any_central(federation)
    checks.require(not noised, "node: privacy", "central", "'local' or 'none' where nodes have rules of their own",
                   "the noise of a mean is for one mean of all members, not for what each of them lets others have")
    checks.require(config.backbone.aggregate == "mean", "config.backbone.aggregate", config.backbone.aggregate,
                   "'mean' where nodes have rules of their own", "config.guards judges updates under rules, too")
    checks.require(not (rules.has_floor and policy.any_updates(federation)), "node: quality_floor", "above 0",
                   "0 where updates are protected", "what members report of their quality is not accounted for")
  judges = _limits(config) or config.backbone.aggregate != "mean"
  checks.require(not (judges and policy.any_central(federation)), "node: privacy", "central",
                 "a plain mean of all members: what one of them does to it is bounded no more where others decide who "
                 "counts", "set privacy=local, or neither limits in config.guards nor config.backbone.aggregate")
  for m in federation.members:
    private = policy.protects_updates(m.settings) or policy.protects_examples(m.settings)
    checks.require(not (m.moved_from and private), f"node {m.path!r}: privacy", m.settings.privacy,
                   "'none' at nodes that move: their releases are counted by place")


def num_key_layers(config: Config) -> int:
  """How many of the last blocks are key layers under the config's algorithm."""
  return configured_key_layers(config.model) if ROWS[config.algorithm].has_key_layers else 0


def architecture(config: Config, tokenizer: Tokenizer) -> model.Architecture:
  """The model of the config under its algorithm.

  Raises:
    checks.InputError: the tokenizer has ids that the model has no embedding for.
  """
  separator = tokenizer.separator_id if config.data.document_mask else None
  arch = model.architecture(config.model, tokenizer.vocab_size, separator, num_key_layers(config))
  checks.require(
    arch.vocab_size >= tokenizer.vocab_size, "config.model.vocab_size", arch.vocab_size,
    f"at least {tokenizer.vocab_size}, the vocabulary of {config.data.tokenizer!r}",
    "set it to 0 to take the tokenizer's",
  )
  return arch
