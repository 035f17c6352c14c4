"""Reading prepared data sets of tensorflow_datasets without TensorFlow, and what can be wrong with them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldlm_jax import checks, config
from worldlm_jax.data import tfds
from worldlm_jax.data.documents import Document


def prepare(data_dir: Path, num_shards: int, splits: dict[str, Iterable[dict[str, Any]]], **features: Any) -> Path:
  """Prepares the data set "little", its records in order, and returns its folder."""
  import tensorflow_datasets as library

  class Little(library.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = library.core.Version("1.0.0")
    code_path = pkg_dir_path = None  # it looks for files beside its module, in ways that need further libraries

    def _info(self) -> Any:
      return library.core.DatasetInfo(
        builder=self, features=library.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, _: Any) -> dict[str, Any]:
      return {split: enumerate(records) for split, records in splits.items()}

    def _generate_examples(self) -> Iterator:
      raise NotImplementedError

  library.disable_progress_bar()
  builder = Little(data_dir=data_dir, file_format="array_record")
  builder.download_and_prepare(download_config=library.download.DownloadConfig(num_shards=num_shards))
  return Path(builder.data_dir)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
  """The data_dir of the data set "little": 300 records to train on, 7 to validate and 5 to test."""
  import tensorflow_datasets as library

  def records(count: int, word: str) -> list[dict[str, Any]]:
    return [{"text": f"{word} {i} 语", "label": i % 2, "number": i, "meta": {"who": f"w{i % 3}"}, "tags": ["a", "b"]}
            for i in range(count)]

  data_dir = tmp_path_factory.mktemp("tfds")
  prepare(data_dir, 3, {"train": records(300, "train"), "validation": records(7, "valid"), "test": records(5, "test")},
          text=library.features.Text(), label=library.features.ClassLabel(names=["cat", "dog"]), number=np.int64,
          meta={"who": library.features.Text()}, tags=library.features.Sequence(library.features.Text()))
  return data_dir


def opened(data_dir: Path, invalid_utf8: str = "error", **settings: Any) -> tuple[str, list[Document]]:
  corpus = tfds.open_tfds(config.Tfds(**{"name": "little", "data_dir": str(data_dir), **settings}), invalid_utf8)
  return corpus.fingerprint, list(corpus.documents())


def test_one_split_is_left_unsplit(prepared):
  assert opened(prepared)[1] == [Document(f"train {i} 语") for i in range(300)]
  assert opened(prepared, train="train[:2%]+test[3:]")[1] == [
    *(Document(f"train {i} 语") for i in range(6)), Document("test 3 语"), Document("test 4 语")]


def test_three_splits(prepared):
  documents = opened(prepared, train="train[:2]", valid="validation[5:]", test="test[:1]")[1]
  assert documents == [
    Document("train 0 语", "train"), Document("train 1 语", "train"),
    Document("valid 5 语", "valid"), Document("valid 6 语", "valid"), Document("test 0 语", "test")]


@pytest.mark.parametrize(("field", "tags"), [
  ("label", ["cat", "dog", "cat"]), ("number", ["0", "1", "2"]), ("meta.who", ["w0", "w1", "w2"]),
])
def test_tags(prepared, field, tags):
  assert [document.tag for document in opened(prepared, train="train[:3]", node_field=field)[1]] == tags


def test_unknown_label_stays_a_number(tmp_path):
  import tensorflow_datasets as library

  prepare(tmp_path, 1, {"train": [{"text": "a", "label": -1}]}, text=library.features.Text(),
          label=library.features.ClassLabel(names=["cat", "dog"]))
  assert opened(tmp_path, node_field="label")[1] == [Document("a", "", "-1")]


def test_folder_and_versions_name_the_same_data_set(prepared):
  names = ["little", "little:1.0.0", "little:1.*.*", str(prepared / "little" / "1.0.0")]
  assert len({opened(prepared, name=name)[0] for name in names}) == 1


def test_home_is_expanded(prepared, monkeypatch):
  monkeypatch.setenv("HOME", str(prepared))
  assert opened(Path("~"), train="test")[1] == opened(Path(), name="~/little/1.0.0", train="test")[1]


def test_invalid_utf8(tmp_path):
  import tensorflow_datasets as library

  prepare(tmp_path, 1, {"train": [{"text": b"a"}, {"text": b"b\xff"}]}, text=library.features.Text())
  assert opened(tmp_path, "replace")[1] == [Document("a"), Document("b\ufffd", replaced=1)]
  with pytest.raises(checks.InputError, match=r"record='record 2 of train of data set little': expected UTF-8, but"):
    opened(tmp_path)


def test_fingerprint_is_of_contents_splits_and_fields_alone(prepared, tmp_path):
  import tensorflow_datasets as library

  shutil.copytree(prepared, tmp_path / "moved")
  fingerprint = opened(prepared)[0]
  assert opened(tmp_path / "moved")[0] == fingerprint
  for name, text in (("a", "x"), ("b", "y")):
    prepare(tmp_path / name, 1, {"train": [{"text": text}]}, text=library.features.Text())
  assert opened(tmp_path / "a")[0] != opened(tmp_path / "b")[0]
  different = [opened(prepared, **settings)[0] for settings in (
    {"train": "train[:99%]"}, {"train": "test"}, {"node_field": "label"}, {"text_field": "meta.who"},
    {"valid": "validation", "test": "test"}, {"valid": "test", "test": "validation"})]
  labels = tmp_path / "moved" / "little" / "1.0.0" / "label.labels.txt"
  labels.write_text("cat\nwolf\n")
  different.append(opened(tmp_path / "moved", node_field="label")[0])
  assert len({fingerprint, *different}) == 1 + len(different)


@pytest.mark.parametrize(("settings", "message"), [
  ({"name": "litle:1.0.0"}, r"Tfds.name='litle:1.0.0': expected the folder or the name of a prepared data set, such as "
   r"those of .*: little:1.0.0; did you mean 'little:1.0.0'\?"),
  ({"name": "wiki40b/en:1.3.0"}, r"little:1.0.0; prepare it with `tfds build NAME --file_format=array_record`, or"),
  ({"name": "little:2.0.0"}, r"Tfds.name='little:2.0.0': expected the folder or"),
  ({"name": "/no/such/folder"}, r"prepared data set \(ValueError: Parsing builder name string /no/such/folder failed"),
  ({"name": ""}, r"Tfds.name='': expected"),
  ({"data_dir": "/no/such/folder"}, r"such as those of /no/such/folder: none; prepare it with"),
  ({"train": "trian"}, r"Tfds.train='trian': expected one of 'train', 'validation', 'test', or a slice of it .*Unknown "
   r"split 'trian'.*; did you mean 'train'\?"),
  ({"valid": "valid[:", "test": "test"}, r"Tfds.valid='valid\[:': expected one of 'train', 'validation', 'test'"),
  ({"train": "train[400:]"}, r"Tfds.train='train\[400:\]': .*incompatible with 300 examples"),
  ({"train": ""}, r"Tfds.train='': expected a split of the data set"),
  ({"valid": "validation"}, r"Tfds.test='': expected a split too, next to 'validation'; give both, or neither"),
  ({"test": "test"}, r"Tfds.valid='': expected a split too, next to 'test'; give both, or neither"),
  ({"text_field": "txt"}, r"text_field='txt': expected a field of data set little, which has 'label', 'meta.who', "
   r"'number', 'tags', 'text'; did you mean 'text'\?"),
  ({"node_field": "meta.name"}, r"node_field='meta.name': expected a field of data set little, which has"),
  ({"text_field": "number"}, r"text_field='number': expected text in every record, but record 1 of train of data"),
  ({"text_field": "meta"}, r"text_field='meta': .* holds dict in it"),
  ({"node_field": "tags"}, r"node_field='tags': expected a string or a whole number .* holds list in it"),
])
def test_settings_that_do_not_fit(prepared, settings, message):
  source = config.Tfds(**{"name": "little", "data_dir": str(prepared), **settings})
  with pytest.raises(checks.InputError, match=message):
    tfds.open_tfds(source, "error")


def test_damaged_description(prepared, tmp_path):
  shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
  for file in ("features.json", "dataset_info.json"):
    (tmp_path / "little" / "1.0.0" / file).write_text("{")
    with pytest.raises(checks.InputError, match=r"Tfds.name='little': expected .* data set \(\w+: .*\), ") as caught:
      opened(tmp_path)
    assert caught.value.__cause__


@pytest.mark.parametrize("kept", [0, 1, 1 << 16, (1 << 16) + 1, -1])
def test_truncated_shard_is_named(prepared, tmp_path, kept):
  shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
  shard = tmp_path / "little" / "1.0.0" / "little-train.array_record-00001-of-00003"
  shard.write_bytes(shard.read_bytes()[:kept])
  with pytest.raises(checks.InputError, match=r"train.array_record-00001-of-00003': expected a complete and readable"):
    tfds.open_tfds(config.Tfds("little", str(tmp_path)), "error")
  assert len(opened(tmp_path, train="train[:100]+validation")[1]) == 107  # splits that have nothing to do with it


def test_missing_and_exchanged_shards_are_named(prepared, tmp_path):
  shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / "little" / "1.0.0"
  shutil.copy(folder / "little-test.array_record-00000-of-00003", folder / "little-train.array_record-00000-of-00003")
  with pytest.raises(checks.InputError, match=r"train.array_record-00000-of-00003': expected the 100 records .* has 2"):
    opened(tmp_path)
  (folder / "little-train.array_record-00000-of-00003").unlink()
  with pytest.raises(checks.InputError, match=r"train.array_record-00000-of-00003': expected a complete and readable"):
    opened(tmp_path)


def test_damaged_record_is_found_when_it_is_read(tmp_path):
  import tensorflow_datasets as library

  folder = prepare(tmp_path, 3, {"train": [{"text": f"{i:0500}"} for i in range(999)]}, text=library.features.Text())
  shard = folder / "little-train.array_record-00002-of-00003"
  data = bytearray(shard.read_bytes())
  data[200] ^= 1  # within its first record
  shard.write_bytes(data)
  documents = tfds.open_tfds(config.Tfds("little", str(tmp_path)), "error").documents()
  with pytest.raises(checks.InputError, match=r"data set little': .* fails after 5 batches of 128 records .*Corrupted"):
    list(documents)


def test_other_file_formats_are_refused_and_alternatives_found(prepared, tmp_path):
  folder = tmp_path / "little" / "1.0.0"
  shutil.copytree(prepared / "little" / "1.0.0", folder)
  description = json.loads((folder / "dataset_info.json").read_text())
  (folder / "dataset_info.json").write_text(json.dumps(description | {"fileFormat": "tfrecord"}))
  with pytest.raises(checks.InputError, match=r"Tfds.name='little': expected a data set prepared as array_record, but "
                     r"it is tfrecord; .* convert it with `tfds convert_format --dataset_version_dir=.*little/1.0.0"):
    opened(tmp_path)
  (folder / "dataset_info.json").write_text(json.dumps(
    description | {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}))
  assert opened(tmp_path) == opened(prepared)


def test_neither_library_nor_tensorflow_is_imported_before_it_is_needed(prepared):
  code = f"""
import sys, warnings
from worldlm_jax import config
from worldlm_jax.data import tfds
assert "tensorflow_datasets" not in sys.modules
warnings.simplefilter("error")
assert len(list(tfds.open_tfds(config.Tfds("little", {str(prepared)!r}), "error").documents())) == 300
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
