"""One node's model out of a work directory: the one that the engine scores, whatever happened to the folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from worldlm_jax import checks, released, trees, workdir
from worldlm_jax.data import tokenizer, tokenizer_files


def _assert_are_those_in_use(folder: Path, harness: Any) -> None:
  members = harness.federation.members
  found = {model.path: model for model in released.load_nodes(folder, [m.path for m in reversed(members)])}
  for number, level in enumerate(harness.federation.levels):
    num_rows = len(harness.state[number].weight)
    used = jax.device_get(harness.engine._used(harness.state, number, 0, num_rows))
    for row, member in enumerate(level):
      assert found[member.path].trust == float(harness.state[number].trust[row])
      for actual, expected in zip(
        jax.tree.leaves(found[member.path].params), jax.tree.leaves(trees.take(used, row)), strict=True
      ):
        assert isinstance(actual, np.ndarray) and actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=member.path)


def test_released_models_are_those_that_the_engine_scores(stored: tuple[Path, Any]) -> None:
  _assert_are_those_in_use(*stored)


@pytest.mark.parametrize("settings", [{"payload": "int8"}, {"algorithm": "fedavg"}, {"algorithm": "centralized"}],
                         ids=str)
def test_also_where_edges_round_and_where_the_tree_is_another(
  rounds: Any, tmp_path: Path, settings: dict[str, str]
) -> None:
  harness = rounds.write_run(tmp_path / "run", **settings)
  assert (harness.state[1].handed is not None) == ("payload" in settings)
  _assert_are_those_in_use(tmp_path / "run", harness)


def test_a_model_comes_with_what_is_known_of_it(stored: tuple[Path, Any]) -> None:
  folder, harness = stored
  found = released.load(folder, "b/p")
  assert found.arch == harness.arch and found.tokenizer.name == "bytes" and found.config.data == harness.config.data
  assert (found.round, found.step, found.tokens, found.is_final) == (2, 0, 14, False)
  assert found.run.tree.parents["b/p"] == "b"


def test_what_is_not_there_is_said(stored: tuple[Path, Any], tmp_path: Path) -> None:
  with pytest.raises(checks.InputError, match=r"--node='b/pp': expected the path of a node.*did you mean 'b/p'\?"):
    released.load(stored[0], "b/pp")
  with pytest.raises(checks.InputError, match=r"--workdir=.*a folder that holds a run"):
    released.load(tmp_path, ".")
  copy = tmp_path / "run"
  copy.mkdir()
  record = json.loads((stored[0] / "config.json").read_text())
  record["config"]["model"]["d_ff"] = 19
  (copy / "config.json").write_text(json.dumps(record))
  with pytest.raises(checks.InputError, match="it has saved none yet"):
    released.load(copy, ".")
  shutil.copytree(stored[0] / "checkpoints", copy / "checkpoints")
  with pytest.raises(checks.InputError, match=r"params.*'down'.*expected float32\[nodes, 1, 19, 12\]"):
    released.load(copy, ".")
  record["config"]["model"]["wings"] = 2
  (copy / "config.json").write_text(json.dumps(record))
  with pytest.raises(checks.InputError, match=r"model=\['wings'\]: expected fields of ModelConfig"):
    released.load(copy, ".")


def test_a_damaged_checkpoint_is_passed_over_and_left_alone(stored: tuple[Path, Any], tmp_path: Path) -> None:
  copy, said = tmp_path / "run", []
  shutil.copytree(stored[0], copy)
  max((copy / "checkpoints" / "20000").rglob("d/*"), key=lambda path: path.stat().st_size).unlink()
  (copy / "checkpoints" / "30000.orbax-checkpoint-tmp-0").mkdir()  # a run that is writing
  before = sorted(copy.rglob("*"))
  found = released.load(copy, "a", say=said.append)
  assert found.round == 1 and len(said) == 1 and "checkpoint 20000 is damaged" in said[0]
  assert sorted(copy.rglob("*")) == before
  shutil.rmtree(copy / "checkpoints" / "10000" / "state")
  with pytest.raises(checks.InputError, match="all of them are damaged"):
    released.load(copy, "a")


def test_a_tokenizer_that_went_with_the_run_is_found_there(stored: tuple[Path, Any], tmp_path: Path) -> None:
  copy, source = tmp_path / "run", tmp_path / "bytes"
  source.mkdir()
  tokenizer_files.write(source, tokenizer.ByteTokenizer(), 7)
  shutil.copytree(stored[0], copy)
  workdir.keep_tokenizer(copy, "bytes")
  assert not (copy / "tokenizer.json").exists()
  record = json.loads((copy / "config.json").read_text())
  record["config"]["data"] |= {"tokenizer": str(source)}
  (copy / "config.json").write_text(json.dumps(record))
  workdir.keep_tokenizer(copy, str(source))
  shutil.rmtree(source)
  found = released.load(copy, "a").tokenizer
  assert found.name.startswith("tokenizer.json@") and list(found.encode("ok")) == [*b"ok"]
  (copy / "tokenizer.json").unlink()
  with pytest.raises(checks.InputError, match=r"config.data.tokenizer=.*bytes"):
    released.load(copy, "a")
  assert released.load(copy, "a", tokenizer="bytes").tokenizer.name == "bytes"
