"""Documents out of Parquet and ArrayRecord files, a batch at a time."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from array_record.python import array_record_module

from worldlm_jax import checks
from worldlm_jax.data import reading
from worldlm_jax.data.documents import Document

_BATCH_ROWS = 64  # few enough for books, and more are hardly faster
_TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())


def check_parquet(file: Path, fields: reading.Fields) -> None:
  """Raises `InputError` where the footer of `file` is damaged, or its schema lacks a field or has no text in it."""
  with _open_parquet(file) as parquet:
    schema = _nested(parquet.schema_arrow)
  fields.check(schema, str(file))
  kind = reading.lookup(schema, "text_field", fields.text, str(file))
  checks.require(not isinstance(kind, dict) and _is_text(kind), "text_field", fields.text, f"a column of text in {file}"
                 f", but it is {'a struct' if isinstance(kind, dict) else kind}", "name the column of the text")


def read_parquet(file: Path, fields: reading.Fields) -> Iterator[Document]:
  """One document for each row; null gives an empty one. Raises `InputError` where the file is damaged."""
  columns = [fields.text, fields.node] if fields.node else [fields.text]
  row = 0
  with _open_parquet(file) as parquet:
    batches = parquet.iter_batches(_BATCH_ROWS, columns=columns)
    for batch in reading.guarded(batches, str(file), f"batches of {_BATCH_ROWS} row"):
      texts = _values(batch, fields.text)
      tags = _values(batch, fields.node) if fields.node else [None] * len(texts)
      for text, tag in zip(texts, tags, strict=True):
        row += 1
        yield fields.make(text, tag, f"row {row} of {file}")


def _open_parquet(file: Path) -> pq.ParquetFile:
  try:
    # By default it holds the row groups whole, those that it is done with too.
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
  except (OSError, pa.ArrowException) as error:
    reading.fail_damaged(error, str(file))


def _nested(columns: Iterable[pa.Field]) -> dict[str, Any]:
  """The types of columns by name, those of structs within."""
  return {column.name: _nested(column.type) if pa.types.is_struct(column.type) else column.type for column in columns}


def _is_text(kind: pa.DataType) -> bool:
  return (kind.value_type if pa.types.is_dictionary(kind) else kind) in _TEXT_TYPES


def _values(batch: pa.RecordBatch, field: str) -> list[Any]:
  """The values of a column; strings as bytes, since Arrow does not check that they are UTF-8."""
  first, *others = field.split(".")
  column = batch.column(first)
  for name in others:
    column = pc.struct_field(column, name)
  return (column.cast(pa.large_binary()) if _is_text(column.type) else column).to_pylist()


def array_record_length(file: Path) -> int:
  """How many records an ArrayRecord file has. Raises `InputError` where it is damaged or cut short."""
  return _open_array_record(file).num_records()


def read_array_record(file: Path, fields: reading.Fields) -> Iterator[Document]:
  """One document for each record, its text. Raises `InputError` where the file is damaged."""
  reader = _open_array_record(file)
  records = (reader.read() for _ in range(reader.num_records()))
  for number, record in enumerate(reading.guarded(records, str(file), "record"), 1):
    yield fields.make(record, None, f"record {number} of {file}")


def _open_array_record(file: Path) -> Any:
  """A sequential reader; small buffers, since by default each of many threads has 16 MB."""
  reader = array_record_module.ArrayRecordReader(str(file), "readahead_buffer_size:1M,max_parallelism:1")
  # A file that is cut short opens without an error, and as one of no records.
  checks.require(reader.ok(), "file", str(file), "a complete and readable ArrayRecord file, but its end is missing or "
                 "damaged", "copy or prepare it again, and check its permissions")
  return reader
