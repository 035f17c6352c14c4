"""The tokenizer command: whose text it learns from, what it writes, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from worldlm_jax import config as c, tokenizer
from worldlm_jax.data import tokenizer as tokenizers

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def world(tmp_path: Path) -> Path:
  """Two nodes with words of their own; each word stands in the training text alone."""
  for name, words in (("law", "statute plaintiff"), ("code/python", "lambda yield")):
    (tmp_path / name).mkdir(parents=True)
    for split, text in (("train", f"{words}\n\n" * 99), ("valid", f"{words} valid"), ("test", f"{words} testing")):
      (tmp_path / name / f"{split}.txt").write_text(text)
  return tmp_path


def _config(world: Path, **data: object) -> c.Config:
  return c.Config(federation=c.FederationConfig(folder=str(world)), data=c.DataConfig(**data))


def _vocabulary(path: Path) -> set[str]:
  return set(json.loads(path.read_text())["model"]["vocab"])


def test_it_learns_the_words_of_the_whole_federation(world: Path, tmp_path: Path) -> None:
  table = tokenizer.train(_config(world), tmp_path / "new" / "all.json", 400)
  assert {"statute", "lambda"} <= _vocabulary(tmp_path / "new" / "all.json")
  spec = tokenizers.load(str(tmp_path / "new" / "all.json"))
  for text in ("statute of lambda", "Größe 城市\n"):
    assert spec.decode(spec.encode(text)) == text  # every byte is in it
  assert table.keys() == {"law", "code/python"}
  assert table["law"] == len("statute plaintiff valid") / len(spec.encode("statute plaintiff valid")) > 2


def test_it_learns_from_one_federation_alone(world: Path, tmp_path: Path) -> None:
  table = tokenizer.train(_config(world), tmp_path / "law.json", 400, "law")
  vocabulary = _vocabulary(tmp_path / "law.json")
  assert "statute" in vocabulary and "lambda" not in vocabulary
  assert table["law"] > table["code/python"]
  tokenizer.train(_config(world), tmp_path / "code.json", 400, "code")
  assert "lambda" in _vocabulary(tmp_path / "code.json")


def test_it_never_sees_valid_and_test(world: Path, tmp_path: Path) -> None:
  for split in ("valid", "test"):
    (world / "law" / f"{split}.txt").write_text("zyzzyva " * 99)
  tokenizer.train(_config(world), tmp_path / "all.json", 600)
  assert not any("zyz" in token for token in _vocabulary(tmp_path / "all.json"))


def test_bytes_per_node_are_limited(world: Path, tmp_path: Path) -> None:
  (world / "law" / "train.txt").write_text("\n\n".join(f"alpha alpha {i:06}" for i in range(200)))
  tokenizer.train(_config(world), tmp_path / "few.json", 290, max_bytes_per_node=50)
  few = _vocabulary(tmp_path / "few.json")
  tokenizer.train(_config(world), tmp_path / "all.json", 290)
  assert "alpha" in few & _vocabulary(tmp_path / "all.json") and few != _vocabulary(tmp_path / "all.json")


def test_it_learns_from_what_the_nodes_train_on(world: Path, tmp_path: Path) -> None:
  (world / "law" / "train.txt").write_text("\n\n".join(f"statute {i:06}" for i in range(200)))
  config = _config(world)
  config.federation.overrides = {"law": {"max_train_bytes": 3}}  # not even a word
  tokenizer.train(config, tmp_path / "few.json", 290)
  assert "lambda" in _vocabulary(tmp_path / "few.json")
  assert "statute" not in _vocabulary(tmp_path / "few.json")


@pytest.mark.parametrize(("arguments", "message"), [
  ((256,), "--vocab_size=256: expected at least 257: every byte and a separator"),
  ((400, "lw"), r"--federation='lw': expected one of '.', 'code', 'law', 'code/python'; did you mean 'law'"),
  ((400, ".", -1), "--max_bytes_per_node=-1: expected at least 0"),
])
def test_bad_input_writes_nothing(world: Path, tmp_path: Path, arguments: tuple, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    tokenizer.train(_config(world), tmp_path / "no.json", *arguments)
  assert not (tmp_path / "no.json").exists()


@pytest.mark.slow
def test_the_command(world: Path, tmp_path: Path) -> None:
  out = tmp_path / "bpe.json"

  def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "worldlm_jax.tokenizer", "--config=configs/folder.py",
               f"--config.federation.folder={world}", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, env=os.environ)

  done = run(f"--out={out}", "--vocab_size=5000")
  assert (done.returncode, done.stderr) == (0, "")
  assert f"{out}: {tokenizers.load(str(out)).vocab_size} tokens; the text has no more" in done.stdout
  assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == ["law", "code/python"]
  refused = run(f"--out={tmp_path}")
  assert refused.returncode == 2 and refused.stderr.startswith(f"error: --out='{tmp_path}': expected a file")
  missing = run()
  assert missing.returncode != 0 and "--out" in missing.stderr
