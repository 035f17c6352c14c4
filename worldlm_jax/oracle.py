"""The algorithm one node at a time: slow, obvious, and what the vectorised engine must agree with.

`fit` is the recursion of a round as one would write it on paper. Nothing here is stacked, padded, masked or jitted (but
for the gradient), and all sums over parameters run in NumPy's float64. The tests hold `worldlm_jax.engine` against it.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from worldlm_jax import (
  attendance,
  local,
  model,
  oracle_attention,
  oracle_guards,
  oracle_nodes,
  oracle_privacy,
  plain,
  schedule,
)
from worldlm_jax.config import Config
from worldlm_jax.exchange import backbone as backbone_lib, relevance, trust
from worldlm_jax.federation import Federation, Member
from worldlm_jax.oracle_attention import Pieces
from worldlm_jax.oracle_nodes import Edge, NodeState, Residual, Shared
from worldlm_jax.oracle_rules import Rules
from worldlm_jax.plain import Layers
from worldlm_jax.privacy import policy


class Oracle:
  """Runs rounds over a federation in plain Python.

  Args:
    config: a validated config.
    federation: the resolved tree.
    arch: the model.
    params: the initial parameters of every node.
    batch: (identity, step) -> int32 `[B, W]`, the windows of a node's optimizer step.
    learning_rate: (path, step) -> the rate of a node's optimizer step.
    text_tokens: path -> how much text a node with data has.
    validation: path -> int32 `[E, W]`, the validation batches of nodes that have one.
  """

  def __init__(
    self, config: Config, federation: Federation, arch: model.Architecture, params: model.Params,
    batch: Callable[[str, int], np.ndarray], learning_rate: Callable[[str, int], float],
    text_tokens: dict[str, int], validation: dict[str, np.ndarray],
  ):
    self.config, self.federation, self.arch = config, federation, arch
    self.batch, self.learning_rate = batch, learning_rate
    self.judge = oracle_nodes.Judge(arch, validation, self._from_lists)
    self.text_tokens = text_tokens
    self.num_rounds = config.rounds * len(schedule.stages(federation, config.schedule))
    epochs = schedule.epochs(config, federation, text_tokens)
    self.epochs = {m.path: epochs[d][i] for d, level in enumerate(federation.levels) for i, m in enumerate(level)}
    self.structure = jax.tree.structure(params["key_layers"])
    params = jax.tree.map(jnp.asarray, params)
    self.shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(params["key_layers"])]
    self.num_layers = arch.num_key_layers
    self._step = jax.jit(functools.partial(oracle_nodes.optimizer_step, arch, config.optimizer))
    self._one_gradient = jax.jit(jax.grad(lambda p, windows_1xW: oracle_nodes.loss(arch, p, windows_1xW)))
    self.server = backbone_lib.server_optimizer(config.backbone)
    self.nodes = {
      m.path: NodeState(
        params["backbone"], self._to_lists(params["key_layers"]), local.optimizer(config.optimizer).init(params),
        self.server.init(params["backbone"]), plain.scaled(self._to_lists(params["key_layers"]), 0.0),
        plain.zeros(params["backbone"]),
      )
      for m in federation.members
    }
    self.rounds, self.seed = config.payload != "float32", config.seed
    self.releases, self.noises_means = policy.any_updates(federation), policy.any_central(federation)
    self.edge = Edge(config.payload, [shape[-1] for shape in self.shapes])
    for node in self.nodes.values():
      zeros = node.backbone_update, node.update
      node.handed, node.errors, node.addition_errors = (node.backbone, node.key_layers), zeros, zeros
      node.withheld = node.kept = node.moved = zeros
    for member in federation.members:
      self.nodes[member.path].clip = member.settings.privacy_clip
    self.rules = Rules(federation, config, arch.num_key_layers > 0)
    self.children = federation.members_of
    self.attends = attendance.Attendance(config.seed, federation)

  def params(self, path: str) -> model.Params:
    """A node's parameters, as the engine holds them."""
    node = self.nodes[path]
    return {"backbone": node.backbone, "key_layers": self._from_lists(node.key_layers)}

  def used(self, path: str, trust: float | None = None) -> model.Params:
    """The model that a node uses, or would use at another trust."""
    t = self.nodes[path].trust if trust is None else trust
    above = self.params(self.federation.by_path[path].parent or path)
    if self.rounds:
      backbone, key_layers = self.nodes[path].handed
      above = {"backbone": backbone, "key_layers": self._from_lists(key_layers)}
    return jax.tree.map(lambda own, p: jnp.float32(p + t * plain.minus(own, p)), self.params(path), above)

  def round(self, index: int, stage: int | None = None, absent: Collection[str] = ()) -> None:
    """One round of the root; `absent` are lost before training, whatever the settings say."""
    self.index, self.stage, self.attends.absent = index, stage, absent
    for before, after in self.federation.moves(index):
      self.nodes[after] = copy.deepcopy(self.nodes[before])
      self.nodes[after].heard = False
    self.fit(self.federation.members[0], None, True, {})

  def fit(self, q: Member, parent: Member | None, first_repeat: bool, last: dict[str, Shared]) -> None:
    """One round at node q: down-phase, training, its children's rounds, up-phase.

    `last` is what the nodes below the parent shared when their round began: they run side by side,
    and nobody sees what a sibling does meanwhile.
    """
    node, settings = self.nodes[q.path], q.settings
    before = self.nodes[q.path].backbone, self.nodes[q.path].key_layers
    if parent is not None:
      above = self.nodes[parent.path]
      is_news = node.fresh and node.heard and node.gain >= self.rules.least_gain(q.path)
      if is_news and first_repeat and node.relevance == relevance.UNKNOWN:
        self._measure_relevance(q, parent)
      known = jnp.float32(node.relevance), jnp.float32(self.epochs[q.path])
      now = jnp.int32(self.index), jnp.int32(self.num_rounds)
      may = [self.rules.takes(part, q.path) for part in ("backbone", "key_layers")]
      held = node.handed
      if self.rounds:
        self.edge.hand_down(node, above.backbone, above.key_layers)
      else:
        node.handed = above.backbone, above.key_layers
      if settings.privacy == "central" and settings.privacy_quantile and q.trains:
        node.clip = above.clip
      new_backbone, new_layers = node.handed
      node.handed = tuple(new if ok else old for new, old, ok in zip(node.handed, held, may, strict=True))
      takes = [ok and bool(relevance.shares(*known, jnp.float32(independence), *now)) for ok, independence in
               zip(may, (settings.backbone_independence, settings.key_layer_independence), strict=True)]
      if takes[0]:
        node.backbone = jax.tree.map(lambda a, b: np.float32(a + b), new_backbone, node.kept[0])
      if self.num_layers:
        self._attend_down(q, parent, first_repeat, last, takes)
        if takes[1]:
          node.key_layers = plain.combine([new_layers, node.kept[1]], [1.0, 1.0])
    # How far it has moved since its members were last handed its model.
    news, held = float(node.fresh), node.withheld
    node.moved = (
      plain.weighted(
        node.backbone, [node.backbone_update, held[0], node.backbone, before[0]], [news, news, 1.0, -1.0]
      ),
      plain.combine([node.update, held[1], node.key_layers, before[1]], [news, news, 1.0, -1.0]),
    )
    node.update, node.backbone_update = plain.scaled(node.update, 0.0), plain.zeros(node.backbone)
    node.withheld = node.backbone_update, node.update
    node.own_weight = node.weight = 0.0
    node.trained = node.fresh = False
    level = len(self.federation.ancestors[q.path]) - 1
    trains = schedule.trains(self.federation, level)[[m.path for m in self.federation.levels[level]].index(q.path)]
    if trains and attendance.has_data(q, self.index) and self.stage in (None, level):
      self._train(q)
      validates = parent is not None and q.path in self.judge.windows
      if validates and self.rules.least_gain(q.path) > -math.inf:
        node.gain = self._gain(q, self.nodes[str(q.parent)])
      if validates and settings.trust == "validated" and all(may) and not self.rules.keeps(q.path):
        losses = {t: self.judge.loss(q.path, self.used(q.path, t)) for t in trust.TRUSTS}
        node.trust = min(losses, key=losses.__getitem__)
    if self.stage == level or not self.children[q.path]:
      return
    for repeat in range(1 if parent is None else settings.rounds_per_parent_round):
      turnout = self.attends.next(q.path, self.index)
      shared = {m.path: self.nodes[m.path].shared() for m in self.federation.subtree(q.path)[1:]}
      for child in self.children[q.path]:
        if child.path in turnout.there:
          self.fit(child, q, repeat == 0, shared)
          if self.rounds and self.nodes[child.path].gain >= self.rules.least_gain(child.path):
            self.edge.send(self.nodes[child.path])
      counted = [p for p in turnout.arrived if self.nodes[p].gain >= self.rules.least_gain(p)]
      arrived = {path: self.nodes[path] for path in counted if self.nodes[path].fresh}
      rejected = oracle_guards.rejected(
        self.config.guards, {path: (child.backbone_update, child.update) for path, child in arrived.items()}
      )
      for child in self.children[q.path]:
        self.nodes[child.path].heard = child.path in turnout.arrived and child.path not in rejected
      here = [c for c in self.children[q.path] if self.nodes[c.path].heard and c.path in counted]
      if any(self.nodes[c.path].weight for c in here):
        self._merge(q, here, [turnout.arrived[c.path] for c in here])

  def _measure_relevance(self, q: Member, parent: Member) -> None:
    """The cosine of the node's first update with everybody else's mean, seen in the model that it is handed next."""
    node, above = self.nodes[q.path], self.nodes[parent.path]
    own, update = plain.flat(node.known()), plain.flat((node.backbone_update, node.update))
    moved = plain.flat((above.backbone, above.key_layers)) - (own - update)
    share = self.rules.own_share(q.path, self.text_tokens)
    node.relevance = plain.cosine(update, moved - share * update)

  def _train(self, q: Member) -> None:
    node, settings = self.nodes[q.path], q.settings
    params = self.params(q.path)
    before, predicted = dataclasses.replace(node), 0
    if self.config.optimizer.moments == "reset":
      node.opt_state = local.optimizer(self.config.optimizer).init(params)
    for step in range(settings.local_steps):
      windows = self.batch(q.identity, node.step)[: settings.batch_size]
      rates = self.learning_rate(q.path, node.step), settings.clip_norm, settings.weight_decay
      gradient = oracle_privacy.example_gradient(self._one_gradient, q, node, self.seed, params, windows, step)
      params, node.opt_state = self._step(params, node.opt_state, windows, *rates, gradient)
      node.step += 1
      predicted += int(np.count_nonzero(windows[:, 1:] >= 0))
    node.backbone, node.key_layers = params["backbone"], self._to_lists(params["key_layers"])
    node.update = plain.combine([node.key_layers, before.key_layers], [1.0, -1.0])
    node.backbone_update = jax.tree.map(plain.minus, node.backbone, before.backbone)
    if self.releases:
      oracle_privacy.release(q, node, self.seed, self.structure, self.shapes, bool(self.children[q.path]))
    node.draws += 1
    node.own_weight = {
      "text": float(self.text_tokens[q.path]), "tokens": float(predicted), "uniform": 1.0
    }[self.config.backbone.weights]
    node.weight += node.own_weight
    node.trained = node.fresh = True

  def _attend_down(
    self, q: Member, parent: Member, first_repeat: bool, last: dict[str, Shared], takes: list[bool]
  ) -> None:
    """Mixes a node's own model with what others learned; `takes` says which parts of it are its parent's."""
    node, keys = self.nodes[q.path], self.config.key_layers
    updates, (_, own), (_, parents) = keys.values == "updates", node.known(), node.handed
    may_take = self.rules.takes("key_layers", q.path)
    if not updates and not may_take:
      parents = own
    is_known = node.heard and node.gain >= self.rules.least_gain(q.path)  # to its parent, which does the mixing
    update = node.update if is_known else plain.scaled(node.update, 0.0)
    query = self._query(own, update, parents)
    pool = self._pool(q, parent, first_repeat, last) if keys.residuals_per_layer and keys.residuals_received else []
    node.received = []
    for i in range(self.num_layers):
      offers = [r for r in pool if r.index == i]
      ranked = sorted(offers, key=lambda r: -oracle_attention.routing_score(keys.similarity, *query, pool, r))
      node.received += ranked[: keys.residuals_received]
    routed = [[r.layer for r in node.received if r.index == i] for i in range(self.num_layers)]
    if updates:
      backbone_update = node.backbone_update if is_known else plain.zeros(node.backbone)
      self._attend_updates(q, parent, first_repeat, last, takes, (backbone_update, update), routed)
      return
    candidates = [
      [plain.layer(own, i), *([plain.layer(parents, i)] if may_take else []), *routed[i]]
      for i in range(self.num_layers)
    ]
    mixed, _ = self._attended_layers(q, own, *query, candidates, None, q.settings.down_temperature, node.backbone)
    if q.settings.down_temperature == 0 and keys.similarity.endswith("cosine"):
      mixed = own  # by any cosine a node is most like itself
    _, node.key_layers = self.judge.accept(q, (node.backbone, own), (node.backbone, mixed))

  def _attend_updates(
    self, q: Member, parent: Member, first_repeat: bool, last: dict[str, Shared], takes: list[bool],
    update: tuple[Any, Layers], routed: list[list[list[np.ndarray]]],
  ) -> None:
    """Adds what a node finds relevant to what is its own; `routed` has the residual layers that it got, by layer."""
    node, above, keys = self.nodes[q.path], self.nodes[parent.path], self.config.key_layers
    whole = keys.granularity == "model"
    places = [(t, i) for t in range(len(self.shapes)) for i in range(self.num_layers)]

    def pieces(backbone: Any, layers: Layers) -> Pieces:
      """What is the node's own."""
      found: Pieces = {} if takes[1] else {(t, i): layers[t][i] for t, i in places}
      return found | ({"backbone": plain.flat(backbone)} if whole and not takes[0] else {})

    own = pieces(*update)
    if not own:
      return
    candidates, means = [], 0
    if first_repeat and above.trained and self.rules.looks_at(q.path, parent.path):
      candidates = [pieces(above.backbone_update, above.update)]
    elif first_repeat and not above.trained and keys.candidates != "siblings" and self.rules.follows(q.path):
      share, others = self.rules.own_share(q.path, self.text_tokens), self.rules.others(q.path, self.text_tokens)
      rest = {place: (moved - share * own[place]) / (1 - share) for place, moved in pieces(*above.moved).items()}
      candidates, means = ([rest], others) if others else ([], 0)
    for sibling in self.children[parent.path] if keys.candidates != "everybody" else ():
      seen = last.get(sibling.path)
      if sibling.path != q.path and self.rules.looks_at(q.path, sibling.path) and seen and seen.fresh and (
          seen.gain >= self.rules.least_gain(sibling.path)):
        candidates.append(pieces(seen.backbone_update, seen.update))
    for r in range(0 if takes[1] else max(map(len, routed))):
      candidates.append({
        (t, i): tensor for i, layers in enumerate(routed) if r < len(layers) for t, tensor in enumerate(layers[r])
      })
    units = [[*own]] if whole else plain.units(keys.granularity, len(self.shapes), self.num_layers)
    added = oracle_attention.attended_updates(keys, units, own, candidates, means)
    before = node.backbone, node.key_layers
    if not takes[1]:
      layers = [[added[t, i] for i in range(self.num_layers)] for t in range(len(self.shapes))]
      layers = self.edge.added_layers(node, layers) if self.rounds else layers
      node.key_layers = plain.combine([node.key_layers, layers], [1.0, 1.0])
    if "backbone" in added:
      moved = plain.unflattened(added["backbone"], node.backbone)
      moved = self.edge.added_backbone(node, moved) if self.rounds else moved
      node.backbone = jax.tree.map(lambda own, add: np.float32(own + add), node.backbone, moved)
    node.backbone, node.key_layers = self.judge.accept(q, before, (node.backbone, node.key_layers))

  def _merge(self, p: Member, here: list[Member], counts: list[float]) -> None:
    """Merges members, each of which counts a part of its weight."""
    node, members = self.nodes[p.path], [self.nodes[c.path] for c in here]
    mean, sent, kept = self.rules.sums("backbone", p, here, counts, self.nodes)
    noise = None

    def step(shares: list[float]) -> Any:
      total = oracle_guards.combined(self.config.backbone, [m.backbone_update for m in members], shares)
      total = total if noise is None else jax.tree.map(np.add, total, noise["backbone"])
      return self.server.update(jax.tree.map(lambda d: -jnp.float32(d), total), node.server, node.backbone)

    others = [step(shares)[0] for shares in (sent, kept)] if (sent, kept) != (mean, [0.0] * len(here)) else []
    if self.noises_means:
      like = oracle_privacy.as_update(self.structure, self.shapes, members[0].backbone_update, node.key_layers)
      noise = oracle_privacy.mean_noise(p, node, self.seed, [*zip(here, members, strict=True)], mean, like)
    moved, node.server = step(mean)
    before, node.backbone = node.backbone, optax.apply_updates(node.backbone, moved)
    moved = others[0] if others else jax.tree.map(plain.minus, node.backbone, before)
    node.backbone_update = jax.tree.map(np.add, node.backbone_update, moved)
    if others:
      node.kept = jax.tree.map(np.add, node.kept[0], others[1]), node.kept[1]
    if self.num_layers:
      self._merge_key_layers(p, here, counts, noise)
    on = [a * self.nodes[c.path].weight for a, c in zip(counts, here, strict=True)
          if any(self.rules.goes_on(part, c.path) for part in self.rules.parts)]
    node.weight, node.fresh = node.weight + sum(on), node.fresh or any(on)

  def _merge_key_layers(self, p: Member, here: list[Member], counts: list[float], noise: Any) -> None:
    counts = [a for a, c in zip(counts, here, strict=True) if self.rules.in_mean("key_layers", c.path)]
    here = [c for c in here if self.rules.in_mean("key_layers", c.path)]
    node, members = self.nodes[p.path], [self.nodes[c.path] for c in here]
    weights = self.rules.weights(here, counts, self.nodes)
    keys = self.config.key_layers
    if keys.values == "updates":
      mean, sent, kept = (
        oracle_guards.combined(self.config.backbone, [m.update for m in members], shares) if members
        else plain.scaled(node.update, 0.0)
        for shares in self.rules.sums("key_layers", p, here, counts, self.nodes)
      )
      mean = mean if noise is None else plain.combine([mean, self._to_lists(noise["key_layers"])], [1.0, 1.0])
      sent = mean if noise is not None else sent
      mixed = plain.combine([node.key_layers, mean], [1.0, 1.0])
      shown = [(c, m.update) for c, m in zip(here, members, strict=True) if m.fresh]
      use = [
        [plain.cosine(*(np.concatenate(plain.layer(layers, i)) for layers in (mean, update))) for _, update in shown]
        for i in range(self.num_layers)
      ]
    else:
      base = node.update if node.trained else plain.scaled(node.update, 0.0)
      shown = [(c, m.known()[1]) for c, m in zip(here, members, strict=True)]
      own = [node.key_layers] if node.trained else []
      prior = [node.own_weight] * len(own) + weights
      mixed, used = self._attended_layers(
        p, node.key_layers, *self._query(node.key_layers, base, plain.combine([node.key_layers, base], [1.0, -1.0])),
        [[plain.layer(o, i) for o in own + [layers for _, layers in shown]] for i in range(self.num_layers)],
        None if keys.prior == "uniform" else prior, p.settings.up_temperature, node.backbone, len(own),
      )
      use = [w[len(own) :] for w in used]
    node.sent = []
    if p.parent is not None and len(shown) + node.trained > 1:
      offered = [s for s, (c, _) in enumerate(shown) if self.rules.offers(c.path)]
      for i in range(self.num_layers):
        for s in sorted(offered, key=use[i].__getitem__)[: keys.residuals_per_layer]:
          node.sent.append(Residual(plain.layer(shown[s][1], i), i, shown[s][0].path, self.index))
    _, accepted = self.judge.accept(p, (node.backbone, node.key_layers), (node.backbone, mixed))
    if keys.values == "updates" and accepted is mixed:  # its members' progress is its own from now on
      node.update = plain.combine([node.update, sent], [1.0, 1.0])
      node.kept = node.kept[0], plain.combine([node.kept[1], kept], [1.0, 1.0])
    elif keys.values == "layers" and self.rounds:  # what it sends up is all that has changed
      node.update = plain.combine([node.update, accepted, node.key_layers], [1.0, 1.0, -1.0])
    node.key_layers = accepted

  def _query(self, own: Layers, update: Layers, parents: Layers) -> tuple[Layers, Layers | None]:
    """Direction and origin of the comparison; see `AttendRule`. No origin means zero."""
    if self.config.key_layers.values == "updates":
      return update, None
    if self.config.key_layers.similarity == "centered_cosine":
      return plain.combine([own, parents], [1.0, -1.0]), parents
    if self.config.key_layers.similarity == "update_cosine":
      return update, plain.combine([own, update], [1.0, -1.0])
    return own, None

  def _pool(self, q: Member, parent: Member, first_repeat: bool, last: dict[str, Shared]) -> list[Residual]:
    """Residual layers on this side of the tree that q may get."""
    updates = self.config.key_layers.values == "updates"
    found = [
      r for path, shared in last.items() if not self.federation.is_within(path, q.path)
      and all(last[p].heard for p in self.federation.ancestors[path] if p in last) for r in shared.sent
    ]
    from_above = [] if updates and not first_repeat else self.nodes[parent.path].received
    permitted = [r for r in found + from_above if self.rules.gets_residuals(q.path, r.origin)]
    return [r for r in permitted if not updates or r.round >= self.index - 1]

  def _attended_layers(self, q, own, direction, origin, candidates, prior, temperature, backbone, num_own=None):
    return oracle_attention.attended_layers(
      self.config.key_layers, own, direction, origin, candidates, prior, temperature,
      lambda layers: self.judge.loss_of(q.path, backbone, layers), num_own, q.settings.member_weight_cap,
    )

  def _gain(self, q: Member, above: NodeState) -> float:
    """How much lower the loss of a node's own model is than that of its parent's, as far as that crosses the edge."""
    backbone, layers = self.nodes[q.path].handed if self.rounds else (above.backbone, above.key_layers)
    own = self.params(q.path)
    theirs = {"backbone": backbone, "key_layers": self._from_lists(layers)}
    theirs = own | {part: theirs[part] for part in self.rules.parts}
    before, after = self.judge.loss(q.path, theirs), self.judge.loss(q.path, own)
    return before - after if np.isfinite(after) else -math.inf

  def _to_lists(self, key_layers: Any) -> Layers:
    return [[np.asarray(layer, np.float64).ravel() for layer in leaf] for leaf in jax.tree.leaves(key_layers)]

  def _from_lists(self, layers: Layers) -> Any:
    leaves = [
      jnp.stack([jnp.asarray(layer.reshape(shape), jnp.float32) for layer in tensor])
      for tensor, shape in zip(layers, self.shapes, strict=True)
    ]
    return jax.tree.unflatten(self.structure, leaves)
