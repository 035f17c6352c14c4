"""Rules of nodes: what the words mean, what they forbid, and that nobody ever holds what it may not."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from worldlm_jax import (
  algorithms,
  checks,
  config as c,
  federation as federation_lib,
  oracle_rules,
  schedule,
  tree_sources,
  trees,
)
from worldlm_jax.exchange import caps


def consortium(rounds, **settings):
  """Two federations and a node by itself; settings by the last name of a node."""
  node = rounds.node
  made = {name: node(name, **settings.get(name, {})) for name in ("p", "q", "r", "s", "c")}
  a = node("a", made["p"], made["q"], made["r"], data=False, **settings.get("a", {}))
  b = node("b", made["s"], data=False, **settings.get("b", {}))
  return node("world", a, b, made["c"], data=False, **settings.get("world", {}))


def rules_of(config):
  """The engine's rules and the oracle's."""
  federation = algorithms.arranged(config, federation_lib.resolve(config))
  row = algorithms.ROWS[config.algorithm]
  return algorithms.governance(config, federation), oracle_rules.Rules(
    federation, config, row.has_key_layers)


def governed(rounds, algorithm="worldlm", values="updates", **settings):
  config = rounds.tiny_config(consortium(rounds, **settings), values=values, similarity="update_cosine")
  config.algorithm = algorithm
  return rules_of(config)[0]


# What the words mean.


@pytest.mark.parametrize(("name", "field", "words", "message"), [
  ("p", "share_backbone", "ab", r"share_backbone='ab': expected anyone, nobody, federation or paths.*did you mean 'b'"),
  ("p", "accept_from", "a/p,anyone", r"accept_from='a/p,anyone'.*'anyone' stands alone"),
  ("a", "members", "federation", r"members='federation': expected anyone, nobody or paths"),
  ("a", "member_weight_cap", 0.0, r"member_weight_cap=0.0: expected a number above 0"),
  ("a", "member_weight_cap", 0.3, r"node 'a': member_weight_cap=0.3: expected at least 1/3, since 3 of its members"),
  ("a", "quality_floor", -1.0, r"quality_floor=-1.0: expected a number from 0"),
])
def test_words_that_mean_nothing_are_said_so(rounds, name, field, words, message):
  with pytest.raises(checks.InputError, match=message):
    governed(rounds, **{name: {field: words}})


def test_rules_that_cannot_hold_together_are_said_so(rounds):
  with pytest.raises(checks.InputError, match=r"quality_floor=1.0: expected 0 as long as its member 'a/p' may"):
    governed(rounds, a={"quality_floor": 1.0}, p={"accept_from": "a/q"})
  with pytest.raises(checks.InputError, match=r"share_backbone='federation': expected anyone with .*centralized"):
    governed(rounds, "centralized", p={"share_backbone": "federation"})
  config = rounds.tiny_config(consortium(rounds, p={"share_backbone": "federation"}))
  config.backbone.server_optimizer = "nesterov"
  with pytest.raises(checks.InputError, match=r"server_optimizer='nesterov': expected 'sgd', since 'a' keeps what"):
    rules_of(config)


def test_rules_are_inherited_and_said_before_training(rounds):
  found = governed(rounds, a={"share_key_layers": "a"}, q={"share_key_layers": "nobody"}, c={"members": "nobody"})
  assert found.lines() == [
    "rules of a: share_key_layers=a", "rules of a/p: share_key_layers=a", "rules of a/q: share_key_layers=nobody",
    "rules of a/r: share_key_layers=a",
  ]  # c has no members
  assert not governed(rounds).restricts and governed(rounds).lines() == []


def test_an_update_for_its_own_federation_stays_there(rounds):
  found = governed(rounds, p={"share_backbone": "federation"})
  assert not found.merges("backbone", "a/p")
  assert found.travels("backbone", "a/p") == "share_backbone=federation of a/p"
  assert found.stays("backbone", "a/p") and not found.stays("key_layers", "a/p")
  assert (found.reached("backbone", "a/p"), found.reached("backbone", "a/q")) == ("a", ".")
  assert found.keeps(1) == ("backbone",) and found.keeps(0) == ()


def test_under_fedavg_there_is_no_federation_but_everybody(rounds):
  """So what is meant for one's own federation leaves for nobody, and the rules about key layers hold for all of it."""
  for rule in ({"share_backbone": "federation"}, {"share_key_layers": "a"}):
    found = governed(rounds, "fedavg", p=rule)
    assert found.merges("backbone", "a/p") and not found.takes("backbone", "a/p")
  assert not governed(rounds, "fedper", p={"share_key_layers": "a"}).merges("backbone", "a/p")


def test_text_beside_its_federation_is_a_member_of_it(rounds):
  config = rounds.tiny_config(rounds.node("world", rounds.node("a", rounds.node("p"), share_backbone="federation")))
  config.inner_text = "beside"
  found, _ = rules_of(config)
  assert not found.merges("backbone", "a") and found.travels("backbone", "a") == "share_backbone=federation of a"
  assert not found.merges("backbone", "a/") and not found.merges("backbone", "a/p")  # the world is theirs


def test_whoever_accepts_from_some_takes_no_model_of_everybodys(rounds):
  found = governed(rounds, q={"accept_from": "federation"})
  assert found.takes("backbone", "a/q") == "accept_from=federation of a/q"  # a has taken the world's model in
  found = governed(rounds, a={"accept_from": "a"})
  assert found.takes("backbone", "a") and not found.takes("backbone", "a/q")
  assert not found.attends("a/q", "a/p") and found.attends("a", "b") == "accept_from=a of a"
  assert not found.merges("backbone", "a")  # it gives nevertheless


def test_who_is_no_member_exchanges_nothing(rounds):
  found = governed(rounds, a={"members": "a/p,a/q"})
  for part in ("backbone", "key_layers"):
    assert found.merges(part, "a/r") == found.takes(part, "a/r") == "members=a/p,a/q of a"
  assert found.attends("a/r", "a/p") and found.attends("a/p", "a/r") and found.receives("b/s", "a/r")


def test_whole_layers_that_hold_what_may_not_leave_do_not_leave(rounds):
  rule = {"p": {"share_key_layers": "federation"}}
  assert governed(rounds, values="layers", **rule).merges("key_layers", "a") == "share_key_layers=federation of a/p"
  assert not governed(rounds, values="updates", **rule).merges("key_layers", "a")


def test_what_others_keep_for_their_federation_stays_there_when_somebody_moves(rounds):
  """Be it in the whole layers of who moves, or in the updates of a federation that moves."""
  node = rounds.node
  a = node("a", node("q"), node("w"), data=False)
  g = node("g", a, node("p"), data=False, share_backbone="g", share_key_layers="g")
  for moved, values, part, path in (("g/p", "layers", "key_layers", "b/p"), ("g/a", "updates", "backbone", "g/a/q")):
    root = node("world", g, node("b", node("s"), data=False), data=False)
    config = rounds.tiny_config(root, values=values, similarity="update_cosine")
    question = "merges" if values == "layers" else "travels"
    assert path == "b/p" or not getattr(rules_of(config)[0], question)(part, path)
    config.federation.moves = [c.Move(moved, "b", 1)]
    assert getattr(rules_of(config)[0], question)(part, path) == "share_{}=g of g/{}".format(part, "a/q")


# The largest weight.


@hypothesis.settings(
  max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(weights=st.lists(st.integers(0, 20), min_size=5, max_size=5), own=st.integers(0, 20),
                  cap=st.floats(0.125, 1, width=32))
def test_no_share_is_above_the_cap_and_nothing_else_is_lost(weights, own, cap):
  total = sum(weights) + own
  hypothesis.assume(total > 0)
  shares, own = np.array(weights, np.float32) / total, own / total
  found = np.asarray(_capped(shares[:, None], np.array([own], np.float32), np.array([cap], np.float32))[:, 0])
  assert (found <= np.float32(cap)).all() and (found[shares == 0] == 0).all()
  np.testing.assert_allclose(found, oracle_rules.capped([*map(float, shares)], own, cap), atol=1e-5)
  if (found < cap * 0.999).any() and (shares[found < cap * 0.999] > 0).any():  # somebody can take what is left
    free = found < cap * 0.999
    grown = found[free & (shares > 0)] / shares[free & (shares > 0)]
    np.testing.assert_allclose(grown, grown[0], rtol=1e-4)
    np.testing.assert_allclose(found.sum() + grown[0] * own, 1, atol=1e-5)


_capped = jax.jit(caps.capped)


# Engine and oracle agree.


def random_words(draw, paths):
  pair = f"{paths[-1]},{paths[len(paths) // 2]}"
  return draw(st.sampled_from(["anyone", "anyone", "federation", "nobody", *paths[1:], pair]))


def random_rules():
  """A tree of up to three levels, and overrides of its nodes' rules."""
  shapes = [(1,), (3,), (2, 2), (3, 1), (1, 2, 2)]

  def draw_one(draw):
    branching = draw(st.sampled_from(shapes))
    paths = ["."]
    above = ["."]
    for size in branching:
      above = [f"{p}/{i}".removeprefix("./") for p in above for i in range(size)]
      paths += above
    fields = ["share_backbone", "share_key_layers", "share_residuals", "accept_from", "members"]
    chosen = draw(st.lists(st.tuples(st.sampled_from(paths), st.sampled_from(fields)), min_size=1, max_size=4))
    overrides = {}
    for path, field in chosen:
      words = random_words(draw, paths)
      overrides.setdefault(path, {})[field] = "anyone" if field == "members" and words == "federation" else words
    return branching, overrides, draw(st.booleans())

  return st.composite(draw_one)()


def config_of(rounds, drawn, algorithm, values):
  branching, overrides, inner_text = drawn

  def grow(name, depth):
    children = [grow(str(i), depth + 1) for i in range(branching[depth])] if depth < len(branching) else []
    return rounds.node(name, *children, data=not children or (inner_text and depth == 1))

  config = rounds.tiny_config(grow("world", 0), values=values, similarity="update_cosine")
  if values == "updates":
    config.key_layers.update_threshold = -1.0  # so that everybody adds everything that it sees
  config.algorithm, config.federation.overrides = algorithm, overrides
  config.node.backbone_independence, config.node.key_layer_independence = 3.0, 1.0
  return config


@hypothesis.settings(
  max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(drawn=random_rules(), algorithm=st.sampled_from(["worldlm", "hierfavg", "fedavg"]),
                  values=st.sampled_from(["layers", "updates"]), inner=st.sampled_from(["beside", "before"]),
                  move=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_both_readings_of_the_rules_agree(rounds, drawn, algorithm, values, inner, move):
  config = config_of(rounds, drawn, algorithm, values)
  config.inner_text = inner
  if move:
    nodes = dict(tree_sources.walk(config.federation.root))
    who, to = ([*nodes][place % len(nodes)] for place in move)
    hypothesis.assume(who != "." and not f"{to}/".startswith(f"{who}/"))
    hypothesis.assume(nodes[who].name not in [child.name for child in nodes[to].children])
    config.federation.moves = [c.Move(who, to, 1)]
  ours, theirs = rules_of(config)
  paths = [m.path for m in ours.federation.members[1:]]
  for path in paths:
    for part in ours.shares:
      for question, answer in (("merges", theirs.in_mean), ("travels", theirs.goes_on), ("takes", theirs.takes)):
        assert (not getattr(ours, question)(part, path)) == answer(part, path), (question, part, path)
      assert ours.stays(part, path) == theirs.is_kept(part, path), (part, path)
    for other in paths:
      if other != path and ours.federation.by_path[other].parent == ours.federation.by_path[path].parent:
        assert (not ours.attends(path, other)) == theirs.looks_at(path, other)
      assert (not ours.receives(path, other)) == theirs.gets_residuals(path, other)
    assert ours.offers(path) == theirs.offers(path)
  text = {m.path: 3 + i for i, m in enumerate(ours.federation.members) if m.data and not m.moved_from}
  assert ours.behind(text) == {p: set(theirs.behind(p, text)) for p in ours.federation.by_path}
  for path in paths:
    assert ours.follows(path) == theirs.follows(path), path


def check_against_oracle(rounds, config, num_rounds=3, atol=2e-5):
  harness = rounds.run(config, num_rounds)
  oracle = harness.oracle()
  for index in range(num_rounds):
    oracle.round(index)
  for path, params in harness.params().items():
    rounds.assert_trees_close(params, oracle.params(path), atol, f"node {path}: ")
  return harness


MIXED = {
  "p": {"share_backbone": "federation", "share_key_layers": "nobody"}, "q": {"accept_from": "nobody"},
  "s": {"share_residuals": "a", "share_key_layers": "a,b"}, "r": {"share_key_layers": "federation"},
  "world": {"member_weight_cap": 0.6}, "b": {"member_weight_cap": 1.0}, "a": {"quality_floor": 0.99, "members": "a"},
}


@pytest.mark.parametrize(("values", "payload"), [
  ("updates", "float32"), pytest.param("layers", "float32", marks=pytest.mark.exhaustive),
])
def test_engine_equals_the_loop_with_rules_of_all_kinds(rounds, values, payload):
  settings = dict(MIXED)
  settings["a"] = settings["a"] | {"rounds_per_parent_round": 2}
  settings["q"] = {"accept_from": "anyone"} if values == "updates" else {}
  config = rounds.tiny_config(consortium(rounds, **settings), values=values, similarity="update_cosine")
  if values == "updates":
    config.key_layers.update_threshold = -0.5
  config.payload = payload
  config.node.backbone_independence, config.node.key_layer_independence = 3.0, 1.0
  check_against_oracle(rounds, config)


# Nobody holds what it may not.


def test_rules_that_permit_everything_change_no_bit(rounds):
  """And without rules there is nothing that could."""
  found = []
  for rule in ({}, {"share_backbone": ".", "share_key_layers": "a,b,.", "accept_from": ".", "members": "a,b,c"}):
    node = rounds.node
    config = rounds.tiny_config(node("world", node("a"), node("b"), node("c"), data=False), update_threshold=-1.0)
    config.federation.overrides = {".": rule}
    marked = Marked(rounds, config)
    engine = marked.harness.engine
    assert (engine.algorithm.governance is None) == (not rule)
    assert all((t.permissions is None) == (not rule) for t in engine.topologies)
    assert all(level.kept is None and level.gain is None for level in engine.abstract_state())
    for index in range(2):
      marked.round(index)
    found.append(jax.device_get(marked.harness.state))
    assert len(engine._compiled) == 3
  for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_array_equal(ours, theirs)


class Marked:
  """A harness in which to train is to add one's own direction, so that it shows whose learning anybody holds."""

  def __init__(self, rounds, config):
    self.harness = rounds.Harness(config)
    self.federation = self.harness.federation
    self.place = {m.path: i for i, m in enumerate(self.federation.members)}

  def marks(self, level):
    """Leaves [N, ...]: of every matrix, the element that is a node's own is one."""
    places = [self.place[m.path] for m in self.federation.levels[level]]

    def one(leaf):
      found = np.zeros((len(leaf), leaf[0].size), np.float32)
      if leaf[0].size >= 64:
        found[np.arange(len(places)), places] = 1.0
      return found.reshape(leaf.shape)

    return jax.tree.map(one, self.harness.state[level].params)

  def train(self, step):
    level, state = step.level, self.harness.state[step.level]
    active = jnp.asarray(np.pad(step.active, (0, len(state.weight) - len(step.active))))
    marks = trees.where(active, self.marks(level), trees.zeros_like(state.params))
    self.harness.state = (*self.harness.state[:level], state._replace(
      params=trees.add(state.params, marks),
      update={part: trees.where(active, marks[part], state.update[part]) for part in state.update},
      own_weight=jnp.where(active, 1.0, state.own_weight), weight=jnp.where(active, 1.0, state.weight),
      trained=state.trained | active, fresh=state.fresh | active,
    ), *self.harness.state[level + 1 :])

  def round(self, index):
    engine = self.harness.engine
    self.harness.state = engine.move(self.harness.state, self.federation.moves(index))
    for step in schedule.round_steps(self.federation, None, self.harness.attends, index):
      if step.kind == "down":
        self.harness.state, _ = engine.down(self.harness.state, step, index)
      elif step.kind == "train":
        self.train(step)
      else:
        self.harness.state, _ = engine.up(self.harness.state, step, index)

  def seen(self, tree, level, begun=None):
    """By path, whose marks are in a tree of leaves [N, ...], beside what it began with."""
    found = {m.path: set() for m in self.federation.levels[level]}
    starts = jax.tree.leaves(begun) if begun is not None else [0.0] * len(jax.tree.leaves(tree))
    for leaf, start in zip(jax.tree.leaves(jax.device_get(tree)), starts, strict=True):
      off = np.abs(leaf - start).reshape(len(leaf), -1)
      for n, m in enumerate(self.federation.levels[level]):
        found[m.path] |= {x for x, i in self.place.items() if off.shape[1] >= 64 and off[n, i] > 1e-4}
    return found


def observe(rounds, config, num_rounds=2):
  """Runs marked rounds; who holds whose learning, by part and path, after checking that everybody may."""
  marked, rules = Marked(rounds, config), rules_of(config)[1]
  engine = marked.harness.engine
  begun = jax.tree.map(lambda leaf: leaf[:1], jax.device_get(engine.init()[0].params))
  held = {}
  for index in range(num_rounds):
    marked.round(index)
    for level, state in enumerate(marked.harness.state):
      for part in engine.algorithm.shares:
        for path, seen in marked.seen(state.params[part], level, begun[part]).items():
          held[part, path] = held.get((part, path), set()) | seen
          for x in seen - {path}:
            assert path in rules.audience(part, x), f"{path} holds {part} of {x}"
            assert x in rules.sources(path), f"{path} took in {part} of {x}"
            assert rules.belongs(x) or path in rules.below(x), f"{path} holds {part} of {x}, which is no member"
        if part in state.update and (not rules.whole_layers or part == "backbone"):
          for path, seen in marked.seen(state.update[part], level).items():  # what crosses the edge up
            for x in seen - {path}:
              assert rules.readers(part, path) <= rules.audience(part, x), f"{path} sends {part} of {x} on"
      if state.received is not None:
        layers = jax.tree.map(lambda leaf: leaf[:, 0], state.received.layers)
        for path, seen in marked.seen(layers, level, None if not rules.whole_layers else begun["key_layers"]).items():
          assert all(path in rules.audience("residuals", x) or path == x for x in seen), f"{path} received of {seen}"
  return held


@hypothesis.settings(
  max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(drawn=random_rules(), algorithm=st.sampled_from(["worldlm", "worldlm", "hierfavg"]),
                  values=st.sampled_from(["updates", "updates", "layers"]))
def test_nobody_holds_what_it_may_not_on_random_trees(rounds, drawn, algorithm, values):
  observe(rounds, config_of(rounds, drawn, algorithm, values))


def test_everybody_holds_what_it_may(rounds):
  """The observer is not blind: it finds all that the rules leave, and how far what they keep back comes."""
  settings = {"p": {"share_backbone": "federation", "share_key_layers": "a,b"}, "q": {"accept_from": "nobody"}}
  config = rounds.tiny_config(consortium(rounds, **settings), update_threshold=-1.0)
  config.node.key_layer_independence = 0.0
  held = observe(rounds, config)
  texts = {"a/p", "a/q", "a/r", "b/s", "c"}
  assert held["backbone", "."] == held["key_layers", "."] == texts - {"a/p"}
  assert held["backbone", "a"] == held["backbone", "a/r"] == texts
  assert held["backbone", "b/s"] == held["backbone", "c"] == texts - {"a/p"}
  assert held["backbone", "a/q"] == held["key_layers", "a/q"] == {"a/q"}
