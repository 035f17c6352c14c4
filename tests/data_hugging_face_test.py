"""Streaming data sets of Hugging Face: real ones from local folders, and the way to the Hub without the Hub."""

import builtins
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from worldlm_jax import checks, config
from worldlm_jax.data import hugging_face
from worldlm_jax.data.documents import Document


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
  """Keeps the library from writing into the home folder."""
  import datasets

  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
  """A data set of JSON lines: 5 records to train on, 3 to validate, 2 to test."""
  for split, count in (("train", 5), ("validation", 3), ("test", 2)):
    records = [{"text": f"{split} {i} 语", "n": i, "x": 1.5, "meta": {"who": f"w{i % 2}"}} for i in range(count)]
    (tmp_path / "set").mkdir(exist_ok=True)
    (tmp_path / "set" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
  return tmp_path / "set"


def opened(name: object, invalid_utf8: str = "error", **settings: Any) -> tuple[str, list[Document]]:
  corpus = hugging_face.open_hugging_face(config.HuggingFace(str(name), **settings), invalid_utf8)
  documents = list(corpus.documents())
  assert list(corpus.documents()) == documents
  return corpus.fingerprint, documents


def test_one_split_is_left_unsplit(folder):
  assert opened(folder)[1] == [Document(f"train {i} 语") for i in range(5)]


def test_three_splits_and_tags(folder):
  documents = opened(folder, valid="validation", test="test", node_field="meta.who")[1]
  assert documents == [Document(f"{name} {i} 语", split, f"w{i % 2}") for name, split, count in (
    ("train", "train", 5), ("validation", "valid", 3), ("test", "test", 2)) for i in range(count)]
  assert [document.tag for document in opened(folder, node_field="n")[1]] == list("01234")


def test_no_more_than_so_many_documents_are_read(folder):
  fingerprint, documents = opened(folder, valid="validation", test="test", max_documents=3)
  assert [document.split for document in documents] == ["train"] * 3 + ["valid"] * 3 + ["test"] * 2
  assert fingerprint != opened(folder, valid="validation", test="test")[0]
  with pytest.raises(ValueError, match=r"HuggingFace.max_documents=-1: expected at least 0"):
    opened(folder, max_documents=-1)


def test_packed_lines_and_subsets(tmp_path):
  for subset in ("fr", "sw"):
    (tmp_path / subset).mkdir()
    (tmp_path / subset / "c4-train.00000-of-01024.json.gz").write_bytes(
      gzip.compress(json.dumps({"text": subset}).encode()))
  (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(
    f"- config_name: {subset}\n  data_files: {subset}/*.json.gz\n" for subset in ("fr", "sw")) + "---\n")
  assert opened(tmp_path, subset="sw")[1] == [Document("sw")]
  with pytest.raises(checks.InputError, match=r"expected a data set that can be streamed .*'fr', 'sw'.*; check name"):
    opened(tmp_path)


def test_parquet_with_class_labels_bytes_and_nulls(tmp_path):
  import datasets

  features = datasets.Features({"text": datasets.Value("binary"), "label": datasets.ClassLabel(names=["cat", "dog"])})
  table = pa.table({"text": [b"a", b"b\xff", None], "label": [1, 0, -1]}, schema=features.arrow_schema)
  pq.write_table(table, tmp_path / "train.parquet")
  assert opened(tmp_path, "replace", node_field="label")[1] == [
    Document("a", "", "dog"), Document("b\ufffd", "", "cat", 1), Document("", "", "-1")]
  with pytest.raises(checks.InputError, match=r"record='record 2 of train of data set .*': expected UTF-8, but its"):
    opened(tmp_path)


def test_fingerprint_of_a_folder_is_of_contents_names_and_settings(folder, tmp_path):
  def changed(name: str, **files: str) -> str:
    shutil.copytree(folder, tmp_path / name)
    for file, text in files.items():
      (tmp_path / name / file).write_text(text)
    return opened(tmp_path / name)[0]

  fingerprint = opened(folder)[0]
  assert changed("moved") == changed("hidden", **{".cache": "x"}) == fingerprint
  renamed = tmp_path / "renamed"
  shutil.copytree(folder, renamed)
  (renamed / "test.jsonl").rename(renamed / "dev.jsonl")  # of validation now, but still the first of the names
  different = [
    changed("content", **{"test.jsonl": '{"text": "a", "n": 1, "x": 2.5, "meta": {"who": "b"}}'}), opened(renamed)[0],
    opened(folder, train="test")[0], opened(folder, node_field="n")[0], opened(folder, text_field="meta.who")[0],
    opened(folder, valid="validation", test="test")[0], opened(folder, subset="default")[0]]
  assert len({fingerprint, *different}) == 1 + len(different)


@pytest.mark.parametrize(("settings", "message"), [
  ({"train": "trian"}, r"HuggingFace.train='trian': expected one of 'train', 'validation', 'test'; did you mean 'tr"),
  ({"valid": "valid", "test": "test"}, r"HuggingFace.valid='valid': expected one of 'train', 'validation', 'test'"),
  ({"valid": "validation"}, r"HuggingFace.test='': expected a split too, next to 'validation'; give both, or neither"),
  ({"test": "test"}, r"HuggingFace.valid='': expected a split too"),
  ({"train": ""}, r"HuggingFace.train='': expected a split"),
  ({"subset": "fr"}, r"HuggingFace.name='.*': expected a data set that can be streamed .*'fr' not found. Available: "),
  ({"revision": "main"}, r"HuggingFace.revision='main': expected '' for the local folder .*; leave it out, or"),
  ({"text_field": "txt"}, r"text_field='txt': expected a field of data set .*, which has 'meta.who', 'n', 'text', 'x'"),
  ({"node_field": "meta.x"}, r"node_field='meta.x': expected a field of data set .*, which has"),
  ({"text_field": "n"}, r"text_field='n': expected text in every record, but record 1 of train of data set .* int in"),
  ({"node_field": "x"}, r"node_field='x': expected a string or a whole number in .* holds float"),
])
def test_settings_that_do_not_fit(folder, settings, message):
  with pytest.raises(checks.InputError, match=message):
    hugging_face.open_hugging_face(config.HuggingFace(str(folder), **settings), "error")


def test_folder_without_data(tmp_path):
  with pytest.raises(checks.InputError, match=r"expected a data set that can be streamed \(\w+: .*\); check") as caught:
    opened(tmp_path)
  assert caught.value.__cause__


def test_damage_is_found_when_it_is_read(folder):
  (folder / "train.more.jsonl.gz").write_bytes(gzip.compress((folder / "train.jsonl").read_bytes())[:-9])
  documents = hugging_face.open_hugging_face(config.HuggingFace(str(folder)), "error").documents()
  with pytest.raises(checks.InputError, match=r"file='train of data set .* fails after 5 records") as caught:
    list(documents)
  assert caught.value.__cause__


# The Hub.

COMMIT = "607bd4c8450a42878aa9ddc051a65a055450ef87"


def test_data_set_of_the_hub_is_read_at_the_commit_that_was_fingerprinted(folder, monkeypatch):
  import datasets
  import huggingface_hub

  load, asked = datasets.load_dataset, []

  def dataset_info(_: object, name: str, revision: str | None) -> SimpleNamespace:
    asked.append((name, revision))
    return SimpleNamespace(sha=COMMIT if revision is None else revision[::-1])

  def load_dataset(name: str, subset: str | None, *, revision: str, streaming: bool) -> Any:
    asked.append((name, subset, revision, streaming))
    return load(str(folder), streaming=streaming)

  monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  fingerprint, documents = opened("allenai/c4", subset="fr")
  assert documents == [Document(f"train {i} 语") for i in range(5)]
  assert asked == [("allenai/c4", None), ("allenai/c4", "fr", COMMIT, True)]
  (folder / "train.jsonl").write_text('{"text": "changed"}')  # cannot happen at a commit, so it is not looked at
  assert opened("allenai/c4", subset="fr")[0] == fingerprint
  asked.clear()
  assert opened("allenai/c4", subset="fr", revision="v2")[0] != fingerprint
  assert asked == [("allenai/c4", "v2"), ("allenai/c4", "fr", "2v", True)]
  assert opened("allenai/c4", subset="sw")[0] != fingerprint


def test_hub_out_of_reach(monkeypatch):
  import huggingface_hub

  def dataset_info(*_: object, **__: object) -> None:
    raise OSError("[Errno -2] Name or service not known\nand more")

  monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
  with pytest.raises(checks.InputError, match=r"HuggingFace.name='allenai/c4': .* can be reached \(OSError: "
                     r"\[Errno -2\] Name or service not known and more\); check name, .*HF_ENDPOINT") as caught:
    opened("allenai/c4")
  assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("name", ["", "/no/such/folder"])
def test_name_that_is_neither_a_folder_nor_of_the_hub(name):
  with pytest.raises(checks.InputError, match=f"HuggingFace.name='{name}': expected an existing folder, or a data set"):
    opened(name)


def test_library_not_installed(monkeypatch):
  real_import = builtins.__import__

  def without(name: str, *args: Any) -> Any:
    if name == "datasets":
      raise ModuleNotFoundError(f"No module named {name!r}")
    return real_import(name, *args)

  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(checks.InputError, match=r"the library datasets to be installed .*; pip install 'worldlm_jax\[da"):
    opened("allenai/c4")


def test_library_is_imported_when_it_is_needed(folder, tmp_path):
  code = f"""
import sys, warnings
from worldlm_jax import config
from worldlm_jax.data import hugging_face
assert "datasets" not in sys.modules
warnings.simplefilter("error")
documents = hugging_face.open_hugging_face(config.HuggingFace({str(folder)!r}), "error").documents()
assert len(list(documents)) == 5 and "datasets" in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True, timeout=600, env={"HF_HOME": str(tmp_path)})
