"""Documents out of a data set that the Hugging Face `datasets` library streams, from the Hub or a local folder."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from worldlm_jax import checks, config
from worldlm_jax.data import files, reading
from worldlm_jax.data.documents import Corpus, Document


def open_hugging_face(source: config.HuggingFace, invalid_utf8: str) -> Corpus:
  """The documents of the splits of a data set.

  A data set of the Hub is read at the commit that its revision points to now, so that what is read is what the
  fingerprint tells of.

  Args:
    source: the data set, its splits and fields; a class label as `node_field` gives its name as the tag.
    invalid_utf8: "error", or "replace" to have U+FFFD in its place; in columns of bytes alone, since
      the library decodes the others.

  Raises:
    InputError: here where the library is not installed, the Hub or the data set cannot be reached, or it lacks
      a split or a field, or the first record is at fault; when documents are read where another one is.
  """
  splits = reading.split_names("HuggingFace", source.train, source.valid, source.test)
  checks.require(source.max_documents >= 0, "HuggingFace.max_documents", source.max_documents, "at least 0", "0: all")
  try:
    import datasets  # takes two seconds
  except ImportError as error:
    reading.fail_from(error, "HuggingFace.name", source.name, "the library datasets to be installed "
                      f"({reading.reason(error)})", "pip install 'worldlm_jax[data]'")
  folder = Path(os.path.expanduser(source.name))
  local = bool(source.name) and folder.is_dir()
  checks.require(not (local and source.revision), "HuggingFace.revision", source.revision,
                 f"'' for the local folder {source.name}", "leave it out, or give the name of a data set of the Hub")
  version = _digest_folder(folder) if local else _commit(source)
  try:
    data = datasets.load_dataset(str(folder) if local else source.name, source.subset or None,
                                 revision=None if local else version, streaming=True)
  except Exception as error:  # of the library, of its HTTP client, or of the file system
    reading.fail_from(error, "HuggingFace.name", source.name, f"a data set that can be streamed "
                      f"({reading.reason(error)})", "check name and subset, or read downloaded files with Files")
  for ours, theirs in splits.items():
    checks.one_of(f"HuggingFace.{ours or 'train'}", theirs, list(data))
  fields = reading.Fields(source.text_field, source.node_field, invalid_utf8)
  where = f"data set {source.name}"
  labels = _labels(data[splits.get("train") or splits[""]], fields, where)
  parts = (version, source.subset, splits, source.text_field, source.node_field, source.max_documents)

  def documents() -> Iterator[Document]:
    for ours, theirs in splits.items():
      some = itertools.islice(data[theirs], source.max_documents or None)
      records = reading.guarded(some, f"{theirs} of {where}", "record")
      for number, record in enumerate(records, 1):
        yield fields.document(record, f"record {number} of {theirs} of {where}", labels)._replace(split=ours)

  next(documents(), None)  # the first record shows what the schema, if there is one, does not
  return Corpus(source.name, hashlib.sha256(repr(parts).encode()).hexdigest(), documents)


def _labels(data: Any, fields: reading.Fields, where: str) -> list[str] | None:
  """The names of the classes, if that is what the node field holds; without a schema it holds none."""
  if data.features is None:
    return None
  fields.check(data.features, where)
  feature = reading.lookup(data.features, "node_field", fields.node, where) if fields.node else None
  return getattr(feature, "names", None)


def _digest_folder(folder: Path) -> str:
  """A digest of the names and the contents of the files in a folder, hidden ones left out."""
  names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
  names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
  return f"{[name.as_posix() for name in names]} {files.digest_files([folder / name for name in names])}"


def _commit(source: config.HuggingFace) -> str:
  """The commit of the Hub's data set that the revision points to."""
  import huggingface_hub

  try:
    return str(huggingface_hub.HfApi().dataset_info(source.name, revision=source.revision or None).sha)
  except Exception as error:  # the Hub's, or one of the HTTP client that it happens to use
    reading.fail_from(
      error, "HuggingFace.name", source.name, "an existing folder, or a data set of the Hugging Face Hub that can be "
      f"reached ({reading.reason(error)})", "check name, revision and connection, log in with `hf auth login` if it is "
      "not public, set HF_ENDPOINT to a mirror, or read downloaded files with Files")
