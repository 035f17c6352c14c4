"""Documents out of a data set of tensorflow_datasets that is prepared as ArrayRecord files. TensorFlow is not needed.

Nothing is downloaded: `tfds build NAME --file_format=array_record` prepares a data set.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from worldlm_jax import checks, config
from worldlm_jax.data import containers, files, reading
from worldlm_jax.data.documents import Corpus, Document

_BATCH_RECORDS = 128  # each batch has threads of its own, which smaller ones do not repay


def open_tfds(source: config.Tfds, invalid_utf8: str) -> Corpus:
  """The documents of the splits of a prepared data set.

  Args:
    source: the data set, its splits and fields; a class label as `node_field` gives its name as the tag.
    invalid_utf8: "error", or "replace" to have U+FFFD in its place.

  Raises:
    InputError: here where the data set is not prepared as ArrayRecord files, lacks a split or a field, a file
      is damaged, or the first record is at fault; when documents are read where another one is.
  """
  splits = reading.split_names("Tfds", source.train, source.valid, source.test)
  builder = _builder(source)
  fields = reading.Fields(source.text_field, source.node_field, invalid_utf8)
  schema, where = _nested(builder.info.features), f"data set {source.name}"
  fields.check(schema, where)
  tag = reading.lookup(schema, "node_field", source.node_field, where) if source.node_field else None
  labels = getattr(tag, "names", None)
  shards = [shard for ours, theirs in splits.items() for shard in _shards(builder, ours, theirs)]
  digest = files.digest_files(list(dict.fromkeys(shards)))
  parts = (digest, splits, source.text_field, source.node_field, labels)

  def documents() -> Iterator[Document]:
    for ours, theirs in splits.items():
      for number, record in enumerate(_records(builder, theirs, where), 1):
        yield fields.document(record, f"record {number} of {theirs} of {where}", labels)._replace(split=ours)

  next(documents(), None)  # the first record shows what the schema does not
  return Corpus(source.name, hashlib.sha256(repr(parts).encode()).hexdigest(), documents)


def _builder(source: config.Tfds) -> Any:
  """What reads the data set: from the folder of that name, or prepared under that name."""
  try:
    import tensorflow_datasets as tfds  # takes a second
    from tensorflow_datasets.core import read_only_builder
    from tensorflow_datasets.core.utils import file_utils
  except ImportError as error:
    reading.fail_from(error, "Tfds.name", source.name, "the library tensorflow_datasets to be installed "
                      f"({reading.reason(error)})", "pip install 'worldlm_jax[data]'")
  data_dir = os.path.expanduser(source.data_dir)
  folder = Path(os.path.expanduser(source.name))
  try:
    if (folder / "dataset_info.json").is_file():
      builder = tfds.builder_from_directory(folder)
    else:
      # Not `tfds.builder`: without a version it takes that of its code, prepared or not.
      builder = read_only_builder.builder_from_files(source.name, data_dir=data_dir or None)
  except Exception as error:  # of the library, of protocol buffers, of JSON or of the file system
    places = [Path(place) for place in file_utils.list_data_dirs(data_dir or None)]
    prepared = [name for place in places for name in _prepared(place)]
    why = "" if isinstance(error, tfds.core.DatasetNotFoundError) else f" ({reading.reason(error)})"
    reading.fail_from(
      error, "Tfds.name", source.name, f"the folder or the name of a prepared data set{why}, such as those of "
      f"{' and '.join(map(str, places))}: {', '.join(prepared) or 'none'}", checks.did_you_mean(source.name, prepared)
      or "prepare it with `tfds build NAME --file_format=array_record`, or correct Tfds.data_dir")
  formats = sorted(kind.value for kind in builder.info.available_file_formats())
  checks.require(
    "array_record" in formats, "Tfds.name", source.name,
    f"a data set prepared as array_record, but it is {' and '.join(formats) or 'of no known format'}",
    "prepare it again with `tfds build NAME --file_format=array_record`, or, where TensorFlow is installed, convert it "
    f"with `tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format=array_record`")
  return builder


def _prepared(data_dir: Path) -> list[str]:
  """The names, such as "wiki40b/en:1.3.0", of the data sets prepared in a folder."""
  infos = [*data_dir.glob("*/*/dataset_info.json"), *data_dir.glob("*/*/*/dataset_info.json")]
  folders = sorted(info.parent.relative_to(data_dir) for info in infos)
  return [f"{folder.parent.as_posix()}:{folder.name}" for folder in folders]


def _nested(features: Any) -> dict[str, Any]:
  """The features by name, those of a feature dictionary within."""
  import tensorflow_datasets as tfds

  return {name: _nested(feature) if isinstance(feature, tfds.features.FeaturesDict) else feature
          for name, feature in features.items()}


def _shards(builder: Any, ours: str, theirs: str) -> list[Path]:
  """The files of a split, each of which is complete."""
  try:
    builder.as_data_source(theirs, file_format="array_record")  # from now on, `splits` tells of this format's files
    instructions = builder.info.splits[theirs].file_instructions
  except Exception as error:  # a ValueError or an AssertionError, depending on what is wrong
    available = list(builder.info.splits)
    reading.fail_from(error, f"Tfds.{ours or 'train'}", theirs, f"one of {', '.join(map(repr, available))}, or a slice "
                      f"of it ({reading.reason(error)})", checks.did_you_mean(theirs, available))
  for instruction in instructions:
    length = containers.array_record_length(Path(instruction.filename))
    checks.require(length == instruction.examples_in_shard, "file", instruction.filename, "the "
                   f"{instruction.examples_in_shard} records that dataset_info.json tells of, but it has {length}",
                   "prepare the data set again")
  return [Path(instruction.filename) for instruction in instructions]


def _records(builder: Any, split: str, where: str) -> Iterator[dict[str, Any]]:
  """The records of a split, strings in them as bytes."""
  data = builder.as_data_source(split, file_format="array_record")
  starts = range(0, len(data), _BATCH_RECORDS)
  batches = (data.__getitems__(range(start, min(start + _BATCH_RECORDS, len(data)))) for start in starts)
  for batch in reading.guarded(batches, where, f"batches of {_BATCH_RECORDS} record"):
    yield from batch
