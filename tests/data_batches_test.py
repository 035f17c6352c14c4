"""Laws of packing, windows and batches, and the text of a node."""

import dataclasses
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from worldlm_jax import config
from worldlm_jax.data import batches, documents, tokenizer, windows

_BYTES = tokenizer.ByteTokenizer()


def _windows(count: int, length: int = 3) -> windows.Windows:
  """Windows over the stream 0, 1, 2, ..., so that a window's first token tells which window it is."""
  return windows.Windows(np.arange(count * length + 1, dtype=np.uint16), length)


def _window_ids(batches_xBxL: np.ndarray, length: int = 3) -> np.ndarray:
  return batches_xBxL[..., 0].reshape(-1) // length


@hypothesis.given(st.lists(st.text(max_size=17), max_size=7))
def test_pack_puts_a_separator_before_each_document(texts):
  tokens = windows.pack(texts, _BYTES)
  assert tokens.dtype == np.uint16
  assert tokens.tolist() == [i for text in texts for i in (256, *text.encode())]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_pack_never_wraps_ids(vocab_size, dtype):
  class Large(tokenizer.ByteTokenizer):
    separator_id = vocab_size - 1

  Large.vocab_size = vocab_size
  tokens = windows.pack(["a", "b"], Large())
  assert tokens.dtype == dtype
  assert tokens.tolist() == [vocab_size - 1, 97, vocab_size - 1, 98]


@hypothesis.given(st.integers(0, 61), st.integers(1, 13))
def test_windows_predict_every_token_at_most_once_and_overlap_by_one(num_tokens, length):
  view = windows.Windows(np.arange(num_tokens, dtype=np.uint16), length)
  rows = list(view)
  assert len(rows) == len(view)
  assert all(row.dtype == np.int32 and row.shape == (length + 1,) for row in rows)
  assert all(before[-1] == after[0] for before, after in itertools.pairwise(rows))
  targets = [token for row in rows for token in row[1:].tolist()]
  assert targets == list(range(1, 1 + len(targets)))
  assert max(0, num_tokens - 1) - len(targets) in range(length)  # less than a window is left over


def test_evenly_spaced():
  view = _windows(11)
  assert windows.evenly_spaced(view, 0).tolist() == [row.tolist() for row in view]
  assert windows.evenly_spaced(view, 11).tolist() == windows.evenly_spaced(view, 999).tolist() == [
    row.tolist() for row in view]
  some = windows.evenly_spaced(view, 3)
  assert some.dtype == np.int32 and some.shape == (3, 4)
  assert _window_ids(some).tolist() == [1, 5, 9]  # the middles of three equal parts
  assert windows.evenly_spaced(windows.Windows(np.zeros(0, np.uint16), 5), 3).shape == (0, 6)


@hypothesis.given(st.integers(1, 97), st.integers(1, 97))
def test_evenly_spaced_windows_are_distinct_and_in_order(total, count):
  ids = _window_ids(windows.evenly_spaced(_windows(total), count))
  assert len(ids) == min(total, count)
  assert (np.diff(ids) > 0).all()


def test_batches_are_the_windows():
  view = _windows(7)
  batch = batches.NodeBatches(view, 5, seed=0, path="world").batch(2)
  assert batch.dtype == np.int32 and batch.shape == (5, 4)
  assert all(row.tolist() == view[row[0] // 3].tolist() for row in batch)


@pytest.mark.parametrize("count", [3, 7, 53])  # less than a batch, a ragged epoch, many batches
def test_random_access_equals_sequential(count):
  sequential = batches.NodeBatches(_windows(count), 5, seed=3, path="world/code").batches(0, 11)
  anew = batches.NodeBatches(_windows(count), 5, seed=3, path="world/code")
  for step in (10, 0, 7, 7, 3, 1):
    assert anew.batch(step).tolist() == sequential[step].tolist()
  assert anew.batches(3, 5).tolist() == sequential[3:8].tolist()


def test_no_batches():
  none = batches.NodeBatches(_windows(7), 5, seed=0, path="world").batches(3, 0)
  assert none.dtype == np.int32 and none.shape == (0, 5, 4)


@pytest.mark.parametrize(("count", "batch_size"), [(35, 7), (7, 5), (3, 11)])
def test_each_epoch_covers_every_window_once_in_a_new_order(count, batch_size):
  # `batch_size` epochs fill `count` batches, whatever is left over in each of them.
  ids = _window_ids(batches.NodeBatches(_windows(count), batch_size, seed=1, path="world").batches(0, count))
  orders = ids.reshape(batch_size, count)
  assert (np.sort(orders, axis=1) == np.arange(count)).all()
  assert len(np.unique(orders, axis=0)) >= 3  # of three windows there are only six orders


def test_batches_depend_on_seed_and_path_alone():
  def ids(seed, path):
    return _window_ids(batches.NodeBatches(_windows(97), 5, seed, path).batches(0, 7)).tolist()

  first = ids(0, "world/a")
  other = [ids(0, "world/b"), ids(1, "world/a"), ids(0, "world")]
  assert ids(0, "world/a") == first  # whatever other nodes there are
  assert first not in other and len({tuple(o) for o in other}) == 3


def test_batches_of_no_windows():
  with pytest.raises(ValueError, match="world/a: windows=0: expected at least one; give the node more text"):
    batches.NodeBatches(_windows(0), 5, seed=0, path="world/a")


@pytest.fixture
def folder(tmp_path):
  for name, text in (("train", "one é two\n\nthree\n\nfour"), ("valid", "five six"), ("test", "seven eight")):
    (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
  return config.Files(str(tmp_path))


def test_text_of_a_node(folder):
  text = batches.load_node("world/a", folder, config.DataConfig(sequence_length=5), _BYTES)
  assert text.path == "world/a"
  assert text.train.tokens.tolist() == [256, *"one é two".encode(), 256, *b"three", 256, *b"four"]
  assert text.text_bytes == {"train": 19, "valid": 8, "test": 11}
  assert text.bytes_per_token == {"train": 19 / 22, "valid": 8 / 9, "test": 11 / 12}
  assert (len(text.train), len(text.valid), len(text.test)) == (21 // 5, 8 // 5, 11 // 5)


def test_max_train_bytes_cuts_train_alone(folder):
  data = config.DataConfig(sequence_length=5, max_train_bytes=17)
  text = batches.load_node("world/a", folder, data, _BYTES)
  assert text.text_bytes == {"train": 15, "valid": 8, "test": 11}


def test_digest_changes_with_text_and_tokenizer_only(folder, tmp_path):
  class Renamed(tokenizer.ByteTokenizer):
    name = "renamed"

  def digest(path="world/a", spec=_BYTES, **data):
    return batches.load_node(path, folder, config.DataConfig(**({"sequence_length": 5} | data)), spec).digest

  first = digest()
  assert len(first) == 16 and int(first, 16)
  assert digest("world/b") == digest(sequence_length=7) == first
  changed = [digest(spec=Renamed()), digest(max_train_bytes=17)]
  for name in documents.SPLITS:
    file = tmp_path / f"{name}.txt"
    file.write_text(file.read_text(encoding="utf-8") + "!", encoding="utf-8")
    changed.append(digest())
  assert len({first, *changed}) == 6


def test_split_shorter_than_a_window(folder, tmp_path):
  data = config.DataConfig(sequence_length=11)
  with pytest.raises(ValueError, match=r"world/a: config.data.sequence_length=11: expected at most 8, because "
                                       r".*valid.txt has 9 tokens and one window takes 12; set .* more text$"):
    batches.load_node("world/a", folder, data, _BYTES)
  batches.load_node("world/a", folder, dataclasses.replace(data, sequence_length=8), _BYTES)  # the limit it names
  with pytest.raises(ValueError, match=r"train.txt has 3 tokens .* more text \(config.data.max_train_bytes\)$"):
    batches.load_node("world/a", folder, config.DataConfig(sequence_length=5, max_train_bytes=2), _BYTES)


def test_unreadable_text_names_the_node(tmp_path):
  with pytest.raises(ValueError, match=r"^world/a: Files.path=.*expected an existing folder"):
    batches.load_node("world/a", config.Files(str(tmp_path / "no")), config.DataConfig(), _BYTES)


def test_load_all(folder):
  nodes = [("world/a", folder), ("world/b", config.StandardLibrary("prose/reference"))]
  texts = batches.load(nodes, config.DataConfig(sequence_length=5), _BYTES)
  assert list(texts) == ["world/a", "world/b"]
  assert [text.path for text in texts.values()] == list(texts)
  assert texts["world/a"].digest != texts["world/b"].digest
