"""The compressor that scores are compared with: what it counts, what it has seen, and that it runs once."""

import json
import lzma
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldlm_jax import config
from worldlm_jax.data import cache, compression, documents, tokenizer

BYTES = tokenizer.ByteTokenizer()


def _source(folder: Path, **splits: str) -> config.Files:
  folder.mkdir(parents=True, exist_ok=True)
  for name in documents.SPLITS:
    (folder / f"{name}.txt").write_text(splits.get(name, "x"), encoding="utf-8")
  return config.Files(str(folder))


def _noise(seed: int, size: int) -> str:
  """One document of 6 bits per byte, which a compressor gets close to and no lower."""
  alphabet = [chr(code) for code in range(48, 112)]
  return "".join(random.Random(seed).choices(alphabet, k=size))


def _load(tmp_path: Path, nodes: dict[str, config.Files], spec: Any = BYTES) -> dict[str, cache.Text]:
  data = config.DataConfig(cache=str(tmp_path / "cache"))
  return cache.load(list(nodes.items()), data, spec, lambda line: None)


def _references(texts: dict[str, cache.Text], spec: Any = BYTES) -> tuple[dict[str, float], list[str]]:
  told: list[str] = []
  return compression.references(texts, spec, told.append), told


def test_noise_takes_what_it_holds_and_what_was_seen_before_next_to_nothing(tmp_path: Path) -> None:
  seen, new = _noise(0, 30_000), _noise(1, 20_000)
  nodes = {
    "new": _source(tmp_path / "new", train=seen, test=new),
    "half": _source(tmp_path / "half", train=seen, test=f"{seen[:20_000]}\n\n{new}"),
  }
  found, _ = _references(_load(tmp_path, nodes))
  assert found["new"] == pytest.approx(6.1, abs=0.1)
  assert found["half"] == pytest.approx(3.1, abs=0.1)


def test_it_is_what_the_standard_library_makes_of_the_documents(tmp_path: Path) -> None:
  train = ["one é two", "three " * 9, "four"]
  test = ["five six", "three " * 5 + "ß"]
  texts = _load(tmp_path, {"n": _source(tmp_path / "n", train="\n\n".join(train), test="\n\n".join(test))})
  before, after = ("".join(f"\n{text.strip()}" for text in part).encode() for part in (train, test))

  def size(content: bytes) -> int:
    chain = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return len(lzma.compress(content, lzma.FORMAT_RAW, filters=chain))

  expected = 8 * (size(before + after) - size(before)) / (len(after) - 2)
  assert _references(texts)[0] == {"n": expected}
  assert texts["n"].splits["test"].counts.text_bytes == len(after) - 2  # separators are no text


def test_large_texts_are_sampled_all_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(compression, "TRAIN_BYTES", 3000)
  monkeypatch.setattr(compression, "TEST_BYTES", 2000)
  sizes: list[bytes] = []
  size = compression._size
  monkeypatch.setattr(compression, "_size", lambda content: sizes.append(content) or size(content))
  parts = [_noise(i, 100) for i in range(150)]
  one = _noise(999, 50_000)
  nodes = {"many": _source(tmp_path / "many", train="\n\n".join(parts[:110]), test="\n\n".join(parts[110:]))}
  found, _ = _references(_load(tmp_path, nodes))
  both, before = sorted(sizes, key=len, reverse=True)
  assert before.decode().split("\n")[1:] == parts[0:110:4]
  assert both.decode().split("\n")[29:] == parts[110::2]
  assert found["many"] == pytest.approx(8 * (size(both) - size(before)) / 2000)
  sizes.clear()
  _references(_load(tmp_path, {"one": _source(tmp_path / "one", train=one, test=one[::-1])}))
  assert sorted(map(len, sizes)) == [3001, 5002]


def test_it_runs_once_for_each_text(tmp_path: Path) -> None:
  a, b = (_source(tmp_path / name, train="x" * 99, test=f"{name} test") for name in ("a", "longer"))
  first, told = _references(_load(tmp_path, {"x": a, "y": a, "z": b}))
  assert told == ["compressing a sample of 2 text(s), to compare with"]
  assert first["x"] == first["y"] != first["z"]
  assert _references(_load(tmp_path, {"z": b, "x": a})) == ({"z": first["z"], "x": first["x"]}, [])
  texts = _load(tmp_path, {"x": a})
  record = texts["x"].place / "compressor.json"
  for harm in ("{", "[]", '{"version": 0, "bits_per_byte": 1.0}'):
    record.write_text(harm)
    assert _references(texts)[0] == {"x": first["x"]}
    assert json.loads(record.read_text())["bits_per_byte"] == first["x"]


def test_a_text_of_an_older_cache_is_not_made_again(tmp_path: Path) -> None:
  a = _source(tmp_path / "a", train="train " * 99)
  before = _load(tmp_path, {"a": a})["a"]
  stamp = (before.place / "meta.json").stat().st_mtime_ns
  _references({"a": before})
  after = _load(tmp_path, {"a": a})["a"]
  assert (after.digest, (after.place / "meta.json").stat().st_mtime_ns) == (before.digest, stamp)


def test_a_tokenizer_that_loses_text_gets_no_reference(tmp_path: Path) -> None:
  class Lossy(tokenizer.ByteTokenizer):
    name = "lossy"

    def decode(self, ids: Any) -> str:
      return super().decode(ids).upper()

  texts = _load(tmp_path, {"a": _source(tmp_path / "a", train="lower case")}, Lossy())
  assert _references(texts, Lossy()) == ({}, [])


def test_tokens_are_turned_back_into_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  class Pairs(tokenizer.ByteTokenizer):
    """Two bytes per token, so that tokens and bytes differ."""

    name, vocab_size, separator_id = "pairs", 65537, 65536

    def pack(self, texts: Any) -> Any:
      encoded = [text.encode() + b" " * (len(text.encode()) % 2) for text in texts]
      ids = [np.append(np.uint32(self.separator_id), np.frombuffer(part, "<u2")) for part in encoded]
      return np.concatenate(ids).astype(np.uint32), np.cumsum([0, *map(len, ids)])[:-1]

    def encode(self, text: str) -> np.ndarray:
      return self.pack([text])[0][1:].astype(np.int32)

    def decode(self, ids: Any) -> str:
      return np.array([i for i in ids if i < 65536], "<u2").tobytes().decode()

  nodes = {"a": _source(tmp_path / "a", train="even" * 99, test="more, evenly")}
  pairs, plain = _load(tmp_path, nodes, Pairs()), _load(tmp_path, nodes)
  assert _references(pairs, Pairs()) == _references(plain)
  monkeypatch.setattr(compression, "TEST_BYTES", 5)  # bytes, not tokens
  monkeypatch.setattr(compression, "VERSION", 2)
  assert _references(pairs, Pairs()) == _references(plain)
