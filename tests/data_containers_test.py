"""Laws of reading Parquet and ArrayRecord files, and the messages of everything that can be wrong with them."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module

from worldlm_jax import checks, config
from worldlm_jax.data import files
from worldlm_jax.data.documents import Document


def write_array_record(path: Path, *records: bytes) -> Path:
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()
  return path


def read(path: Path, invalid_utf8: str = "error", **fields: str) -> list[Document]:
  return list(files.open_files(config.Files(str(path), **fields), invalid_utf8).documents())


def texts(path: Path, **fields: str) -> list[str]:
  return [document.text for document in read(path, **fields)]


# Parquet.


def test_parquet_columns_of_every_kind_of_text(tmp_path):
  expected = ["a", "", "语" * 3, ""]
  values = ["a", None, "语" * 3, ""]
  kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
  columns = {f"c{i}": pa.array(values, pa.string()).cast(kind) for i, kind in enumerate(kinds)}
  data = [value and value.encode() for value in values]
  columns |= {"b": pa.array(data, pa.binary()), "lb": pa.array(data, pa.large_binary()), "n": [3, None, 5, 6]}
  columns["in"] = pa.array([{"text": "x", "deep": {"tag": value}} for value in ("p", None, "q")] + [None])
  pq.write_table(pa.table(columns), tmp_path / "a.parquet")
  for name in columns:
    if name not in ("n", "in"):
      assert texts(tmp_path, text_field=name) == expected, name
  assert read(tmp_path, text_field="in.text", node_field="in.deep.tag") == [
    Document("x", "", "p"), Document("x"), Document("x", "", "q"), Document("")]
  assert [document.tag for document in read(tmp_path, text_field="b", node_field="n")] == ["3", "", "5", "6"]


def test_nothing_within_a_null_struct_is_null(tmp_path):
  kind = pa.struct([pa.field("n", pa.int64(), nullable=False)])
  pq.write_table(pa.table({"text": ["a", "b"], "in": pa.array([{"n": 7}, None], kind)}), tmp_path / "a.parquet")
  assert [document.tag for document in read(tmp_path, node_field="in.n")] == ["7", ""]


@pytest.mark.parametrize(("fields", "message"), [
  ({"text_field": "txt"}, r"text_field='txt': expected a field of .*2.parquet, which has 'meta.set', 'n', 'text'; did"),
  ({"node_field": "meta.who"}, "node_field='meta.who': expected a field of .*2.parquet, which has 'meta.set'"),
  ({"text_field": "meta"}, "text_field='meta': expected a column of text in .*2.parquet, but it is a struct"),
  ({"text_field": "n"}, "text_field='n': expected a column of text in .*2.parquet, but it is double"),
])
def test_opening_finds_missing_columns_in_every_file(tmp_path, fields, message):
  good = {"text": ["a"], "txt": ["a"], "n": ["a"], "meta": ["a"]}
  pq.write_table(pa.table(good | ({"meta": [{"who": "a"}]} if "node_field" in fields else {})), tmp_path / "1.parquet")
  pq.write_table(pa.table({"text": ["a"], "n": [1.5], "meta": [{"set": "a"}]}), tmp_path / "2.parquet")
  with pytest.raises(checks.InputError, match=message):
    files.open_files(config.Files(str(tmp_path), **fields), "error")


def test_parquet_node_field_of_another_kind(tmp_path):
  pq.write_table(pa.table({"text": ["a"], "n": [1.5]}), tmp_path / "a.parquet")
  with pytest.raises(checks.InputError, match=r"node_field='n': .* whole number .* row 1 of .*a.parquet holds float"):
    read(tmp_path, node_field="n")


@pytest.mark.parametrize(("kind", "stored"), [
  (pa.string(), pa.binary()), (pa.large_string(), pa.large_binary()), (pa.binary(), pa.binary()),
])
def test_invalid_utf8_in_parquet(tmp_path, kind, stored):
  column = pa.array([b"a", b"b\xff\xef\xbf\xbd"], stored)
  column = pa.Array.from_buffers(kind, 2, column.buffers())
  pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
  assert read(tmp_path, "replace") == [Document("a"), Document("b\ufffd\ufffd", replaced=1)]
  with pytest.raises(checks.InputError, match=r"record='row 2 of .*a.parquet': expected UTF-8, but its text is not; "):
    read(tmp_path)


def test_parquet_is_read_in_batches(tmp_path):
  for name, row_group_size in (("one", 20_000), ("many", 100)):
    path = tmp_path / f"{name}.parquet"
    pq.write_table(pa.table({"text": [os.urandom(500).hex() for _ in range(20_000)]}), path,
                   row_group_size=row_group_size, compression="none", use_dictionary=False)  # 20 MB
    peak = max(pa.total_allocated_bytes() for _ in files.open_files(config.Files(str(path)), "error").documents())
    assert peak < 8e6, name


@pytest.mark.parametrize("kept", [0, 3, 4, 100, 0.5, 0.99, -8, -1])
def test_truncated_parquet_is_named(tmp_path, kept):
  path = tmp_path / "a.parquet"
  pq.write_table(pa.table({"text": [os.urandom(200).hex() for _ in range(500)]}), path)
  data = path.read_bytes()
  path.write_bytes(data[:int(kept * len(data)) if isinstance(kept, float) else kept])
  with pytest.raises(checks.InputError, match=r"a.parquet': expected a complete and readable file, but") as caught:
    files.open_files(config.Files(str(path)), "error")
  assert caught.value.__cause__


def test_damaged_parquet_page_is_found_when_it_is_read(tmp_path):
  path = tmp_path / "a.parquet"
  pq.write_table(pa.table({"text": [os.urandom(200).hex() for _ in range(5000)]}), path, use_dictionary=False,
                 compression="none", write_page_checksum=True, row_group_size=1000)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  documents = files.open_files(config.Files(str(path)), "error").documents()
  with pytest.raises(checks.InputError, match=r"a.parquet': .* fails after [1-9][0-9]* batches of 64 rows"):
    list(documents)


# ArrayRecord.


def test_array_record_gives_its_records(tmp_path):
  records = [b"", "语".encode(), b"a\n\nb", *(b"%d" % i for i in range(300))]
  write_array_record(tmp_path / "a.array_record", *records)
  write_array_record(tmp_path / "b.array_record")
  assert texts(tmp_path) == [record.decode() for record in records]


def test_invalid_utf8_in_array_record(tmp_path):
  write_array_record(tmp_path / "a.array_record", b"a", b"b\xff")
  assert read(tmp_path, "replace") == [Document("a"), Document("b\ufffd", replaced=1)]
  with pytest.raises(checks.InputError, match=r"record='record 2 of .*a.array_record': expected UTF-8"):
    read(tmp_path)


@pytest.mark.parametrize("count", [0, 3, 400])
def test_truncated_array_record_is_named(tmp_path, count):
  path = write_array_record(tmp_path / "a.array_record", *(os.urandom(500).hex().encode() for _ in range(count)))
  data = path.read_bytes()
  blocks = range(0, len(data), 1 << 16)  # a file cut between them opens as one without records
  for kept in {0, 1, 100, *blocks, *(block + 1 for block in blocks), len(data) // 2, len(data) - 1}:
    path.write_bytes(data[:kept])
    with pytest.raises(checks.InputError, match=r"a.array_record': expected a complete and readable ArrayRecord file"):
      files.open_files(config.Files(str(tmp_path)), "error")


def test_damaged_array_record_is_found_when_it_is_read(tmp_path):
  path = write_array_record(tmp_path / "a.array_record", *(os.urandom(500).hex().encode() for _ in range(400)))
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  documents = files.open_files(config.Files(str(tmp_path)), "error").documents()
  with pytest.raises(checks.InputError, match=r"a.array_record': .* fails after [1-9][0-9]* records .*RuntimeError"):
    list(documents)
