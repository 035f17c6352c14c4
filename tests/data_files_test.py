"""Laws of reading local files, and the messages of everything that can be wrong with them."""

import builtins
import gzip
import json
import os
import re
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module
from hypothesis import example, given, strategies as st

from worldlm_jax import checks, config
from worldlm_jax.data import files
from worldlm_jax.data.documents import Document


def write_lines(path: Path, *records: object) -> Path:
  """Writes JSON lines; a string is a line as it is, bytes too. The suffix says how they are packed."""
  lines = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
           for line in records]
  data = b"".join(line + b"\n" for line in lines)
  if path.suffix == ".gz":
    data = gzip.compress(data)
  elif path.suffix == ".zst":
    data = pa.compress(data, codec="zstd", asbytes=True)
  path.write_bytes(data)
  return path


def read(path: Path, invalid_utf8: str = "error", **fields: str) -> list[Document]:
  return list(files.open_files(config.Files(str(path), **fields), invalid_utf8).documents())


def texts(path: Path, invalid_utf8: str = "error", **fields: str) -> list[str]:
  return [document.text for document in read(path, invalid_utf8, **fields)]


# Folders and splits.


def test_files_named_for_splits_are_split_and_others_ignored(tmp_path):
  for name, text in (("test.txt", "e"), ("train-1.txt", "c"), ("train-0.txt", "a\nb\n\nx"), ("validation_x.txt", "d"),
                     ("notes.txt", "ignored"), ("trainer.txt", "ignored"), ("train", "ignored")):
    (tmp_path / name).write_text(text)
  assert [(d.split, d.text) for d in read(tmp_path)] == [
    ("train", "a\nb"), ("train", "x"), ("train", "c"), ("valid", "d"), ("test", "e")]


def test_splits_may_have_different_formats(tmp_path):
  write_lines(tmp_path / "train.jsonl", {"text": "a"})
  pq.write_table(pa.table({"text": ["b"]}), tmp_path / "valid.parquet")
  writer = array_record_module.ArrayRecordWriter(str(tmp_path / "test.array_record"), "group_size:1")
  writer.write(b"c")
  writer.close()
  assert [(d.split, d.text) for d in read(tmp_path)] == [("train", "a"), ("valid", "b"), ("test", "c")]


def test_other_files_of_a_folder_are_unsplit_and_in_order(tmp_path):
  (tmp_path / "below.txt").mkdir()
  (tmp_path / "below.txt" / "a.txt").write_text("not read")
  for name, text in (("b.txt", "4\n\n5"), ("a.txt", "1\n\n2"), (".hidden.txt", "not read"), ("a.md", "not read")):
    (tmp_path / name).write_text(text)
  write_lines(tmp_path / "a2.jsonl", {"text": "3"})
  assert read(tmp_path) == [Document(text) for text in "12345"]


def test_single_file_is_unsplit_whatever_its_name(tmp_path):
  (tmp_path / "train.txt").write_text("1\n\n2")
  (tmp_path / "other.txt").write_text("3")
  assert read(tmp_path / "train.txt") == [Document("1"), Document("2")]


def test_nothing_there(tmp_path):
  with pytest.raises(checks.InputError, match=r"Files.path='.*nowhere': expected an existing file .*correct the path"):
    read(tmp_path / "nowhere")
  with pytest.raises(checks.InputError, match=r"Files.path='': expected an existing file or folder"):
    files.open_files(config.Files(""), "error")
  with pytest.raises(checks.InputError, match=r"Files.path='~nobody-of-this-name': expected an existing file"):
    files.open_files(config.Files("~nobody-of-this-name"), "error")


def test_nothing_readable_names_the_formats(tmp_path):
  (tmp_path / "a.md").write_text("text")
  for path in (tmp_path, tmp_path / "a.md"):
    with pytest.raises(checks.InputError, match=r"holds files, of .txt, .jsonl, .*json.gz, .*array_record; put train"):
      read(path)


def test_missing_split(tmp_path):
  for name in ("train.txt", "test.txt", "notes.txt"):
    (tmp_path / name).write_text("a")
  with pytest.raises(checks.InputError, match="expected files for all of train, valid, test, but it lacks valid; add"):
    read(tmp_path)


def test_unreadable_file_is_named(tmp_path, monkeypatch):
  def refuse(path, *args, **kwargs):
    raise PermissionError(13, "Permission denied", str(path))

  (tmp_path / "a.txt").write_text("1")
  monkeypatch.setattr(builtins, "open", refuse)  # a test that runs as root can read everything
  with pytest.raises(checks.InputError, match=r"a.txt': expected .*Permission denied.*check its permissions") as caught:
    read(tmp_path)
  assert isinstance(caught.value.__cause__, PermissionError)


# Fingerprints.


def test_fingerprint_is_of_contents_roles_and_fields_alone(tmp_path):
  def fingerprint(folder: Path, **fields: str) -> str:
    return files.open_files(config.Files(str(folder), **fields), "error").fingerprint

  def changed(name: str, change: Callable[[Path], object]) -> str:
    folder = tmp_path / name
    shutil.copytree(tmp_path / "a", folder)
    change(folder)
    return fingerprint(folder)

  for name in ("train", "valid", "test"):
    (tmp_path / "a").mkdir(exist_ok=True)
    write_lines(tmp_path / "a" / f"{name}.jsonl", {"text": name, "body": name, "tag": "x"})
  same = {
    fingerprint(tmp_path / "a"),
    changed("moved", lambda folder: os.utime(folder / "train.jsonl", (1, 1))),
    changed("renamed", lambda folder: (folder / "train.jsonl").rename(folder / "train-0.jsonl")),
    changed("more", lambda folder: (folder / "notes.jsonl").write_text("not used")),
  }
  different = [
    changed("content", lambda folder: write_lines(folder / "test.jsonl", {"text": "other", "body": "test"})),
    changed("role", lambda folder: (folder / "test.jsonl").replace(folder / "train-2.jsonl") and write_lines(
      folder / "test.jsonl")),
    changed("unsplit", lambda folder: [(folder / f"{s}.jsonl").rename(folder / f"{i}.jsonl")
                                       for i, s in enumerate(("train", "valid", "test"))]),
    fingerprint(tmp_path / "a", text_field="body"),
    fingerprint(tmp_path / "a", node_field="tag"),
  ]
  assert len(same) == 1
  assert len({*same, *different}) == 1 + len(different)


def test_digest_depends_on_contents_in_their_order(tmp_path):
  paths = [tmp_path / name for name in "abc"]
  for path, data in zip(paths, (b"x", b"yz", b""), strict=True):
    path.write_bytes(data)
  digest = files.digest_files(paths)
  assert re.fullmatch("[0-9a-f]{64}", digest)
  assert files.digest_files(paths[::-1]) != digest
  paths[0].write_bytes(b"xy")  # the same bytes in all, divided otherwise
  paths[1].write_bytes(b"z")
  assert files.digest_files(paths) != digest
  with pytest.raises(checks.InputError, match=r"file='.*/none': expected a complete and readable file"):
    files.digest_files([tmp_path / "none"])


# Text.


@pytest.mark.parametrize("text", [
  "a\nb\n\nc\n", "a\r\nb\r\n\r\nc", "a\rb\r\rc", "\n\na\nb\n \t\n\n\nc\n\n", "  \na\nb\n\n   \n\nc\n   ",
  "\ufeffa\nb\n\nc",
])
def test_blank_lines_of_any_kind_separate_documents(tmp_path, text):
  (tmp_path / "a.txt").write_bytes(text.encode())
  assert texts(tmp_path) == ["a\nb", "c"]


def test_indentation_is_kept(tmp_path):
  (tmp_path / "a.txt").write_text("  def f():\n    pass\n\n  x = 1  ")
  assert texts(tmp_path) == ["  def f():\n    pass", "  x = 1  "]


def test_blank_text_has_no_documents(tmp_path):
  for text in ("", "\n", " \n\t\n", "\ufeff"):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert texts(tmp_path) == []


def whole_file_documents(data: bytes) -> list[str]:
  """The rule for documents of text, with the whole of it at once."""
  text = data.decode(errors="replace").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
  parts = re.split(r"\n(?:[^\S\n]*\n)+", f"\n{text}\n")
  return [part.strip("\n") for part in parts if part.strip()]


PIECES = ["a", "b", "\n", "\n\n", "\r\n", "\r", " ", "\t", "é", "語", "😀", "\ufffd", "\ufeff", "\u00a0", "\x85",
          "\x1c", b"\xff", b"\xe2\x82", b"\xf0\x9f", b"\xed\xa0\x80", b"\xef\xbb"]


@given(st.lists(st.sampled_from(PIECES), max_size=30), st.integers(1, 9))
@example(["a", "\r\n", "\r\n", "b"], 2)
@example(["a", "\n", " ", "\n", "b"], 1)
@example(["\ufeff", "a", b"\xff"], 1)
def test_documents_in_blocks_are_those_of_the_whole_file(tmp_path_factory, pieces, block_bytes):
  data = b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces)
  path = tmp_path_factory.getbasetemp() / "blocks.txt"
  path.write_bytes(data)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(files, "_BLOCK_BYTES", block_bytes)
    documents = read(path, "replace")
    assert [document.text for document in documents] == whole_file_documents(data)
    genuine = data.count("\ufffd".encode())
    assert sum(document.replaced for document in documents) == data.decode(errors="replace").count("\ufffd") - genuine
    if data.decode(errors="ignore").encode() == data:
      assert read(path, "error") == documents
    else:
      with pytest.raises(UnicodeDecodeError) as expected:
        data.decode()
      with pytest.raises(checks.InputError, match=f"UTF-8, but byte {expected.value.start} is not"):
        read(path, "error")


def test_invalid_utf8_in_text(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(b"0123\n\n4\xff5\xe2\x82\n\n" + "\ufffd".encode())
  with pytest.raises(checks.InputError, match=r"a.txt': expected UTF-8, but byte 7 is not; convert it, .*iconv, or set "
                     "config.data.invalid_utf8=replace") as caught:
    texts(path)
  assert isinstance(caught.value.__cause__, UnicodeDecodeError)
  assert read(path, "replace") == [Document("0123"), Document("4\ufffd5\ufffd", replaced=2), Document("\ufffd")]


def test_text_is_read_in_blocks(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes((b"word " * 400 + b"\n\n") * 10_000)  # 20 MB
  corpus = files.open_files(config.Files(str(path)), "error")
  tracemalloc.start()
  assert sum(1 for _ in corpus.documents()) == 10_000
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 10e6


def test_long_document_takes_time_in_proportion(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "_BLOCK_BYTES", 16)
  path = tmp_path / "a.txt"
  path.write_bytes(b"a line of it\n" * 80_000)  # 1 MB in 65,000 blocks: half a second, or 33 GB to search
  start = time.perf_counter()
  assert texts(path) == [("a line of it\n" * 80_000)[:-1]]
  assert time.perf_counter() - start < 15


# JSON lines.


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz"])
def test_json_lines_packed_or_not(tmp_path, suffix):
  records = [{"text": f"text {i}\n\n語", "meta": {"set": f"s{i % 2}"}, "n": i} for i in range(5)]
  path = write_lines(tmp_path / f"c4-fr.tfrecord-00000-of-02048{suffix}", *records)
  assert read(path, node_field="meta.set") == [Document(f"text {i}\n\n語", "", f"s{i % 2}") for i in range(5)]
  assert [document.tag for document in read(tmp_path, node_field="n")] == list("01234")


def test_stream_of_a_url_and_of_a_file():
  with fsspec.open("memory://c4/0.json.gz", "wb") as file:
    file.write(gzip.compress(b'{"text": "a"}\n{"text": "b"}'))
  with files.open_stream("memory://c4/0.json.gz") as stream:
    assert [d.text for d in files.read_jsonl(stream, "c4", "text", "", "error")] == ["a", "b"]
  for url in ("memory://c4/1.json.gz", "nosuchprotocol://c4/0.json.gz"):
    with pytest.raises(checks.InputError, match=f"file='{url}': expected a readable .*check the address") as caught:
      files.open_stream(url)
    assert caught.value.__cause__


def test_null_and_empty_texts_are_empty_documents(tmp_path):
  path = write_lines(tmp_path / "a.jsonl",
                     {"text": None, "tag": "x"}, {"text": "", "tag": None}, {"text": " ", "tag": 3})
  assert read(path, node_field="tag") == [Document("", "", "x"), Document("", "", ""), Document(" ", "", "3")]
  path = write_lines(tmp_path / "a.jsonl", {"text": "a", "meta": {"tag": "x"}}, {"text": "b", "meta": None})
  assert [document.tag for document in read(path, node_field="meta.tag")] == ["x", ""]


def test_blank_lines_line_ends_and_byte_order_mark_of_json_lines(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "\xef\xbb\xbfb"}')
  assert texts(tmp_path) == ["a", "\ufeffb"]
  (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf")
  assert texts(tmp_path) == []


@pytest.mark.parametrize(("fields", "message"), [
  ({"text_field": "txt"}, r"text_field='txt': expected a field of line 1 of .*a.jsonl, which has 'b', 'meta.set', 'n', "
   r"'text'; did you mean 'text'\?"),
  ({"text_field": "meta.body"}, "text_field='meta.body': expected a field of line 1 of"),
  ({"text_field": ""}, "text_field='': expected a field of line 1 of .*; set it to one of these"),
  ({"node_field": "text.set"}, "node_field='text.set': expected a field of line 1 of"),
  ({"text_field": "n"}, "text_field='n': expected text in every record, but line 1 of .*a.jsonl holds float in it"),
  ({"text_field": "meta"}, "text_field='meta': expected text in every record, but line 1 of .* holds dict in it"),
  ({"node_field": "b"}, "node_field='b': expected a string or a whole number in every record, .* line 1 .*bool in it"),
  ({"node_field": "n"}, "node_field='n': expected a string or a whole number in every record, .* line 1 .*float in it"),
])
def test_opening_finds_fields_that_are_missing_or_of_another_kind(tmp_path, fields, message):
  path = write_lines(tmp_path / "a.jsonl", {"text": "b", "n": 1.5, "b": True, "meta": {"set": "x"}})
  with pytest.raises(checks.InputError, match=message):
    files.open_files(config.Files(str(path), **fields), "error")


@pytest.mark.parametrize(("line", "message"), [
  ({"body": "b"}, "text_field='text': expected a field of line 3 of .*a.jsonl, which has 'body'; set"),
  ({}, "text_field='text': expected a field of line 3 of .*a.jsonl, which has none"),
  ('{"text": "b"', "file='.*a.jsonl': expected one JSON object on each line, but line 3 is none .*; correct the line"),
  ("[" * 100_000, "but line 3 is none .RecursionError"),
  ("9" * 5000, "but line 3 is none .ValueError"),
  ('["b"]', "but line 3 is a list; write each document as"),
  ('{"text": "b"} {"text": "c"}', "but line 3 is none"),
  (b'{"text": "b\xff"}', "a.jsonl': expected UTF-8, but line 3 is not; convert it, .*data.invalid_utf8=replace"),
  (b'{"text": "b", "other": "\xff"}', "expected UTF-8, but line 3 is not"),
  ({"text": "\ud800"}, "record='line 3 of .*a.jsonl': expected UTF-8, but its text is not; .*invalid_utf8=replace"),
])
def test_line_at_fault_is_named(tmp_path, line, message):
  path = write_lines(tmp_path / "a.jsonl", {"text": "a"}, "", line)
  documents = files.open_files(config.Files(str(path)), "error").documents()
  assert next(documents) == Document("a")
  with pytest.raises(checks.InputError, match=message):
    next(documents)


def test_replacements_in_json_lines_are_counted_in_the_text(tmp_path):
  path = write_lines(
    tmp_path / "a.jsonl", b'{"text": "\xff\xef\xbf\xbd\\ufffd", "tag": "\xff\xff"}',
    {"text": "\ud800a\udfff", "tag": "\udfff"}, {"text": "\U0001f600", "tag": ""})
  assert read(path, "replace", node_field="tag") == [
    Document("\ufffd" * 3, "", "\ufffd\ufffd", 1), Document("\ufffda\ufffd", "", "\ufffd", 2), Document("😀")]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("kept", [0, 1, 5, 12, 0.3, 0.9, -8, -4, -1])
def test_damaged_archive_is_named(tmp_path, suffix, kept):
  lines = [{"text": os.urandom(200).hex()} for _ in range(2000)]
  path = write_lines(tmp_path / f"a{suffix}", *lines)
  data = path.read_bytes()
  path.write_bytes(data[:int(kept * len(data)) if isinstance(kept, float) else kept])
  with pytest.raises(checks.InputError, match=r"file='.*a.jsonl....?': expected a comp") as caught:
    read(path)
  if isinstance(kept, float):
    assert re.search(r"reading it fails after [1-9][0-9]* lines .*copy or download it again", str(caught.value))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_other_data_under_an_archives_name(tmp_path, suffix):
  (tmp_path / f"a{suffix}").write_bytes(b'{"text": "not packed"}\n')
  with pytest.raises(checks.InputError, match=r"expected a complete and readable file, but reading it fails after 0"):
    read(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.array_record"])
def test_files_without_fields_have_no_tags(tmp_path, name):
  (tmp_path / name).write_text("a")
  with pytest.raises(checks.InputError, match=rf"node_field='tag': expected '' for .*{name}, whose documents have no"):
    read(tmp_path, node_field="tag")
