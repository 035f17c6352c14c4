"""Laws of splitting text files, and the messages of everything that can be wrong with them."""

import random
from pathlib import Path

import pytest

from worldlm_jax import config
from worldlm_jax.data import documents, sources


def _write(folder: Path, **texts: str) -> str:
  for name, text in texts.items():
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
  return str(folder)


def _all(docs: documents.Documents) -> list[str]:
  return [*docs.train, *docs.valid, *docs.test]


def test_three_files_are_the_three_splits(tmp_path):
  path = _write(tmp_path, train="a\nb\n\nc", valid="d", test="e", notes="ignored")
  docs = sources.read(config.Files(path))
  assert (docs.train, docs.valid, docs.test) == (("a\nb", "c"), ("d",), ("e",))
  assert docs.origins["valid"] == str(tmp_path / "valid.txt")


@pytest.mark.parametrize("text", [
  "a\nb\n\nc\n", "a\r\nb\r\n\r\nc", "a\rb\r\rc", "\n\na\nb\n \t\n\n\nc\n\n", "  \na\nb\n\n   \n\nc\n   ",
  "\ufeffa\nb\n\nc",
])
def test_blank_lines_of_any_kind_separate_documents(tmp_path, text):
  _write(tmp_path, valid="v", test="t")
  (tmp_path / "train.txt").write_bytes(text.encode())
  assert sources.read_text(str(tmp_path)).train == ("a\nb", "c")


def test_indentation_is_kept(tmp_path):
  path = _write(tmp_path, train="  def f():\n    pass\n\n  x = 1", valid="v", test="t")
  assert sources.read_text(path).train == ("  def f():\n    pass", "  x = 1")


@pytest.mark.parametrize(("count", "sizes"), [(3, (1, 1, 1)), (7, (5, 1, 1)), (19, (17, 1, 1)), (101, (90, 5, 6))])
def test_split_sizes(count, sizes):
  docs = sources.split([f"document {i}" for i in range(count)], "here")
  assert (len(docs.train), len(docs.valid), len(docs.test)) == sizes
  assert sorted(_all(docs)) == sorted(f"document {i}" for i in range(count))


def test_split_depends_on_the_set_of_documents_alone():
  texts = [f"document {i}" for i in range(53)]
  shuffled = random.Random(3).sample(texts, len(texts))
  assert sources.split(texts, "here") == sources.split(shuffled, "here")


def test_duplicates_stay_together():
  texts = [f"document {i % 23}" for i in range(97)]
  docs = sources.split(texts, "here")
  parts = [set(docs.train), set(docs.valid), set(docs.test)]
  assert sum(map(len, parts)) == 23  # no text in two splits
  assert sorted(_all(docs)) == sorted(texts)  # every copy is kept


def test_all_txt_files_of_a_folder_are_split_together(tmp_path):
  (tmp_path / "below").mkdir()
  _write(tmp_path / "below", more="not read")
  (tmp_path / "readme.md").write_text("not read")
  path = _write(tmp_path, b="4\n\n5\n\n6", a="1\n\n2\n\n3")
  docs = sources.read(config.Files(path))
  assert sorted(_all(docs)) == ["1", "2", "3", "4", "5", "6"]
  assert docs.origins["test"] == f"{path} (test part of its documents)"


def test_a_single_file_is_split(tmp_path):
  _write(tmp_path, a="1\n\n2\n\n3", b="4")
  assert sorted(_all(sources.read_text(str(tmp_path / "a.txt")))) == ["1", "2", "3"]


def test_missing_folder(tmp_path):
  with pytest.raises(ValueError, match=r"Files.path='.*nowhere': expected an existing folder .*correct the path"):
    sources.read_text(str(tmp_path / "nowhere"))
  with pytest.raises(ValueError, match=r"Files.path='': expected an existing folder"):
    sources.read_text("")


def test_folder_without_text(tmp_path):
  (tmp_path / "a.md").write_text("text")
  for path in (tmp_path, tmp_path / "a.md"):
    with pytest.raises(ValueError, match=r"expected a .txt file or a folder that holds .txt files; put train.txt"):
      sources.read_text(str(path))


def test_missing_split_file(tmp_path):
  path = _write(tmp_path, train="a", test="b", notes="c\n\nd\n\ne")
  with pytest.raises(ValueError, match=r"expected all of .* lacks valid.txt; add it, or rename"):
    sources.read_text(path)


def test_blank_split_file(tmp_path):
  path = _write(tmp_path, train="a", valid=" \n\n \n", test="b")
  with pytest.raises(ValueError, match=r"valid file='.*valid.txt': expected at least one document, but it is blank"):
    sources.read_text(path)


def test_too_few_documents_to_split(tmp_path):
  path = _write(tmp_path, a="x\n\ny\n\nx")
  with pytest.raises(ValueError, match=r"path='.*': expected at least 3 distinct documents .* has 2; separate"):
    sources.read_text(path)


def test_invalid_utf8_names_file_and_byte(tmp_path):
  path = _write(tmp_path, train="a", valid="b")
  (tmp_path / "test.txt").write_bytes(b"01234\xff")
  with pytest.raises(ValueError, match=r"test.txt': expected UTF-8, but byte 5 is not; convert it"):
    sources.read_text(path)


def test_unreadable_file_is_named(tmp_path, monkeypatch):
  def refuse(_):
    raise PermissionError(13, "Permission denied")

  path = _write(tmp_path, a="1\n\n2\n\n3")
  monkeypatch.setattr(Path, "read_bytes", refuse)  # a test that runs as root can read everything
  with pytest.raises(ValueError, match=r"a.txt': expected a readable file \(Permission denied\); check its"):
    sources.read_text(path)


def test_no_source():
  with pytest.raises(ValueError, match="data=None: expected Files or StandardLibrary"):
    sources.read(None)


def test_standard_library_is_a_source():
  assert sources.read(config.StandardLibrary("prose/reference")).origins["valid"] == "stdlib prose/reference valid"


def test_first_bytes():
  docs = ("abc", "défg", "hi")  # 3, 5 and 2 bytes
  assert documents.num_bytes(docs) == 10
  kept = {limit: documents.first_bytes(docs, limit) for limit in (0, 2, 3, 7, 8, 9, 10, 11)}
  assert kept == {0: docs, 2: ("ab",), 3: ("abc",), 7: ("abc",), 8: docs[:2], 9: docs[:2], 10: docs, 11: docs}
  assert documents.first_bytes(("é" * 5,), 3) == ("é",)
  assert documents.first_bytes((), 3) == ()
