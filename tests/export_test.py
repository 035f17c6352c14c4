"""Exported folders: transformers' own tokenizer gives our ids, and the card says what the records say."""

import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers

from worldlm_jax import checks, config as config_lib, export, model_card, partition, released, train
from worldlm_jax.data import tokenizer as tokenizer_lib, tokenizer_files
from worldlm_jax.model import llama
from worldlm_jax.reporting import words

pytestmark = pytest.mark.usefixtures("on_one_device")
PLAIN = ("h\u00e9llo w\u00f6rld\n\t\r\n \u65e5\u672c \U0001f389\x00", "", " <s>  two  spaces ", "[SEP]</s><|endoftext")


def _auto(folder: Path) -> Any:
  return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def test_bytes_have_the_same_ids_there(tmp_path: Path) -> None:
  ours = tokenizer_lib.ByteTokenizer()
  tokenizer_files.write(tmp_path, ours, 99)
  theirs = _auto(tmp_path)
  assert theirs.model_max_length == 99 and len(theirs) == ours.vocab_size
  assert theirs.bos_token_id == theirs.eos_token_id == ours.separator_id
  every = "".join(map(chr, [*range(0x300), *range(0x900, 0x1100, 7), 0xFFFD, 0x10FFFF]))
  for text in (*PLAIN, every):
    ids = theirs(text)["input_ids"]
    assert ids == list(ours.encode(text)) and theirs.decode(ids) == text
  # Spelt out, it is the separator there, unless they are told not to look for it; here it is text.
  spelt = "a<|endoftext|>b"
  assert theirs(spelt)["input_ids"] == [97, 256, 98]
  assert theirs(spelt, split_special_tokens=True)["input_ids"] == list(ours.encode(spelt))
  assert theirs.decode([97, 256, 98], skip_special_tokens=True) == ours.decode([97, 256, 98]) == "ab"
  draw = np.random.default_rng(0)
  for _ in range(300):  # bytes that are no UTF-8 become the same replacement characters
    ids = draw.choice([0x20, 0x41, 0x80, 0xBF, 0xC2, 0xE2, 0x82, 0xF0, 0x9F, 0xED, 0xA0, 0xF4, 0xFF], 7)
    assert theirs.decode(ids.tolist()) == ours.decode(ids)


def test_a_tokenizer_from_a_file_has_the_same_ids_there(tmp_path: Path) -> None:
  """Also one that would put tokens of its own before a text."""
  source = tokenizers.Tokenizer(tokenizers.models.BPE())
  source.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  source.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=290, special_tokens=["<s>", "</s>"], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  source.train_from_iterator(["the theory of these things", "there and then"], trainer)
  source.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
  source.save(str(tmp_path / "source.json"))
  ours = tokenizer_lib.load(str(tmp_path / "source.json"))
  tokenizer_files.write(tmp_path, ours, 99)
  theirs = _auto(tmp_path)
  assert theirs.eos_token == "</s>" and theirs.eos_token_id == ours.separator_id == 1
  for text in ("the other theory", "\u65e5 then"):
    assert theirs(text)["input_ids"] == list(ours.encode(text))
  again = tokenizer_lib.load(str(tmp_path))
  assert list(again.encode("these things")) == list(ours.encode("these things"))


def test_one_node_is_written_and_read_back(stored: tuple[Path, Any], tmp_path: Path) -> None:
  pytest.importorskip("transformers")
  out, said = tmp_path / "out", []
  assert export.export(stored[0], ["b/q"], out, max_shard_size="20KB", say=said.append) == [out]
  model = released.load(stored[0], "b/q")
  jax.tree.map(np.testing.assert_array_equal, llama.read(out, model.arch), model.params)
  config = json.loads((out / "config.json").read_text())
  assert (config["bos_token_id"], config["eos_token_id"], config["max_position_embeddings"]) == (256, 256, 7)
  assert said == [f"b/q: {out}"] and [*tmp_path.iterdir()] == [out]
  assert {path.name for path in out.iterdir()} >= {
    "README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"
  }
  card = (out / "README.md").read_text()
  assert "**The run was not finished**: this is the model after 2 rounds." in card
  assert f"lies {100 * model.trust:.0f} % of the way" in card
  assert "    - **b/q** (14 tokens trained on, has text)" in card.splitlines()


def test_all_nodes_have_folders_by_their_paths(stored: tuple[Path, Any], tmp_path: Path) -> None:
  folders = export.export(stored[0], [], tmp_path)
  assert folders == [tmp_path / name for name in ("root", "a", "b", "b/p", "b/q")]
  arch = stored[1].arch
  read = [llama.read(folder, arch)["backbone"]["embedding"] for folder in folders]
  assert not any(np.array_equal(one, other) for i, one in enumerate(read) for other in read[:i])
  with pytest.raises(checks.InputError, match=r"--out=.*a new or empty folder"):
    export.export(stored[0], ["a"], tmp_path)


def test_bad_input_writes_nothing(stored: tuple[Path, Any], tmp_path: Path) -> None:
  with pytest.raises(checks.InputError, match=r"--node='b/x'.*did you mean"):
    export.export(stored[0], ["b/x"], tmp_path / "out")
  with pytest.raises(checks.InputError, match=r"--max_shard_size='5 apples': expected a size such as 500MB"):
    export.export(stored[0], ["a"], tmp_path / "out", max_shard_size="5 apples")
  assert not [*tmp_path.iterdir()]


def _texts(folder: Path) -> Path:
  for name in ("a", "b"):
    (folder / name).mkdir(parents=True)
    draw = random.Random(name)
    for split, size in (("train", 200), ("valid", 60), ("test", 60)):
      words = " ".join(draw.choice(["lo", "re", "mi", name]) for _ in range(size))
      (folder / name / f"{split}.txt").write_text(words, encoding="utf-8")
  return folder


@pytest.mark.slow
def test_a_run_starts_from_a_model_and_its_own_can_be_exported(
  stored: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Nobody trains, so that what comes out is what went in; the sizes are the model's own, its tokenizer too."""
  monkeypatch.setattr(train, "_mesh", lambda *_: partition.make_mesh(jax.devices()[:1]))
  start = tmp_path / "start"
  export.export(stored[0], ["b/p"], start)
  config = config_lib.Config(
    algorithm="fedper", rounds=1, federation=config_lib.FederationConfig(folder=str(_texts(tmp_path / "texts"))),
    node=config_lib.NodeSettings(local_steps=0),
    model=config_lib.ModelConfig(init_from=str(start), key_layer_share=0.3),
    data=config_lib.DataConfig(sequence_length=7, tokenizer=str(start)),
    evaluation=config_lib.EvaluationConfig(valid_windows=2, test_windows=2, matrix_windows=2),
    logging=config_lib.LoggingConfig(tensorboard=False),
  )
  summary = train.run(config, tmp_path / "run")
  first = llama.read(start, stored[1].arch)
  for path in (".", "a"):
    found = released.load(tmp_path / "run", path)
    assert found.is_final and found.arch.num_key_layers == 1 and found.arch.d_model == 12
    export.export(tmp_path / "run", [path], tmp_path / path.replace(".", "root"))
    again = llama.read(tmp_path / path.replace(".", "root"), stored[1].arch)
    jax.tree.map(np.testing.assert_array_equal, again, first)
  card = model_card.make(released.load(tmp_path / "run", "a"))
  row = summary["matrix"]["perplexity"][summary["matrix"]["models"].index("a")]
  table = [f"| {name} | {words.perplexity(value)} |" for name, value in zip("ab", row, strict=True)]
  assert [line for line in card.splitlines() if line.startswith("| ")][1:] == table
  assert f"Training started from the parameters of `{start}`" in card
  config.model.vocab_size = 300
  with pytest.raises(checks.InputError, match=r"config.model.vocab_size=300: expected 257, as .*config.json has it"):
    train.run(config, tmp_path / "other")
