"""Nodes that move: every place is in the tree, and a node's text, batches and settings go along."""

import re

import pytest

from worldlm_jax import config as c, federation as f


def resolved(*moves: c.Move, overrides: dict[str, dict[str, object]] | None = None) -> f.Federation:
  law = c.Node("law", c.Files("law"), [c.Node("eu", c.Files("eu"), settings={"local_steps": 7})], {"batch_size": 5})
  med = c.Node("med", None, [c.Node("trials", c.Files("trials"))])
  root = c.Node("world", None, [law, med, c.Node("one", c.Files("x"))])
  federation = c.FederationConfig(root=root, moves=list(moves), overrides=overrides or {})
  found = f.resolve(c.Config(federation=federation))
  assert len(root.children) == 3 and len(law.children) == 1  # what was given is as it was
  return found


def test_without_moves_everybody_is_where_it_was() -> None:
  assert all(m.identity == m.path and not m.moved_from for m in resolved().members)
  assert resolved().moves(1) == []


def test_a_leaf_takes_its_own_settings_along_and_inherits_the_rest_from_its_new_parent() -> None:
  tree = resolved(c.Move("law/eu", "med", 3), overrides={"law/eu": {"learning_rate": 0.5}, "med": {"warmup_steps": 9}})
  old, new = tree.by_path["law/eu"], tree.by_path["med/eu"]
  assert (new.identity, new.moved_from, new.moved_in, new.parent) == ("law/eu", "law/eu", 3, "med")
  assert (old.settings.leaves_round, new.settings.joins_round) == (3, 3)
  settings = new.settings
  assert (settings.local_steps, settings.learning_rate, settings.warmup_steps, settings.batch_size) == (7, 0.5, 9, 8)
  assert tree.moves(3) == [("law/eu", "med/eu")] and tree.deserted == {"law/eu"}


def test_all_below_goes_along_with_a_federation_and_its_text() -> None:
  tree = resolved(c.Move("law", "med", 2))
  assert set(tree.moves(2)) == {("law/", "med/law/"), ("law", "med/law"), ("law/eu", "med/law/eu")}
  assert tree.by_path["med/law"].parent == "med/law/" and tree.by_path["med/law/"].parent == "med"


def test_moves_follow_each_other() -> None:
  tree = resolved(c.Move("med/law/eu", ".", 4), c.Move("law", "med", 2))
  assert tree.by_path["eu"].identity == "law/eu" and tree.moves(4) == [("med/law/eu", "eu")]
  assert tree.by_path["med/law/eu"].settings.leaves_round == 4


def test_the_pool_of_centralised_training_has_each_text_once() -> None:
  assert sorted(f.pooled(resolved(c.Move("law/eu", "med", 3))).root.pools) == ["law", "law/eu", "med/trials", "one"]
  assert {"law/eu", "med/eu"} < f.flattened(resolved(c.Move("law/eu", "med", 3))).by_path.keys()


@pytest.mark.parametrize(("moves", "message"), [
  ([c.Move("law/us", "med", 1)], "node='law/us': expected one of "),
  ([c.Move("law", "sea", 1)], "to='sea': expected one of "),
  ([c.Move("law", "law/eu", 1)], "to='law/eu': expected a place outside of 'law'"),
  ([c.Move(".", "law", 1)], "to='law': expected a place outside of '.', which is not the root"),
  ([c.Move("law", "med", 0)], "round=0: expected a round of the root after the first"),
  ([c.Move("law/eu", "med", 1), c.Move("law/eu", ".", 2)], "node='law/eu': expected a place that is not left before"),
  ([c.Move("law/eu", "med", 1), c.Move("med/eu", "law", 2)], "to='law': expected a federation that never had"),
  (["law"], "moves[0]='law': expected a Move"),
])
def test_what_is_no_move_is_refused(moves: list[c.Move], message: str) -> None:
  with pytest.raises(ValueError, match=re.escape(message)):
    resolved(*moves)
