"""A run's models on given texts, as the run itself scores them, and the command as a person uses it."""

import io
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from rich.console import Console

from worldlm_jax import checkpoint, checks, config, engine, evaluate, ledger, text_scores, workdir
from worldlm_jax.data import evaluation, tokenizer as tokenizer_lib, windows

TEXTS = {"grain": "wheat rye oats\n\nbarley and maize and rye\n\n" * 9, "short": "rye, of which there is little"}


@pytest.fixture(scope="module")
def run(rounds: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
  """A work directory as a run leaves it, with arbitrary models, and the harness that has them."""
  folder = tmp_path_factory.mktemp("evaluate") / "run"
  settings = rounds.tiny_config(rounds.node("world", rounds.node("a"), rounds.node("b", rounds.node("c"), data=False)))
  settings.model.vocab_size = 257
  harness, draw = rounds.Harness(settings), np.random.default_rng(0)
  harness.state = tuple(level._replace(params=jax.tree.map(
    lambda leaf: jax.device_put(draw.normal(0, 0.3, leaf.shape).astype(np.float32), leaf.sharding), level.params
  )) for level in harness.state)
  workdir.claim(folder, workdir.describe(harness.config, harness.federation, {}), overwrite=False)
  checkpoints = checkpoint.Checkpoints(folder / "checkpoints", settings.checkpoint, harness.federation)
  checkpoints.save(10_000, harness.state, vars(ledger.Progress(1, 0, tokens={"a": 70})), None)
  checkpoints.wait()
  checkpoints.close()
  return folder, harness


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  """Paths by name."""
  folder = tmp_path_factory.mktemp("texts")
  for name, text in TEXTS.items():
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
  return {name: str(folder / f"{name}.txt") for name in TEXTS}


@pytest.fixture(scope="module")
def content(run: tuple[Path, Any], texts: dict[str, str]) -> dict[str, Any]:
  return evaluate.evaluate(run[0], ["b/c", "a", "b/c"], texts=list(texts.values()), tokens_at_once=64)


def test_a_text_is_scored_as_the_run_scores_its_own(
  run: tuple[Path, Any], texts: dict[str, str], content: dict[str, Any]
) -> None:
  _, harness = run
  level = harness.federation.levels[1]
  row = [member.path for member in level].index("a")
  read = text_scores.read(texts["grain"], tokenizer_lib.ByteTokenizer(), config.DataConfig(sequence_length=7))
  given = evaluation.Evaluation([read.windows if i == row else None for i in range(len(level))], 0, 8)
  mask = np.arange(len(level)) == row
  loss = engine.scores_by_row(harness.engine.score(harness.state, 1, given, mask), len(level))[row]
  found = content["nodes"]["a"]["texts"][texts["grain"]]
  assert found["windows"] == len(read.windows) and found["tokens"] == 7 * len(read.windows)
  assert found["loss_nats"] * found["tokens"] == pytest.approx(loss, rel=1e-5)
  assert found["perplexity"] == pytest.approx(math.exp(found["loss_nats"]))
  documents = TEXTS["grain"].strip().split("\n\n")
  size = sum(map(len, documents))
  assert found["bits_per_byte"] == pytest.approx(found["loss_nats"] / math.log(2) * (size + len(documents)) / size)


def test_nodes_come_in_order_with_what_is_known_of_them(content: dict[str, Any], texts: dict[str, str]) -> None:
  assert list(content["nodes"]) == ["b/c", "a"]
  known = content["nodes"]["a"]
  assert (known["round"], known["is_final"], known["tokens_trained_on"]) == (1, False, 70)
  assert list(known["texts"]) == list(texts.values())
  ours, theirs = (content["nodes"][path]["texts"][texts["grain"]]["loss_nats"] for path in ("a", "b/c"))
  assert ours != theirs


def test_standard_errors_are_those_of_the_windows() -> None:
  losses, targets = np.array([2.0, 3.0, 7.0, 4.0]), np.full(4, 5)
  assert text_scores._standard_error(losses, targets) == pytest.approx(np.std(losses / 5, ddof=1) / 2)
  assert text_scores._standard_error(losses[:1], targets[:1]) is None
  # Twice the text, twice the loss: the ratio is certain.
  assert text_scores._standard_error(np.array([2.0, 4.0]), np.array([5, 10])) == pytest.approx(0)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_a_file_becomes_windows_as_in_training(
  texts: dict[str, str], monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
  monkeypatch.setattr(text_scores, "DOCUMENTS_AT_ONCE", 4)  # of 18
  tokenizer, data = tokenizer_lib.ByteTokenizer(), config.DataConfig(sequence_length=7, packing=packing)
  read = text_scores.read(texts["grain"], tokenizer, data)
  tokens, starts = tokenizer.pack(TEXTS["grain"].strip().split("\n\n"))
  expected = windows.Windows(tokens, 7, starts if packing == "documents" else None)
  assert len(read.windows) == len(expected)
  assert all(np.array_equal(read.windows[i], expected[i]) for i in range(len(expected)))


def test_ancestors_follow_their_nodes(run: tuple[Path, Any]) -> None:
  assert evaluate.with_ancestors(run[0], ["b/c", "a"]) == ["b/c", "b", ".", "a"]


@pytest.mark.parametrize(("node", "given", "message"), [
  ("aa", {"texts": ["x"]}, r"--node='aa': expected the path of a node .*did you mean 'a'\?"),
  ("a", {}, "--tasks=.*: expected either tasks or --texts"),
  ("a", {"texts": ["x"], "tasks": ["y"]}, "--tasks=.*: expected either tasks or --texts"),
  ("a", {"texts": ["missing.txt"]}, "--texts: Files.path='missing.txt': expected an existing file"),
  ("a", {"texts": ["x"], "limit": -1}, "--limit=-1: expected at least 0"),
], ids=str)
def test_mistakes_are_found_before_anything_is_scored(
  run: tuple[Path, Any], node: str, given: dict[str, Any], message: str
) -> None:
  with pytest.raises(checks.InputError, match=message):
    evaluate.evaluate(run[0], [node], **given)


def test_less_text_than_a_window_is_bad_input(tmp_path: Path) -> None:
  (tmp_path / "tiny.txt").write_text("rye")
  with pytest.raises(checks.InputError, match=r"expected text of more than 7 tokens, .*, not 4"):
    text_scores.read(str(tmp_path / "tiny.txt"), tokenizer_lib.ByteTokenizer(), config.DataConfig(sequence_length=7))


def test_the_tables_show_scores_with_their_errors(content: dict[str, Any], texts: dict[str, str]) -> None:
  console = Console(width=160, record=True, file=io.StringIO())
  evaluate.show(content, console)
  shown = console.export_text()
  found = content["nodes"]["a"]["texts"][texts["short"]]
  assert f"{found['perplexity']:.3f}" in shown
  assert f"{found['loss_nats']:.4f} ± {found['standard_error_nats']:.4f}" in shown
  tasks = {"nodes": {"a": {"tasks": {"quiz": {"num_fewshot": 3, "documents": 8, "metrics": {
    "acc": {"value": 0.25, "standard_error": 0.1}, "f1": {"value": 0.5, "standard_error": None}
  }}}}}}
  console = Console(width=160, record=True, file=io.StringIO())
  evaluate.show(tasks, console)
  rows = [line.split() for line in console.export_text().splitlines()]
  assert ["a", "quiz", "acc", "0.2500", "±", "0.1000", "3", "8"] in rows
  assert ["a", "quiz", "f1", "0.5000", "3", "8"] in rows


def test_the_command_writes_what_it_shows(
  run: tuple[Path, Any], texts: dict[str, str], content: dict[str, Any], tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  values = flags.FlagValues()
  monkeypatch.setattr(flags, "FLAGS", values)
  monkeypatch.setattr(evaluate.compiled, "keep", lambda: None)
  for name in ("string", "list", "bool", "integer"):
    define = getattr(flags, f"DEFINE_{name}")
    monkeypatch.setattr(flags, f"DEFINE_{name}",
                        lambda *given, define=define, **named: define(*given, flag_values=values, **named))
  evaluate.define_flags()
  out = tmp_path / "new" / "scores.json"
  values(["evaluate", f"--workdir={run[0]}", "--node=b/c", "--nodes=a", f"--texts={','.join(texts.values())}",
          f"--out={out}", "--tokens_at_once=64"])
  assert evaluate.main([]) == 0
  assert json.loads(out.read_text()) == json.loads(json.dumps(content))
  assert "bits per byte" in capsys.readouterr().out
