"""Whose text is protected and how: read from the nodes' settings, with the combinations that would not hold refused."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from worldlm_jax import checks, rngs, schedule
from worldlm_jax.config import Config, NodeSettings
from worldlm_jax.federation import Federation, Member
from worldlm_jax.privacy import accounting
from worldlm_jax.privacy.accounting import Examples
from worldlm_jax.privacy.release import Guard


def protects_updates(settings: NodeSettings) -> bool:
  """Whether a node's updates are clipped and noised, by itself or in its federation's mean."""
  return settings.privacy != "none"


def protects_examples(settings: NodeSettings) -> bool:
  """Whether a node trains by DP-SGD."""
  return settings.example_clip < math.inf


def any_updates(federation: Federation) -> bool:
  """Whether updates of some node are protected."""
  return any(m.trains and protects_updates(m.settings) for m in federation.members)


def any_examples(federation: Federation) -> bool:
  """Whether some node trains by DP-SGD."""
  return any(m.trains and protects_examples(m.settings) for m in federation.members)


def any_central(federation: Federation) -> bool:
  """Whether some federation noises its mean."""
  return any(m.trains and m.settings.privacy == "central" for m in federation.members)


def guards(federation: Federation, level: int, seed: int) -> Guard:
  """How the nodes of a level are protected in a run with this seed: leaves `[n]`."""
  members, settings = federation.levels[level], [m.settings for m in federation.levels[level]]
  heads = federation.is_federation(level)
  protected = np.array([m.trains and protects_updates(m.settings) for m in members])
  adapts = np.array([s.privacy_quantile > 0 for s in settings])
  examples = [m.trains and protects_examples(m.settings) for m in members]

  def kind(name: str) -> np.ndarray:
    return protected & np.array([s.privacy == name for s in settings])

  def numbers(name: str, where: Any) -> np.ndarray:
    return np.where(where, [getattr(s, name) for s in settings], 0.0).astype(np.float32)

  return Guard(
    key=np.stack([np.asarray(jax.random.key_data(rngs.key(seed, m.path, "privacy"))) for m in members]),
    clips=protected, by_layer=np.array([s.privacy_clip_by == "layer" for s in settings]),
    noise=numbers("privacy_noise", kind("local")), mean_noise=numbers("privacy_noise", kind("central")),
    adapts=adapts & kind("local"),
    adapts_mean=adapts & heads & np.array([s.privacy == "central" for s in settings]),
    quantile=numbers("privacy_quantile", True), quantile_noise=numbers("privacy_quantile_noise", True),
    quantile_rate=numbers("privacy_quantile_rate", True),
    hands_down=heads & np.array([m.trains for m in members]),
    example_clip=np.where(examples, [s.example_clip for s in settings], np.inf).astype(np.float32),
    example_noise=numbers("example_noise", examples), example_batch=numbers("batch_size", examples),
  )


def check(config: Config, federation: Federation, shares: Sequence[str]) -> None:
  """Refuses what would give away more than the books say.

  Args:
    config: the experiment.
    federation: the tree, as the algorithm arranges it.
    shares: the parts of the model that cross an edge.

  Raises:
    checks.InputError: names the node, the setting and the remedy.
  """
  if federation.is_pooled:
    for member in federation.members:
      private = protects_updates(member.settings) or protects_examples(member.settings)
      checks.require(not private, "config.algorithm", config.algorithm,
                     "an algorithm that leaves texts where they are, where nodes ask for privacy",
                     "switch privacy and example_clip off for this algorithm")
  if any_updates(federation) or any_examples(federation):
    accounting.require_library()
  if not shares or not (any_updates(federation) or any_examples(federation)):
    return
  checks.require(config.backbone.weights != "tokens", "config.backbone.weights", "tokens",
                 "'text' or 'uniform' with privacy", "how many tokens a node trained on may tell of its text")
  attends = "key_layers" in shares and config.model.key_layer_share > 0
  layers = attends and config.key_layers.values == "layers"
  checks.require(not attends or config.key_layers.similarity != "validation_loss", "config.key_layers.similarity",
                 "validation_loss", "a similarity of updates or layers with privacy",
                 "weights chosen by losses on private text tell of it")
  repeats = any(m.settings.rounds_per_parent_round > 1 for m in federation.members[1:])
  for member in federation.members:
    if member.trains and protects_updates(member.settings):
      _check_member(member, federation, layers, repeats and attends)
      if member.settings.privacy == "central":
        _check_central(config, member, federation, attends)


def _check_member(member: Member, federation: Federation, layers: bool, repeats: bool) -> None:
  settings, where = member.settings, f"node {member.path!r}"
  hands_down = any(m.parent == member.path for m in federation.members)
  checks.require(settings.acceptance == "always" or not (layers or hands_down), f"{where}: acceptance",
                 settings.acceptance, "'always' with privacy, where a node's layers leave it",
                 "what is accepted by losses on private text tells of it")
  apart = {settings.backbone_independence, settings.key_layer_independence}
  checks.require(not repeats or math.inf not in apart or apart <= {0.0, math.inf},
                 f"{where}: key_layer_independence", settings.key_layer_independence,
                 "both independences finite with privacy and rounds_per_parent_round > 1",
                 "relevance would be measured from parameters that never left the node")


def _check_central(config: Config, member: Member, federation: Federation, attends: bool) -> None:
  settings, where = member.settings, f"node {member.path!r}"
  hands_down = any(m.parent == member.path for m in federation.members)
  checks.require(not hands_down, f"{where}: privacy", "central",
                 "'local' or 'none' at a federation that trains before its members",
                 "it hands its own update down to them; or set config.inner_text=beside")
  key_layers = config.key_layers
  mixes = key_layers.values == "layers" or (key_layers.update_strength > 0 and key_layers.candidates != "everybody")
  routes = key_layers.residuals_per_layer > 0 and key_layers.residuals_received > 0
  checks.require(not attends or not (mixes or routes), f"{where}: privacy", "central",
                 "means alone, since attention and residual layers hand on what is of single members",
                 "use privacy=local, or config.key_layers.values=updates, config.key_layers.candidates=everybody and "
                 "config.key_layers.residuals_per_layer=0")
  checks.require(config.payload == "float32", "config.payload", config.payload,
                 f"'float32' with privacy=central ({where})",
                 "what rounding holds back would come on top of a later update, over its clip")
  if settings.privacy_quantile:
    head = federation.by_path[str(member.parent)]
    names = ("privacy", "privacy_clip", "privacy_quantile", "privacy_quantile_noise", "privacy_quantile_rate")
    for other in (head, *(m for m in federation.members if m.parent == head.path)):
      for name in names:
        checks.require(getattr(other.settings, name) == getattr(settings, name), f"node {other.path!r}: {name}",
                       getattr(other.settings, name), f"{getattr(settings, name)!r}, as at {member.path!r}",
                       "a federation has one clip for all its members where it adapts")
    checks.require(not head.trains, f"node {head.path!r}: privacy_quantile", settings.privacy_quantile,
                   "0 (a fixed clip) for members of a federation that trains", "or set config.inner_text=beside")


def trainings_left(
  federation: Federation, examples: dict[str, Examples], releases: bool, rounds: Sequence[Sequence[schedule.Step]]
) -> dict[str, tuple[int, int]]:
  """How often every node with a budget may train, and how often the run would have it: by path.

  Args:
    federation: the tree.
    examples: what nodes that train by DP-SGD sample from, by path.
    releases: whether the algorithm lets any update leave its node.
    rounds: the steps of all rounds.
  """
  wanted = dict.fromkeys(federation.by_path, 0)
  for step in (step for steps in rounds for step in steps if step.kind == "train"):
    for member, active in zip(federation.levels[step.level], step.active, strict=True):
      wanted[member.path] += int(active)
  return {
    m.path: (accounting.allowed(m.settings, examples.get(m.path), releases and protects_updates(m.settings),
                                wanted[m.path]), wanted[m.path])
    for m in federation.members if m.trains and m.settings.privacy_budget < math.inf
  }


def within_budgets(
  federation: Federation, rounds: Sequence[Sequence[schedule.Step]], left: dict[str, tuple[int, int]]
) -> list[list[schedule.Step]]:
  """The steps of all rounds, from the first one on, without the trainings that nobody has a budget for any more."""
  used = dict.fromkeys(left, 0)
  result: list[list[schedule.Step]] = []
  for steps in rounds:
    result.append([])
    for step in steps:
      if step.kind == "train":
        active = step.active.copy()
        for i, member in enumerate(federation.levels[step.level]):
          if active[i] and member.path in left:
            active[i] = used[member.path] < left[member.path][0]
            used[member.path] += int(active[i])
        if not active.any():
          continue
        step = step._replace(active=active)
      result[-1].append(step)
  return result
