"""The cache of tokenised texts: made once, safely, in the same way whoever else is there."""

import itertools
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from worldlm_jax import config
from worldlm_jax.data import batches, cache, documents, duplicates, sources, tokenizer

BYTES = tokenizer.ByteTokenizer()


def _folder(path: Path, count: int = 199, name: str = "a") -> config.Files:
  path.mkdir(parents=True, exist_ok=True)
  (path / "all.txt").write_text("\n\n".join(f"document {i} of {name}" for i in range(count)), encoding="utf-8")
  return config.Files(str(path))


@pytest.fixture
def data(tmp_path: Path) -> config.DataConfig:
  return config.DataConfig(cache=str(tmp_path / "cache"))


def _load(source: config.Source, data: config.DataConfig, spec: Any = BYTES, limit: int = 0) -> cache.Text:
  return cache.load([("node", source)], data, spec, lambda line: None, {"node": limit})["node"]


def _texts(split: cache.Split) -> list[str]:
  ends = [*split.starts[1:].tolist(), len(split.tokens)]
  return [BYTES.decode(split.tokens[int(a) + 1 : b]) for a, b in zip(split.starts, ends, strict=True)]


def _content(text: cache.Text) -> dict[str, list[str]]:
  return {name: _texts(split) for name, split in text.splits.items()}


def _made(data: config.DataConfig) -> list[str]:
  """The finished texts in the cache; nothing else may look like one."""
  entries = [entry for entry in Path(data.cache).iterdir() if entry.suffix != ".lock"]
  assert all((entry / "meta.json").exists() for entry in entries), entries
  return sorted(entry.name for entry in entries)


def test_every_document_is_in_one_split_with_its_counts(tmp_path: Path, data: config.DataConfig) -> None:
  text = _load(_folder(tmp_path / "texts"), data)
  content = _content(text)
  assert sorted(itertools.chain(*content.values())) == sorted(f"document {i} of a" for i in range(199))
  for name, split in text.splits.items():
    encoded = [document.encode() for document in content[name]]
    size = sum(map(len, encoded))
    assert split.counts == (len(encoded), size, size + len(encoded), 0, 0)
    assert split.hashes.tolist() == sorted(map(documents.digest, encoded))
  assert len(content["train"]) > 8 * len(content["test"]) > 0


def test_a_document_has_the_same_split_at_every_node(tmp_path: Path, data: config.DataConfig) -> None:
  small, large = (_content(_load(_folder(tmp_path / str(n), n), data)) for n in (150, 400))
  for name in documents.SPLITS:
    assert set(small[name]) == set(large[name]) & {f"document {i} of a" for i in range(150)}


@hypothesis.given(st.sets(st.integers(0, 2**64 - 1), min_size=1, max_size=9))
def test_split_bounds_cut_by_rank_of_the_digest(digests: set[int]) -> None:
  order = [documents.SplitBounds().split_of(digest) for digest in sorted(digests)]
  assert order == sorted(order, key=documents.SPLITS.index)


@pytest.mark.parametrize("count", [3, 4, 7, 20])
def test_small_texts_have_a_document_in_each_split(tmp_path: Path, data: config.DataConfig, count: int) -> None:
  for name in "abcdefg":
    content = _content(_load(_folder(tmp_path / f"{name}{count}", count, name), data))
    assert all(content.values())
    assert sum(map(len, content.values())) == count
    order = [documents.digest(text.encode()) for part in content.values() for text in part]
    assert max(order[: len(content["train"])]) < min(order[len(content["train"]) :])


def test_too_few_documents_are_refused(tmp_path: Path, data: config.DataConfig) -> None:
  (tmp_path / "two.txt").write_text("same\n\nsame\n\nother")
  with pytest.raises(ValueError, match=r"^node: data='.*two.txt': expected at least 3 distinct documents to .*; give"):
    _load(config.Files(str(tmp_path / "two.txt")), data)
  assert _made(data) == []


def test_a_blank_split_of_the_source_is_refused(tmp_path: Path, data: config.DataConfig) -> None:
  for name, text in (("train", "a"), ("valid", " \n\n "), ("test", "b")):
    (tmp_path / f"{name}.txt").write_text(text)
  with pytest.raises(ValueError, match=r"^node: data='.*': expected at least one document that is not empty in the"):
    _load(config.Files(str(tmp_path)), data)


def test_a_leaf_that_gets_too_little_says_what_to_change(tmp_path: Path, data: config.DataConfig) -> None:
  remedy = "too little of the text falls to this leaf: set larger partition"
  for count, leaf, expected in ((2, 0, "distinct documents"), (1, 1, "at least one document")):
    leaves = (config.Share({"a": _folder(tmp_path / "a", count)}, (i,), (9,), (1e-6,)) for i in range(9))
    messages = []
    for source in leaves:
      with pytest.raises(ValueError, match=f"^node: data=.*; {remedy}") as caught:
        _load(source, data)
      messages.append(str(caught.value))
    assert any(expected in message for message in messages), leaf


def test_empty_documents_are_left_out_and_counted(tmp_path: Path, data: config.DataConfig) -> None:
  rows = [{"text": text} for text in ["", "  \n", *map(str, range(99))]]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  text = _load(config.Files(str(tmp_path / "a.jsonl")), data)
  assert sum(split.counts.documents for split in text.splits.values()) == 99
  assert text.splits["train"].counts.empty == 2


def test_replaced_bytes_are_counted(tmp_path: Path, data: config.DataConfig) -> None:
  for name in documents.SPLITS:
    (tmp_path / f"{name}.txt").write_bytes(b"caf\xe9 au lait\n\nplain\n\n\xff\xfe" if name == "train" else b"plain")
  with pytest.raises(ValueError, match=r"^node: .*train.txt.*invalid_utf8=replace"):
    _load(config.Files(str(tmp_path)), data)
  data.invalid_utf8 = "replace"
  text = _load(config.Files(str(tmp_path)), data)
  assert text.splits["train"].counts.replaced == 3
  assert _content(text)["train"][0] == "caf\ufffd au lait"


def test_a_text_is_tokenised_once(tmp_path: Path, data: config.DataConfig) -> None:
  told: list[str] = []
  source = _folder(tmp_path / "texts")
  for _ in range(2):
    cache.load([("law/eu", source)], data, BYTES, told.append)
  assert told == ["tokenising law/eu"]
  # The same content elsewhere is the same text, and a node that has it too needs none of its own.
  cache.load([("a", _folder(tmp_path / "copy")), ("b", source)], data, BYTES, told.append)
  assert len(told) == 1 and len(_made(data)) == 1


def test_the_key_follows_content_tokenizer_and_choices(tmp_path: Path, data: config.DataConfig) -> None:
  class Other(tokenizer.ByteTokenizer):
    name = "other"

  a, b = _folder(tmp_path / "a"), _folder(tmp_path / "b", name="b")
  _load(a, data)
  _load(a, data, Other())
  _load(config.Swapped(a, b, 0.5), data)
  _load(config.Swapped(a, b, 0.25), data)
  _load(config.Swapped(a, b, 0.5, seed=1), data)
  _load(a, data, limit=100)
  assert len(_made(data)) == 6
  _folder(tmp_path / "a", 200)
  _load(a, data)
  assert len(_made(data)) == 7


def test_nodes_that_share_a_base_read_it_once_and_get_what_they_would_alone(
  tmp_path: Path, data: config.DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  a, b = _folder(tmp_path / "a"), _folder(tmp_path / "b", name="b")
  nodes = [(f"leaf{i}", config.Share({"a": a, "b": b}, (i,), (3,), (2.0,))) for i in range(3)]
  alone = {path: _content(_load(source, data)) for path, source in nodes}
  reads, opens = [], []
  opened = sources.open_base

  def counting(base: sources.Base, policy: str) -> documents.Corpus:
    corpus = opened(base, policy)
    opens.append(base)
    return corpus._replace(documents=lambda: reads.append(base) or corpus.documents())

  monkeypatch.setattr(sources, "open_base", counting)
  data.cache = str(tmp_path / "together")
  together = cache.load(nodes, data, BYTES, lambda line: None)
  assert {path: _content(text) for path, text in together.items()} == alone
  assert len(reads) == 2
  assert len(opens) == 4  # once before and once after, to see that it has not changed


@pytest.mark.parametrize("harm", ["truncate", "remove", "meta", "unlink meta"])
def test_a_damaged_text_is_made_again(tmp_path: Path, data: config.DataConfig, harm: str) -> None:
  source = _folder(tmp_path / "texts")
  before = _load(source, data)
  expected, digest = _content(before), before.digest
  place = Path(data.cache) / _made(data)[0]
  if harm == "truncate":
    os.truncate(place / "train.tokens", 100)
  elif harm == "remove":
    (place / "valid.hashes").unlink()
  elif harm == "meta":
    (place / "meta.json").write_text("{")
  else:
    (place / "meta.json").unlink()
  again = _load(source, data)
  assert _content(again) == expected and again.digest == digest


def test_what_an_interruption_leaves_is_gone(
  tmp_path: Path, data: config.DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  source = _folder(tmp_path / "texts", 5000)
  monkeypatch.setattr(cache, "BUFFER_CHARS", 1000)

  class Interrupting(tokenizer.ByteTokenizer):
    left = 20

    def pack(self, texts: Any) -> Any:
      Interrupting.left -= 1
      if Interrupting.left == 0:
        raise KeyboardInterrupt
      return super().pack(texts)

  with pytest.raises(KeyboardInterrupt):
    _load(source, data, Interrupting())
  assert _made(data) == []
  text = _load(source, data, Interrupting())
  assert sum(split.counts.documents for split in text.splits.values()) == 5000


def test_what_a_crash_leaves_is_never_taken_for_a_text(tmp_path: Path, data: config.DataConfig) -> None:
  source = _folder(tmp_path / "texts")
  expected = _content(_load(source, data))
  place = Path(data.cache) / _made(data)[0]
  place.rename(place.with_name(place.name + ".partial"))  # killed just before the last step, and half written
  (place.with_name(place.name + ".partial") / "train.0.tokens").write_bytes(b"half")
  assert _content(_load(source, data)) == expected
  assert _made(data) == [place.name]


def test_a_text_that_changes_while_it_is_read_is_refused(
  tmp_path: Path, data: config.DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  source = _folder(tmp_path / "texts")
  opened = sources.open_base

  def changing(base: sources.Base, policy: str) -> documents.Corpus:
    corpus = opened(base, policy)
    _folder(tmp_path / "texts", name="b")
    return corpus

  monkeypatch.setattr(sources, "open_base", changing)
  with pytest.raises(ValueError, match=r"^node: data=.*a text that stays as it is while it is read, but it has"):
    _load(source, data)
  assert _made(data) == []


def test_a_limit_takes_a_sample_that_grows_with_it(tmp_path: Path, data: config.DataConfig) -> None:
  a, b = _folder(tmp_path / "a"), _folder(tmp_path / "b", name="b")
  found: list[set[str]] = []
  for limit in (300, 600, 1200):
    text = _load(config.Swapped(a, b, 0.5), data, limit=limit)
    found.append(set(_content(text)["train"]))
    assert limit - 20 < text.splits["train"].counts.text_bytes <= limit
  assert found[0] < found[1] < found[2]
  assert {text[-1] for text in found[2]} == {"a", "b"}  # of both, however they are read


def test_a_limit_takes_all_copies_of_a_document_or_none(tmp_path: Path, data: config.DataConfig) -> None:
  assert documents.digest(b"rare") < documents.digest(b"same")
  for name, text in (("train", "rare\n\n" * 9 + "same"), ("valid", "v"), ("test", "t")):
    (tmp_path / f"{name}.txt").write_text(text)
  for limit, expected in ((3, 1), (4, 1), (35, 1), (36, 9), (39, 9), (40, 10)):  # one at least, if need be cut
    train = _load(config.Files(str(tmp_path)), data, limit=limit).splits["train"]
    assert train.counts.documents == expected
    assert 0 < train.counts.text_bytes <= limit


def test_nodes_that_share_a_text_have_limits_of_their_own(tmp_path: Path, data: config.DataConfig) -> None:
  source = _folder(tmp_path / "texts")
  limits = {"none": 0, "much": 900, "little": 90}
  alone = {path: _load(source, data, limit=limit) for path, limit in limits.items()}
  data.cache = str(tmp_path / "together")
  together = cache.load([(path, source) for path in [*limits, "unsaid"]], data, BYTES, lambda line: None, limits)
  for path, text in together.items():
    assert text.digest == alone["none" if path == "unsaid" else path].digest
  assert len(_made(data)) == 3
  sizes = {path: text.splits["train"].counts.text_bytes for path, text in together.items()}
  assert 0 < sizes["little"] <= 90 < sizes["much"] <= 900 < sizes["none"] == sizes["unsaid"]
  assert len({str(_content(text)["test"]) for text in together.values()}) == 1


def test_the_order_of_a_text_does_not_depend_on_what_others_have(tmp_path: Path, data: config.DataConfig) -> None:
  def tagged(name: str, *extra: str) -> config.Tagged:
    rows = [{"text": f"{name} {i}", "tag": "n"} for i in range(99)] + [{"text": e, "tag": "other"} for e in extra]
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config.Tagged(config.Files(str(tmp_path / f"{name}.jsonl"), node_field="tag"), "n")

  digests = set()
  for count in range(5):  # each changes the hash of the first file, and with it what the two files' order could be
    first, second = tagged("g0", *map(str, range(count))), tagged("g1")
    digests.add(_load(config.Swapped(first, second, 0.5), data).digest)
  assert len(digests) == 1 and len(_made(data)) == 5


def test_more_nodes_than_files_may_be_open(tmp_path: Path) -> None:
  rows = [{"text": f"{tag} {i}", "tag": str(tag)} for i in range(5) for tag in range(150)]
  (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  script = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from worldlm_jax import config
from worldlm_jax.data import cache, tokenizer
base = config.Files({str(tmp_path / "all.jsonl")!r}, node_field="tag")
nodes = [(str(i), config.Tagged(base, str(i))) for i in range(150)]
data = config.DataConfig(cache={str(tmp_path / "cache")!r})
print(len(cache.load(nodes, data, tokenizer.ByteTokenizer(), lambda line: None)))
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
  assert done.stdout == "150\n", done.stderr


def test_a_failure_stops_what_is_made_beside_it(tmp_path: Path, data: config.DataConfig) -> None:
  bad, good = tmp_path / "bad", _folder(tmp_path / "good", 300_000)
  bad.mkdir()
  (bad / "all.txt").write_bytes(b"x\n\n" + b"one " * 400_000 + b"\n\n\xff")
  with pytest.raises(ValueError, match=r"^bad: .*UTF-8, but byte"):
    cache.load([("good", good), ("bad", config.Files(str(bad)))], data, BYTES, lambda line: None)
  assert _made(data) == []


@pytest.mark.parametrize("cache_folder", ["file", "/proc/none"])
def test_a_cache_that_cannot_be_is_refused(tmp_path: Path, data: config.DataConfig, cache_folder: str) -> None:
  (tmp_path / "file").write_text("")
  data.cache = str(tmp_path / cache_folder)
  with pytest.raises(ValueError, match=r"^config.data.cache='.*': expected a folder that can be written to \("):
    _load(_folder(tmp_path / "texts"), data)


_SCRIPT = """
import sys
from worldlm_jax import config
from worldlm_jax.data import cache, tokenizer
told = []
data = config.DataConfig(cache=sys.argv[2])
text = cache.load([("node", config.Files(sys.argv[1]))], data, tokenizer.ByteTokenizer(), told.append)["node"]
print(len(told), text.digest)
"""


def test_two_processes_at_once_make_it_once(tmp_path: Path, data: config.DataConfig) -> None:
  _folder(tmp_path / "texts", 200_000)
  command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "texts"), data.cache]
  running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
  outputs = [process.communicate(timeout=600)[0].split() for process in running]
  assert [process.returncode for process in running] == [0, 0]
  assert outputs[0][1] == outputs[1][1]
  assert len(_made(data)) == 1
  # The second reported that it would, at most; the lock made it wait and find the text there.
  assert {told for told, _ in outputs} <= {"0", "1"} and "1" in {told for told, _ in outputs}


def test_who_waits_for_the_lock_uses_what_was_made(tmp_path: Path, data: config.DataConfig) -> None:
  source = _folder(tmp_path / "texts")
  inside, go_on = threading.Event(), threading.Event()

  class Slow(tokenizer.ByteTokenizer):
    calls = 0

    def pack(self, texts: Any) -> Any:
      Slow.calls += 1
      inside.set()
      assert go_on.wait(60)
      return super().pack(texts)

  threads = [threading.Thread(target=_load, args=(source, data, Slow())) for _ in range(2)]
  for thread in threads:
    thread.start()
  assert inside.wait(60)
  go_on.set()
  for thread in threads:
    thread.join(60)
  assert Slow.calls == 3  # once for each split
  assert len(_made(data)) == 1


@pytest.mark.parametrize(("name", "lossless"), [("bytes", True), ("upper", False), ("spaces", True)])
def test_tokenizers_that_lose_text_are_found_out(
  tmp_path: Path, data: config.DataConfig, name: str, lossless: bool
) -> None:
  class Changing(tokenizer.ByteTokenizer):
    def decode(self, ids: Any) -> str:
      text = super().decode(ids)
      return {"bytes": text, "upper": text.upper(), "spaces": text.replace(" ", "  ")}[name]

  Changing.name = name
  source = _folder(tmp_path / "texts", 999)
  assert _load(source, data, Changing()).lossless is lossless
  assert _load(source, data, Changing()).lossless is lossless  # from the cache
  assert math.isnan(batches.load([("n", source)], data, Changing())["n"].bytes_per_token("test")) is not lossless


def test_large_vocabularies_take_four_bytes(tmp_path: Path, data: config.DataConfig) -> None:
  class Large(tokenizer.ByteTokenizer):
    name, vocab_size, separator_id = "large", 2**16 + 1, 2**16

    def pack(self, texts: Any) -> tuple[np.ndarray, np.ndarray]:
      tokens, starts = BYTES.pack(texts)
      tokens = tokens.astype(np.uint32)
      tokens[starts] = self.separator_id
      return tokens, starts

  text = _load(_folder(tmp_path / "texts"), data, Large())
  assert text.splits["train"].tokens.dtype == np.uint32
  assert text.splits["train"].tokens[0] == 2**16


def test_errors_name_the_node(tmp_path: Path, data: config.DataConfig) -> None:
  nodes = [("law", _folder(tmp_path / "texts")), ("law/eu", config.Files(str(tmp_path / "no")))]
  with pytest.raises(ValueError, match=r"^law/eu: Files.path=.*expected an existing"):
    cache.load(nodes, data, BYTES, lambda line: None)


def test_duplicates_across_nodes_and_splits_are_found(tmp_path: Path, data: config.DataConfig) -> None:
  def fixed(name: str, **splits: str) -> config.Files:
    (tmp_path / name).mkdir()
    for split, text in splits.items():
      (tmp_path / name / f"{split}.txt").write_text(text)
    return config.Files(str(tmp_path / name))

  nodes = [
    ("a", fixed("a", train="x\n\ny\n\nown", valid="x", test="p\n\nq\n\nr")),
    ("b", fixed("b", train="p\n\nq\n\nb", valid="z", test="r\n\nx")),
  ]
  texts = cache.load(nodes, data, BYTES, lambda line: None)
  found = set(duplicates.find(texts))
  assert found == {
    ("a", "valid", "a", "train", 1), ("b", "test", "a", "train", 1), ("a", "test", "b", "train", 2),
    ("a", "valid", "b", "test", 1), ("a", "test", "b", "test", 1),
  }
  lines = duplicates.warnings(duplicates.find(texts), most=2)
  assert lines == [
    "warning: 2 test document(s) of a are also in the training text of b",
    "warning: 1 valid document(s) of a are also in the training text of the same node",
    "warning: 1 more such pairs; see duplicates in summary.json",
  ]
  assert duplicates.warnings([]) == [] == duplicates.find({})


def test_splitting_by_hash_leaks_nothing_between_nodes(tmp_path: Path, data: config.DataConfig) -> None:
  nodes = [(name, _folder(tmp_path / name, count)) for name, count in (("a", 199), ("b", 300))]
  found = duplicates.find(cache.load(nodes, data, BYTES, lambda line: None))
  assert found and all(d.split == d.also_in_split for d in found)  # the same text twice, never trained and tested on
  assert duplicates.warnings(found) == []
