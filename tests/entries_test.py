"""What a list of entries may say: everything wrong in it is found, and named, before anything runs."""

from typing import Any

import pytest

from worldlm_jax import algorithms, checks, config as c, entries


def _base() -> c.Config:
  root = c.Node("world", None, [c.Node("law", c.Files("unread"), settings={"local_steps": 30}),
                                c.Node("code", c.Files("unread"))])
  return c.Config(rounds=6, federation=c.FederationConfig(root=root), node=c.NodeSettings(local_steps=20, batch_size=4))


def _comparison(*added: c.Entry, **fields: Any) -> c.Comparison:
  return c.Comparison(_base(), [c.Entry("worldlm"), c.Entry("local"), *added], **fields)


def _message(comparison: c.Comparison) -> str:
  with pytest.raises(checks.InputError) as caught:
    entries.plan(comparison)
  return str(caught.value)


def test_every_entry_is_planned_with_every_seed() -> None:
  overrides = {"backbone.server_optimizer": "nesterov", "node.learning_rate": 0.5}
  comparison = _comparison(c.Entry("variant", overrides), seeds=(7, 3))
  planned = entries.plan(comparison)
  assert [(p.entry, p.seed, p.config.seed, str(p.folder)) for p in planned] == [
    (name, seed, seed, f"runs/{name}/seed{seed}") for seed in (7, 3) for name in ("worldlm", "local", "variant")
  ]
  changed = planned[2].config
  assert (changed.backbone.server_optimizer, changed.node.learning_rate) == ("nesterov", 0.5)
  assert comparison.base == _base() and planned[0].config.backbone == c.BackboneConfig()


def test_entries_are_planned_as_their_runs_record_them() -> None:
  """Or a comparison would not know its finished runs again."""
  paper = entries.plan(_comparison(c.Entry("paper", {"algorithm": "worldlm_paper"})))[2].config
  assert (paper.inner_text, paper.key_layers.similarity) == ("before", "scaled_dot")
  assert algorithms.adapted(paper) == paper


def test_fewer_rounds_of_more_steps_are_as_fair() -> None:
  halves = {"rounds": 12, "node.batch_size": 2}
  free = {"model.key_layer_share": 0.5, "optimizer.b1": 0, "evaluation.acceptance_windows": 2}
  entries.plan(_comparison(c.Entry("halves", halves), c.Entry("free", free)))
  message = _message(_comparison(c.Entry("halves", halves | {"node.batch_size": 4})))
  assert message == (
    "entry 'halves': windows that node 'code' trains on=960: expected 480, as in entry 'worldlm'; all its optimizer "
    "steps x batch_size are 240 x 4 here and 120 x 4 there: change the overrides of rounds, node.local_steps or "
    "node.batch_size"
  )
  # law has steps of its own, so that those of the root do not reach it.
  message = _message(_comparison(c.Entry("longer", {"rounds": 3, "node.local_steps": 40})))
  assert message.startswith("entry 'longer': windows that node 'law' trains on=360: expected 720, as in")


def test_repeats_within_a_round_count() -> None:
  base = _base()
  base.federation.root = c.Node("world", None, [c.Node("law", None, [c.Node("eu", c.Files("unread"))])])
  assert entries.windows_per_node(base) == {"law/eu": (120, 4)}
  base.federation.overrides = {"law": {"rounds_per_parent_round": 2}}
  assert entries.windows_per_node(base) == {"law/eu": (240, 4)}
  base.schedule = "sequential"
  assert entries.windows_per_node(base) == {"law/eu": (240, 4)}


@pytest.mark.parametrize(("overrides", "message"), [
  ({"local_steps": 3}, "entry 'x': override='local_steps': expected the dotted name of a field of Config, such as "
   "'node.local_steps'; did you mean 'node.local_steps'?"),
  ({"backbone.server_optimiser": "adam"}, "did you mean 'backbone.server_optimizer'?"),
  ({"backbone": c.BackboneConfig()}, "entry 'x': override='backbone': expected the dotted name of a field"),
  ({"rounds.x": 3}, "entry 'x': override='rounds.x': expected the dotted name"),
  ({3: 3}, "entry 'x': override=3: expected the dotted name"),
  ({"node.learning_rate": "fast"}, "entry 'x': config.node.learning_rate='fast': expected a number"),
  ({"node.learning_rate": -1.0}, "entry 'x': node '.': learning_rate=-1.0: expected a positive number"),
  ({"backbone.server_optimizer": "nestrov"}, "entry 'x': config.backbone.server_optimizer='nestrov': expected one of"),
  ({"seed": 3}, "entry 'x': override seed=3: expected none of what all entries share (seed, federation, data, model, "
   "evaluation, node.max_train_bytes); seeds are set in config.seeds"),
  ({"data.sequence_length": 64}, "set --config.base.data.sequence_length for all of them"),
  ({"federation.folder": "elsewhere"}, "entry 'x': override federation.folder='elsewhere': expected none of"),
  ({"model.d_model": 48}, "entry 'x': override model.d_model=48: expected none of"),
  ({"evaluation.test_windows": 3}, "entry 'x': override evaluation.test_windows=3: expected none of"),
  ({"node.max_train_bytes": 3}, "entry 'x': override node.max_train_bytes=3: expected none of"),
  ([("rounds", 3)], "entry 'x': overrides=[('rounds', 3)]: expected a dict"),
])
def test_a_wrong_override_is_named_with_its_entry(overrides: Any, message: str) -> None:
  assert message in _message(_comparison(c.Entry("x", overrides)))


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "naïve", "x" * 65, 3])
def test_a_name_must_do_for_a_folder(name: Any) -> None:
  assert _message(_comparison(c.Entry(name))).startswith(f"config.entries[2].name={name!r}: expected up to 64 letters")


def test_names_are_unique_whatever_the_case() -> None:
  assert "config.entries[2].name='Local': expected a name that no other" in _message(_comparison(c.Entry("Local")))


@pytest.mark.parametrize(("fields", "message"), [
  ({"seeds": ()}, "config.seeds=(): expected different whole numbers, at least one; such as --config.seeds=0,1,2"),
  ({"seeds": (1, 1)}, "config.seeds=(1, 1): expected different"),
  ({"seeds": (0.5,)}, "config.seeds=(0.5,): expected different"),
  ({"seeds": [0, 1]}, "config.seeds=[0, 1]: expected different"),
  ({"seeds": (True,)}, "config.seeds=(True,): expected different"),
  ({"own": "wordlm"}, "config.own='wordlm': expected one of 'worldlm', 'local'; did you mean 'worldlm'?"),
  ({"alone": "locl"}, "config.alone='locl': expected the entry that trains alone, one of 'worldlm', 'local', or '' "
   "for none; did you mean 'local'?"),
])
def test_seeds_and_the_two_names_are_checked(fields: dict[str, Any], message: str) -> None:
  assert _message(_comparison(**fields)).startswith(message)


@pytest.mark.parametrize("listed", [[], None, [c.Config()]])
def test_a_list_of_entries_is_needed(listed: Any) -> None:
  assert "expected a list with at least one Entry" in _message(c.Comparison(_base(), listed))
  assert _message(c.Comparison(None, [c.Entry("worldlm")])).startswith("config.base=None: expected a Config")


def test_nobody_need_be_alone() -> None:
  entries.plan(_comparison(alone=""))


def test_a_wrong_base_is_named() -> None:
  comparison = _comparison()
  comparison.base.rounds = 0
  assert _message(comparison) == "entry 'worldlm': config.rounds=0: expected at least 1"


def test_some_entries_may_be_chosen() -> None:
  assert entries.chosen(_comparison(), []) == {"worldlm", "local"}
  assert entries.chosen(_comparison(), ["local"]) == {"local"}
  with pytest.raises(checks.InputError, match=r"--only='locl': expected one of .*; did you mean 'local'"):
    entries.chosen(_comparison(), ["locl"])
