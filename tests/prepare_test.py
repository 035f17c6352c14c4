"""Preparing natural corpora: what lies where, resuming, limits, damage, and the command as a person uses it."""

import collections
import gzip
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import fsspec
import pyarrow as pa
import pytest
from array_record.python import array_record_module

from worldlm_jax import checks, config as c, metrics, prepare as p
from worldlm_jax.data import documents, files, natural, shards

REPOSITORY = Path(__file__).parent.parent
PILE, MC4 = natural.RECIPES["pile"], natural.RECIPES["mc4"]
PILE_INPUTS = ["test.jsonl.zst", "val.jsonl.zst", "train/00.jsonl.zst", "train/01.jsonl.zst", "train/02.jsonl.zst"]
PARTS = (".", "code/github", "legal/freelaw", "legal/uspto", "web/enron")  # those of The Pile that the tests have
Places = dict[tuple[str, str], list[str]]


def _compress(file: Path, rows: list[dict[str, Any]]) -> None:
  text = "".join(json.dumps(row) + "\n" for row in rows).encode()
  file.parent.mkdir(parents=True, exist_ok=True)
  if file.suffix == ".gz":
    file.write_bytes(gzip.compress(text, mtime=0))
  else:
    with pa.CompressedOutputStream(str(file), "zstd") as stream:
      stream.write(text)


@pytest.fixture
def pile(tmp_path: Path) -> tuple[str, Places]:
  """A small copy of The Pile, three documents of each of PARTS in each file, and what its nodes should hold."""
  expected: Places = collections.defaultdict(list)
  for name in PILE_INPUTS:
    split = {"te": "test", "va": "valid", "tr": "train"}[name[:2]]
    rows = []
    for i in range(3):
      for path in PARTS:
        tag = PILE.nodes[path]
        text = f"{tag}, document {i} of {name}: wächst\u2028und\n\nwächst\x00" + " weiter" * (7 * i + len(tag))
        rows.append({"text": text, "meta": {"pile_set_name": tag}})
        expected[path, split].append(text)
      rows.append({"text": "not cleared", "meta": {"pile_set_name": "OpenWebText2"}})
    _compress(tmp_path / "pile" / name, rows)
  return str(tmp_path / "pile"), dict(expected)


@pytest.fixture
def mc4(tmp_path: Path) -> tuple[str, dict[str, list[str]], dict[str, list[str]]]:
  """A small copy of mC4 in three languages, one of which is no node's: train and held-out texts by language."""
  train, held_out = collections.defaultdict(list), collections.defaultdict(list)
  for language, count in (("sw", 3), ("en", 2), ("zh-Latn", 1)):
    for number in range(count):
      texts = [f"{language} {number} {i}" for i in range(7)]
      train[language] += texts
      _compress(tmp_path / f"mc4/multilingual/c4-{language}.tfrecord-{number:05d}-of-{count:05d}.json.gz",
                [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://x.org"} for text in texts])
    held_out[language] = [f"{language} held out {i}" for i in range(40)]
    _compress(tmp_path / f"mc4/multilingual/c4-{language}-validation.tfrecord-00000-of-00001.json.gz",
              [{"text": text, "timestamp": "", "url": ""} for text in held_out[language]])
  return str(tmp_path / "mc4"), train, held_out


def _records(out: Path) -> Places:
  """The documents of each node and split, record by record, in the order of the files' names."""
  found: Places = collections.defaultdict(list)
  for file in sorted(out.rglob("*.array_record")):
    reader = array_record_module.ArrayRecordReader(str(file))
    place = file.parent.relative_to(out).as_posix(), file.name.split("-")[0]
    found[place] += [reader.read([i])[0].decode() for i in range(reader.num_records())]
    reader.close()
  return dict(found)


def _content(out: Path) -> dict[str, bytes]:
  """All files but the lock; the manifest's lines in a fixed order."""
  content = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
  content.pop(".prepare/lock")
  content[".prepare/manifest.jsonl"] = b"\n".join(sorted(content[".prepare/manifest.jsonl"].splitlines()))
  return content


def _done(out: Path) -> list[str]:
  """The input files that are complete."""
  return [row["input"] for row in metrics.read_jsonl(out / ".prepare/manifest.jsonl")[1:]]


def _opened(monkeypatch: pytest.MonkeyPatch, source: str) -> list[str]:
  """The input files that are opened from now on, by their names within the source."""
  opened: list[str] = []
  real = files.open_stream

  def open_stream(path: str) -> Any:
    opened.append(path.removeprefix(source + "/"))
    return real(path)

  monkeypatch.setattr(files, "open_stream", open_stream)
  return opened


def test_every_document_goes_to_its_node_and_split(
  pile: tuple[str, Places], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  source, expected = pile
  out = tmp_path / "out"
  closing = p.prepare("pile", str(out), source).splitlines()
  assert _records(out) == expected
  assert sorted(file.name for file in out.glob("*.array_record")) == [
    "test-00000.array_record", "train-00000.array_record", "train-00001.array_record", "train-00002.array_record",
    "valid-00000.array_record",
  ]
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(":")[0] for line in lines] == [f"input {i} of 5, {n}" for i, n in enumerate(PILE_INPUTS, 1)]
  assert lines[0].endswith(": 15 documents, 0.0 MB")
  assert closing[1].split() == [".", "9", "3", "3", "0.0"] and len(closing) == 1 + 17 + 3 + 2
  assert closing[18].startswith("without train documents, so not to be trained on: academic/arxiv, ")
  assert closing[-2] == "OpenWebText2: 15 documents belong to no node"
  assert closing[-1].startswith("5 of 5 input files are complete in ")


def test_the_manifest_says_what_was_made_of_each_input_file(pile: tuple[str, Places], tmp_path: Path) -> None:
  source, expected = pile
  out = tmp_path / "out"
  p.prepare("pile", str(out), source)
  header, *rows = metrics.read_jsonl(out / ".prepare/manifest.jsonl")
  assert header == {"corpus": "pile", "source": source, "max_bytes_per_node": 0, "nodes": PILE.nodes}
  assert [row["input"] for row in rows] == PILE_INPUTS
  row = rows[2]
  assert row["bytes"] == (Path(source) / "train/00.jsonl.zst").stat().st_size
  assert row["unknown"] == {"OpenWebText2": 3} and row["replaced"] == 0
  texts = expected["legal/freelaw", "train"][:3]
  assert row["shards"]["legal/freelaw/train-00000.array_record"] == {
    "node": "legal/freelaw", "split": "train", "documents": 3, "text_bytes": sum(len(t.encode()) for t in texts),
    "sha256": shards.sha256(out / "legal/freelaw/train-00000.array_record"),
  }


def test_the_files_are_a_source_of_documents(pile: tuple[str, Places], tmp_path: Path) -> None:
  source, expected = pile
  p.prepare("pile", str(tmp_path / "out"), source)
  for path in (".", "code/github"):
    corpus = files.open_files(c.Files(str(tmp_path / "out" / path)), "error")
    found = [(document.split, document.text) for document in corpus.documents()]
    assert found == [(split, text) for split in documents.SPLITS for text in expected[path, split]]


def test_mc4_takes_the_language_from_the_name_and_divides_what_is_held_out(
  mc4: tuple[str, dict[str, list[str]], dict[str, list[str]]], tmp_path: Path
) -> None:
  source, train, held_out = mc4
  out = tmp_path / "out"
  closing = p.prepare("mc4", str(out), source, nodes=[".", "bantu"])
  found = _records(out)
  assert {path for path, _ in found} == {".", "bantu/swahili"}
  for path, language in ((".", "en"), ("bantu/swahili", "sw")):
    assert found[path, "train"] == train[language]
    valid, test = found[path, "valid"], found[path, "test"]
    assert sorted(valid + test) == sorted(held_out[language]) and 10 < len(valid) < 30
    assert valid == [text for text in held_out[language] if documents.digest(text.encode()) < 2**63]
  assert "belong to no node" not in closing
  for split in documents.SPLITS:
    assert f"without {split} documents, so not to be trained on: bantu/shona, bantu/xhosa, bantu/zulu" in closing


def test_input_files_are_read_round_robin_after_what_is_held_out() -> None:
  names = [f"multilingual/c4-{language}{kind}.tfrecord-{number:05d}-of-00002.json.gz"
           for language in ("en", "bg-Latn", "sw", "iw") for kind in ("", "-validation") for number in (1, 0)]
  found = MC4.inputs([*names, "multilingual/readme.md"], ["semitic/hebrew", "bantu/swahili"])
  assert [(item.tag, item.split, item.number) for item in found] == [
    ("iw", natural.HELD_OUT, 0), ("sw", natural.HELD_OUT, 0), ("iw", natural.HELD_OUT, 1), ("sw", natural.HELD_OUT, 1),
    ("iw", "train", 0), ("sw", "train", 0), ("iw", "train", 1), ("sw", "train", 1),
  ]
  assert MC4.inputs([MC4.example], MC4.nodes) and PILE.inputs([PILE.example], PILE.nodes)


def test_recipes_name_each_source_once() -> None:
  for recipe in natural.RECIPES.values():
    assert len(set(recipe.nodes.values())) == len(recipe.nodes)
    assert list(recipe.select([])) == list(recipe.nodes)
  assert len(PILE.nodes) == 22 - 5 and set(PILE.select(["legal", "."])) == {
    ".", "legal/europarl", "legal/freelaw", "legal/uspto"
  }


def test_some_nodes_alone(pile: tuple[str, Places], tmp_path: Path) -> None:
  source, expected = pile
  closing = p.prepare("pile", str(tmp_path / "out"), source, nodes=["legal/uspto", "web"])
  assert _records(tmp_path / "out") == {
    place: texts for place, texts in expected.items() if place[0] in ("legal/uspto", "web/enron")
  }
  assert "OpenWebText2: 15 documents" in closing and "Github" not in closing


_KILLED = """
import os, pathlib, signal, sys
from worldlm_jax import metrics, prepare
from worldlm_jax.data import shards
module, name, count = {
  "writing": (shards, "sha256", 13), "moving": (pathlib.Path, "replace", 13), "noting": (metrics, "append_jsonl", 4),
}[sys.argv[1]]
real = getattr(module, name)
def patched(*arguments):
  global count
  count -= 1
  if count == 0:
    os.kill(os.getpid(), signal.SIGKILL)
  return real(*arguments)
setattr(module, name, patched)
prepare.prepare("pile", sys.argv[2], sys.argv[3], int(sys.argv[4]))
"""


@pytest.mark.parametrize(("place", "limit"), [("writing", 0), ("moving", 700), ("noting", 0)])
def test_a_killed_call_is_continued_to_the_same_bits(
  pile: tuple[str, Places], tmp_path: Path, place: str, limit: int
) -> None:
  source, _ = pile
  out, whole = tmp_path / "out", tmp_path / "whole"
  done = subprocess.run([sys.executable, "-c", _KILLED, place, str(out), source, str(limit)], cwd=REPOSITORY,
                        capture_output=True, timeout=600)
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert _done(out) == PILE_INPUTS[:2]
  with (out / ".prepare/manifest.jsonl").open("a") as file:
    file.write('{"input": "train/00.jso')  # cut short
  closing = p.prepare("pile", str(out), source, limit)
  assert closing.replace(str(out), str(whole)) == p.prepare("pile", str(whole), source, limit)
  assert _content(out) == _content(whole)


def test_interrupting_keeps_what_is_complete(
  pile: tuple[str, Places], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  source, expected = pile
  out = tmp_path / "out"
  real = files.read_jsonl

  def read_jsonl(stream: Any, origin: str, *arguments: Any) -> Any:
    for i, document in enumerate(real(stream, origin, *arguments)):
      if origin.endswith("01.jsonl.zst") and i == 10:
        raise KeyboardInterrupt
      yield document

  with monkeypatch.context() as patch, pytest.raises(p.Interrupted) as stop:
    patch.setattr(files, "read_jsonl", read_jsonl)
    p.prepare("pile", str(out), source)
  assert str(stop.value) == (
    f"interrupted: 3 of 5 input files are complete in {out}; run the same command again to go on"
  )
  assert not (out / ".prepare/unfinished").exists() and not list(out.rglob("*-00001.array_record"))
  p.prepare("pile", str(out), source)
  assert _records(out) == expected


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_file_is_made_again(
  pile: tuple[str, Places], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
  harm: str,
) -> None:
  source, _ = pile
  out = tmp_path / "out"
  closing = p.prepare("pile", str(out), source, 900)
  before = _content(out)
  shard = out / "code/github/train-00000.array_record"
  content = bytearray(shard.read_bytes())
  content[100] ^= 1
  {"flip": lambda: shard.write_bytes(content), "cut": lambda: os.truncate(shard, 100), "remove": shard.unlink}[harm]()
  opened = _opened(monkeypatch, source)
  capsys.readouterr()
  assert p.prepare("pile", str(out), source, 900) == closing
  assert opened == ["train/00.jsonl.zst"] and _content(out) == before
  printed = capsys.readouterr().out.splitlines()
  assert printed[0] == f"checking what was made of {len(_done(out))} input files"
  assert printed[1] == f"{shard} is missing or damaged: reading train/00.jsonl.zst again"


def test_a_limit_takes_documents_in_order_until_it_is_reached(pile: tuple[str, Places], tmp_path: Path) -> None:
  source, expected = pile
  limit = 500
  p.prepare("pile", str(tmp_path / "out"), source, limit)
  found = _records(tmp_path / "out")
  cut = 0
  for (path, split), texts in expected.items():
    taken: list[str] = []
    while sum(len(text.encode()) for text in taken) < (limit if split == "train" else limit // 20):
      taken.append(texts[len(taken)])
    assert found[path, split] == taken
    cut += len(taken) < len(texts)
  assert cut == len(expected)
  longest = max(len(text.encode()) for texts in expected.values() for text in texts)
  assert longest < limit  # so that the loop above went beyond the first


def test_what_nobody_needs_is_not_read(
  mc4: tuple[str, dict[str, list[str]], dict[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  source, train, _ = mc4
  last = Path(source) / "multilingual/c4-en.tfrecord-00001-of-00002.json.gz"
  last.write_bytes(last.read_bytes() + gzip.compress(b"behind the last document that is needed\n"))
  opened = _opened(monkeypatch, source)
  out = tmp_path / "out"
  p.prepare("mc4", str(out), source, 57, ["bantu/swahili", "."])
  assert [name.split("c4-")[1].split("-of")[0] for name in opened] == [
    "en-validation.tfrecord-00000", "sw-validation.tfrecord-00000", "en.tfrecord-00000", "sw.tfrecord-00000",
    "en.tfrecord-00001", "sw.tfrecord-00001",
  ]
  assert _records(out)["bantu/swahili", "train"] == train["sw"][:10]  # of six bytes each
  opened.clear()
  p.prepare("mc4", str(out), source, 57, ["bantu/swahili", "."])
  assert opened == []


def test_input_files_that_come_before_others_change_what_a_limit_takes_from_those(
  pile: tuple[str, Places], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  source, _ = pile
  hidden = tmp_path / "hidden"
  (Path(source) / "train/00.jsonl.zst").rename(hidden)
  out, whole = tmp_path / "out", tmp_path / "whole"
  p.prepare("pile", str(out), source, 900)
  hidden.rename(Path(source) / "train/00.jsonl.zst")
  p.prepare("pile", str(whole), source, 900)
  capsys.readouterr()
  p.prepare("pile", str(out), source, 900)
  assert _content(out) == _content(whole)
  assert "there are other input files before train/01.jsonl.zst now: reading it again" in capsys.readouterr().out


def test_input_files_may_go_once_they_are_read_but_not_change(pile: tuple[str, Places], tmp_path: Path) -> None:
  source, expected = pile
  out = tmp_path / "out"
  closing = p.prepare("pile", str(out), source)
  (Path(source) / "train/00.jsonl.zst").unlink()
  assert p.prepare("pile", str(out), source) == closing
  assert _records(out) == expected
  changed = Path(source) / "train/01.jsonl.zst"
  _compress(changed, [{"text": "new", "meta": {"pile_set_name": "ArXiv"}}])
  with pytest.raises(checks.InputError) as error:
    p.prepare("pile", str(out), source)
  assert str(error.value).startswith(f"{changed}: bytes={changed.stat().st_size}: expected ")
  assert _records(out) == expected


@pytest.mark.parametrize(("arguments", "difference"), [
  ({"max_bytes_per_node": 7}, "max_bytes_per_node: 0 there, 7 here"),
  ({"nodes": ["web"]}, 'nodes..: "Pile-CC" there, null here'),
  ({"corpus": "mc4"}, 'corpus: "pile" there, "mc4" here'),
])
def test_other_arguments_for_the_same_folder_are_refused(
  pile: tuple[str, Places], mc4: tuple[str, Any, Any], tmp_path: Path, arguments: dict[str, Any], difference: str
) -> None:
  out = tmp_path / "out"
  p.prepare("pile", str(out), pile[0])
  before = _content(out)
  source = mc4[0] if "corpus" in arguments else pile[0]
  with pytest.raises(checks.InputError) as error:
    p.prepare(**{"corpus": "pile", "out": str(out), "source": source} | arguments)
  assert str(error.value).startswith(f"--out={str(out)!r}: expected a new folder, or one prepared with the same ")
  assert difference in str(error.value)
  assert _content(out) == before


def test_folders_of_others_and_sources_of_something_else_are_refused(pile: tuple[str, Places], tmp_path: Path) -> None:
  mine = tmp_path / "mine"
  mine.mkdir()
  (mine / "thesis.tex").write_text("x")
  with pytest.raises(checks.InputError, match="expected a new or empty folder, or one that this command has prepared"):
    p.prepare("pile", str(mine), pile[0])
  with pytest.raises(checks.InputError, match=r"such as train/00.jsonl.zst"):
    p.prepare("pile", str(tmp_path / "out"), str(mine))
  with pytest.raises(checks.InputError, match=r"such as multilingual/c4-sw.tfrecord-00000-of-00032.json.gz"):
    p.prepare("mc4", str(tmp_path / "out2"), str(tmp_path / "missing"))
  with pytest.raises(checks.InputError, match="an address that fsspec can open; Protocol not known: nope"):
    p.prepare("mc4", str(tmp_path / "out3"), "nope://x")
  assert sorted(file.name for file in mine.iterdir()) == ["thesis.tex"]


def test_one_process_at_a_time(pile: tuple[str, Places], tmp_path: Path) -> None:
  out = tmp_path / "out"
  (out / ".prepare").mkdir(parents=True)
  with (
    filelock.FileLock(out / ".prepare/lock"),
    pytest.raises(checks.InputError, match="expected a folder that no other process is preparing; wait for it"),
  ):
    p.prepare("pile", str(out), pile[0])
  p.prepare("pile", str(out), pile[0])


def test_a_malformed_input_file_is_named_and_the_rest_is_kept(pile: tuple[str, Places], tmp_path: Path) -> None:
  source, expected = pile
  out = tmp_path / "out"
  bad = Path(source) / "train/01.jsonl.zst"
  good = bad.read_bytes()
  _compress(bad, [{"text": "fine", "meta": {"pile_set_name": "ArXiv"}}, {"text": "lost", "meta": {}}])
  with pytest.raises(checks.InputError, match=f"line 2 of {bad}"):
    p.prepare("pile", str(out), source)
  assert _done(out) == PILE_INPUTS[:3]
  bad.write_bytes(good)
  p.prepare("pile", str(out), source)
  assert _records(out) == expected


def test_what_is_no_text_is_replaced_and_counted(pile: tuple[str, Places], tmp_path: Path) -> None:
  source = tmp_path / "source"
  _compress(source / "train/00.jsonl.zst", [{"text": "a\ud800b\udfff", "meta": {"pile_set_name": "ArXiv"}}])
  closing = p.prepare("pile", str(tmp_path / "out"), str(source))
  assert _records(tmp_path / "out") == {("academic/arxiv", "train"): ["a\ufffdb\ufffd"]}
  assert "2 invalid byte sequences were replaced" in closing


@pytest.mark.parametrize("told", ["before", "when closing"])
def test_a_full_disk_stops_it_with_what_is_complete(
  pile: tuple[str, Places], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
  source, expected = pile
  out = tmp_path / "out"
  real = shutil.disk_usage

  class Full:
    """What the library does when the disk is full: all seems well until the file is closed."""

    def write(self, content: bytes) -> None:
      pass

    def is_open(self) -> bool:
      return True

    def close(self) -> None:
      raise RuntimeError("write() failed: No space left on device")

  def disk_usage(path: Any) -> Any:
    return real(path)._replace(free=int(len(_done(out)) < 3) << 30)

  with monkeypatch.context() as patch:
    if told == "before":
      patch.setattr(shards, "_DOCUMENTS_PER_LOOK", 2)
      patch.setattr(shutil, "disk_usage", disk_usage)
    else:
      library = array_record_module.ArrayRecordWriter
      patch.setattr(array_record_module, "ArrayRecordWriter", lambda path, options: Full() if "web/enron/train-00001" in
                    path else library(path, options))
    with pytest.raises(OSError, match=f"no space left for {out}: 3 of 5 input files are complete") as error:
      p.prepare("pile", str(out), source)
    assert metrics.out_of_space(error.value)
  assert not (out / ".prepare/unfinished").exists()
  p.prepare("pile", str(out), source)
  assert _records(out) == expected


def test_files_that_were_not_written_whole_are_noticed(
  pile: tuple[str, Places], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  library = array_record_module.ArrayRecordWriter

  class Forgetful:
    def __init__(self, *arguments: Any) -> None:
      self.writer = library(*arguments)
      self.is_open, self.close = self.writer.is_open, self.writer.close

    def write(self, content: bytes) -> None:
      if not content.startswith(b"Enron Emails, document 1"):
        self.writer.write(content)

  monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Forgetful)
  with pytest.raises(OSError, match="2 of 3 records were written"):
    p.prepare("pile", str(tmp_path / "out"), pile[0])
  assert _records(tmp_path / "out") == {}


@pytest.fixture
def remote(pile: tuple[str, Places], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Places, list[float]]:
  """The small Pile in a file system that is not the local one, and the waits of which it is free."""
  system = fsspec.filesystem("memory")
  for name in PILE_INPUTS:
    system.pipe(f"/small/pile/{name}", (Path(pile[0]) / name).read_bytes())
  waits: list[float] = []
  monkeypatch.setattr(p.time, "sleep", waits.append)
  return "memory://small/pile", pile[1], waits


def _failing(error: Exception, times: int) -> Callable[..., Any]:
  """A `files.read_jsonl` that fails in the middle of an input file, as often as that."""
  real, left = files.read_jsonl, [times]

  def items(stream: Any, origin: str, *arguments: Any) -> Any:
    for i, document in enumerate(real(stream, origin, *arguments)):
      if "train/00" in origin and i == 9 and left[0]:
        left[0] -= 1
        raise checks.InputError("reading fails") from error
      yield document

  return items


def test_a_remote_file_is_tried_again(
  remote: tuple[str, Places, list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  source, expected, waits = remote
  monkeypatch.setattr(files, "read_jsonl", _failing(ConnectionError("cut"), 3))
  p.prepare("pile", str(tmp_path / "out"), source)
  assert _records(tmp_path / "out") == expected
  assert waits == [5, 30, 120]
  assert "reading fails; trying again in 30 s" in capsys.readouterr().out


@pytest.mark.parametrize(("cause", "kind"), [(ConnectionError("cut"), OSError), (ValueError("odd"), checks.InputError)])
def test_a_remote_file_is_not_tried_for_ever_nor_in_vain(
  remote: tuple[str, Places, list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception,
  kind: type[Exception],
) -> None:
  source, expected, waits = remote
  out = tmp_path / "out"
  with monkeypatch.context() as patch, pytest.raises(kind, match="reading fails") as error:
    patch.setattr(files, "read_jsonl", _failing(cause, 4))
    p.prepare("pile", str(out), source)
  assert waits == ([5, 30, 120] if kind is OSError else [])
  if kind is OSError:
    assert "2 of 5 input files are complete" in str(error.value)
  p.prepare("pile", str(out), source)
  assert _records(out) == expected


def test_progress_says_how_far_it_is(
  pile: tuple[str, Places], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setattr(p, "SECONDS_BETWEEN_PLAIN_LINES", 0.0)
  p.prepare("pile", str(tmp_path / "out"), pile[0])
  lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("left")]
  assert lines[-1].startswith("input 5 of 5, train/02.jsonl.zst: 90 documents, 0.0 MB of text, ")
  assert lines[-1].endswith("MB/s, about 0:00:00 left")
  assert len(lines) == 5 * 18


def test_the_time_left_follows_speed_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
  now = [100.0]
  monkeypatch.setattr(p.time, "monotonic", lambda: now[0])
  pace = p._Pace()
  pace.begin()
  now[0] += 10
  pace.add(6_000_000)
  assert pace.words(4_000_000) == "1 documents, 6.0 MB of text, 0.6 MB/s, about 0:00:10 left"  # of 12 MB
  pace.end(1_000_000)
  now[0] += 3600  # other things, such as checking
  pace.begin()
  now[0] += 10
  pace.add(6_000_000)
  assert pace.words(4_000_000).endswith("0.6 MB/s, about 0:00:30 left")  # six bytes of text per byte by now


def _command(*arguments: str | Path) -> tuple[int, str, str]:
  done = subprocess.run([sys.executable, "-m", "worldlm_jax.prepare", *map(str, arguments)], cwd=REPOSITORY,
                        capture_output=True, text=True, timeout=600)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
  (["--corpus=pyle"], "error: --corpus='pyle': expected one of 'pile', 'mc4'; did you mean 'pile'?"),
  (["--corpus=mc4", "--max_bytes_per_nod=3"], "error: --max_bytes_per_nod is no flag of this command; did "
   "you mean --max_bytes_per_node?"),
  (["--corpus=mc4", "--nodes=.,romance/frensh"], "did you mean 'romance/french'?"),
  (["--corpus=mc4", "--max_bytes_per_node=-3"], "-3 is not a non-negative integer"),
  ([], "error: --corpus is missing: Which corpus: pile or mc4."),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_mistakes_in_flags_are_bad_input(tmp_path: Path, arguments: list[str], message: str) -> None:
  code, _, errors = _command(f"--out={tmp_path / 'out'}", *arguments)
  assert (code, len(errors.splitlines())) == (2, 1), errors
  assert errors.startswith("error: ") and message in errors
  assert not (tmp_path / "out").exists()


_WAITS = """
import signal, sys, time
from worldlm_jax import command, prepare
from worldlm_jax.data import files
real = files.read_jsonl
def read_jsonl(stream, origin, *arguments):
  yield from real(stream, origin, *arguments)
  if origin.endswith("val.jsonl.zst"):
    print("half-way", flush=True)
    for _ in range(6000):  # a signal just before a sleep does not end it
      time.sleep(0.1)
files.read_jsonl = read_jsonl
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
prepare.define_flags()
command.start(prepare.main, command.Flags("corpus", "out"))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_with_75(pile: tuple[str, Places], tmp_path: Path, number: signal.Signals) -> None:
  arguments = ["--corpus=pile", f"--out={tmp_path / 'out'}", f"--source={pile[0]}"]
  with subprocess.Popen([sys.executable, "-c", _WAITS, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE, text=True) as process:
    assert process.stdout and any("half-way" in line for line in process.stdout)
    process.send_signal(number)
    _, errors = process.communicate(timeout=600)
  assert process.returncode == 75
  assert errors == (
    f"interrupted: 1 of 5 input files are complete in {tmp_path / 'out'}; run the same command again to go on:\n"
    f"  {shlex.join([sys.executable, '-c', _WAITS, *arguments])}\n"
  )


def test_the_script_sets_up_and_prepares(pile: tuple[str, Places], tmp_path: Path) -> None:
  """In a repository whose interpreter is this one, and whose pip only notes what it is asked for."""
  repository = tmp_path / "repository"
  (repository / ".venv/bin").mkdir(parents=True)
  shutil.copytree(REPOSITORY / "launch", repository / "launch")
  for name in ("pyproject.toml", "requirements.lock"):
    shutil.copy(REPOSITORY / name, repository)
  (repository / "worldlm_jax").symlink_to(REPOSITORY / "worldlm_jax")
  python = repository / ".venv/bin/python"
  python.write_text(f'#!/bin/bash\nif [[ $2 == pip ]]; then echo "$@" >>pip.log; else exec {sys.executable} "$@"; fi\n')
  python.chmod(0o755)
  environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
  done = subprocess.run(
    ["bash", repository / "launch/prepare.sh", "--corpus=pile", "--out=data/pile", f"--source={pile[0]}",
     "--max_bytes_per_node=1_000_000"],
    capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment,
  )
  assert done.returncode == 0, done.stderr
  assert "-e .[data]" in (repository / "pip.log").read_text()
  assert done.stdout.splitlines()[-1].startswith("5 of 5 input files are complete in data/pile")
  header = metrics.read_jsonl(repository / "data/pile/.prepare/manifest.jsonl")[0]
  assert header["max_bytes_per_node"] == 1_000_000
