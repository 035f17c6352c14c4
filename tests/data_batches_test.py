"""Laws of packing, windows and batches, and the text of a node."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from worldlm_jax import config
from worldlm_jax.data import batches, documents, evaluation, tokenizer, windows

_BYTES = tokenizer.ByteTokenizer()


def _windows(count: int, length: int = 3) -> windows.Windows:
  """Windows over the stream 0, 1, 2, ..., so that a window's first token tells which window it is."""
  return windows.Windows(np.arange(count * length + 1, dtype=np.uint16), length)


def _window_ids(batches_xBxL: np.ndarray, length: int = 3) -> np.ndarray:
  return batches_xBxL[..., 0].reshape(-1) // length


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
  assert windows.evenly_spaced(view, 0).tolist() == list(range(11))
  assert windows.evenly_spaced(view, 11).tolist() == windows.evenly_spaced(view, 999).tolist() == list(range(11))
  assert windows.evenly_spaced(view, 3).tolist() == [1, 5, 9]  # the middles of three equal parts
  assert windows.evenly_spaced(windows.Windows(np.zeros(0, np.uint16), 5), 3).shape == (0,)


@hypothesis.given(st.integers(1, 97), st.integers(1, 97))
def test_evenly_spaced_windows_are_distinct_and_in_order(total, count):
  numbers = windows.evenly_spaced(_windows(total), count)
  assert len(numbers) == min(total, count)
  assert (np.diff(numbers) > 0).all()


@hypothesis.given(st.lists(st.integers(1, 23), min_size=1, max_size=7), st.integers(1, 7))
def test_windows_of_single_documents_predict_every_token_once_and_never_look_across(sizes, length):
  starts = np.cumsum([0, *(size + 1 for size in sizes)])[:-1].astype(np.uint64)
  tokens = np.arange(sum(sizes) + len(sizes), dtype=np.uint16)  # a token tells its place
  view = windows.Windows(tokens, length, starts)
  rows = [view[i] for i in range(len(view))]
  targets = []
  for i, row in enumerate(rows):
    count = view.num_targets(i)
    assert row.dtype == np.int32 and row.shape == (length + 1,)
    assert 1 <= count == np.count_nonzero(row[1:] != windows.PADDING)
    assert (row[count + 1 :] == windows.PADDING).all()  # padding comes last
    document = np.searchsorted(starts, row[0], side="right")
    # Its last target may be the separator after the document, and nothing beyond it.
    assert row[: count + 1].tolist() == list(range(row[0], row[0] + count + 1))
    assert document == len(starts) or row[count] <= starts[document]
    targets += row[1 : count + 1].tolist()
  assert targets == list(range(1, len(tokens)))


def test_windows_of_documents_beyond_the_last_are_refused():
  view = windows.Windows(np.arange(9, dtype=np.uint16), 3, np.array([0, 5], np.uint64))
  assert len(view) == 3
  with pytest.raises(IndexError, match="window 3 of 3"):
    view[3]


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


def test_a_pool_takes_its_parts_windows_round_by_round_and_evenly_mixed():
  other = windows.Windows(np.arange(100, 100 + 5 * 3 + 1, dtype=np.uint16), 3)
  parts = [(batches.NodeBatches(_windows(7), 2, 0, "a"), 3), (batches.NodeBatches(other, 3, 0, "b"), 1)]
  pool = batches.PooledBatches(parts, 4)  # 9 windows a round: two batches and one window
  for index in (0, 2):
    found = pool.batches(3 * index, 3)
    assert found.shape == (3, 4, 4)
    own = [part.batches(index * steps, steps).reshape(-1, 4) for part, steps in parts]
    rows = found.reshape(-1, 4)
    assert sorted(map(tuple, rows[:9])) == sorted(map(tuple, np.concatenate(own)))
    assert np.all(rows[9:] == windows.PADDING)
    assert rows[:9][rows[:9, 0] < 100].tolist() == own[0].tolist()  # in the node's own order
    assert {tuple(row) for row in rows[:4]} & {tuple(row) for row in own[1]}  # both nodes in the first batch


def test_batches_of_no_windows():
  with pytest.raises(ValueError, match="world/a: windows=0: expected at least one; give the node more text"):
    batches.NodeBatches(_windows(0), 5, seed=0, path="world/a")


@pytest.fixture
def folder(tmp_path):
  for name, text in (("train", "one é two\n\nthree\n\nfour"), ("valid", "five six"), ("test", "seven eight")):
    (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
  return config.Files(str(tmp_path))


def _load(source, spec=_BYTES, path="world/a", limit=0, **data):
  made = config.DataConfig(**({"sequence_length": 5} | data))
  return batches.load([(path, source)], made, spec, max_train_bytes={path: limit})[path]


def test_text_of_a_node(folder):
  text = _load(folder)
  assert text.path == "world/a"
  assert text.train.tokens.tolist() == [256, *"one é two".encode(), 256, *b"three", 256, *b"four"]
  assert [text.bytes_per_token(split) for split in documents.SPLITS] == [19 / 22, 8 / 9, 11 / 12]
  assert (len(text.train), len(text.valid), len(text.test)) == (21 // 5, 8 // 5, 11 // 5)


def test_packing_by_documents(folder):
  text = _load(folder, packing="documents")
  found = [text.train[i].tolist() for i in range(len(text.train))]
  assert found == [
    [256, *"one é".encode()[:5]], ["one é".encode()[4], *"é two".encode()[1:6]], [111, 256, -1, -1, -1, -1],
    [256, *b"three"], [101, 256, -1, -1, -1, -1], [256, *b"four", -1],
  ]
  assert _load(folder, packing="documents", sequence_length=99).train[2].tolist()[:6] == [256, *b"four", -1]
  assert text.digest == _load(folder).digest


def test_max_train_bytes_cuts_train_alone(folder, tmp_path):
  cut = _load(folder, limit=17)
  sizes = [cut.text.splits[split].counts.text_bytes for split in documents.SPLITS]
  assert 0 < sizes[0] <= 17 and sizes[1:] == [8, 11]
  # A document that is longer by itself is cut between two characters.
  (tmp_path / "train.txt").write_text("aé" * 9, encoding="utf-8")
  assert _load(folder, limit=8).train.tokens.tolist() == [256, *"aéaéa".encode()[:7]]


def test_digest_changes_with_text_and_tokenizer_only(folder, tmp_path):
  class Renamed(tokenizer.ByteTokenizer):
    name = "renamed"

  first = _load(folder).digest
  assert len(first) == 16 and int(first, 16)
  assert _load(folder, path="world/b").digest == _load(folder, sequence_length=7).digest == first
  changed = [_load(folder, Renamed()).digest, _load(folder, limit=17).digest]
  for name in documents.SPLITS:
    file = tmp_path / f"{name}.txt"
    file.write_text(file.read_text(encoding="utf-8") + "!", encoding="utf-8")
    changed.append(_load(folder).digest)
  assert len({first, *changed}) == 6


def test_split_shorter_than_a_window(folder):
  with pytest.raises(ValueError, match=r"world/a: config.data.sequence_length=11: expected at most 8, because "
                                       r"the valid split has 9 tokens and one window takes 12; set .* more text$"):
    _load(folder, sequence_length=11)
  _load(folder, sequence_length=8)  # the limit it names
  with pytest.raises(ValueError, match=r"train split has 3 .* more text \(--node=world/a.max_train_bytes=...\)$"):
    _load(folder, limit=2)


def test_load_all(folder):
  nodes = [("world/a", folder), ("world/b", config.StandardLibrary("prose/reference"))]
  texts = batches.load(nodes, config.DataConfig(sequence_length=5), _BYTES)
  assert list(texts) == ["world/a", "world/b"]
  assert [text.path for text in texts.values()] == list(texts)
  assert texts["world/a"].digest != texts["world/b"].digest


def test_adding_a_node_changes_no_other_nodes_batches(tmp_path):
  """Law 2, from the documents to the batches, with nodes that choose among the same documents."""
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "all.txt").write_text("\n\n".join(f"document {i} of {name}" for i in range(199)))
  a, b = (config.Files(str(tmp_path / name)) for name in ("a", "b"))
  crossed = config.Swapped(a, b, 0.5)

  def stream(cache, *nodes):
    data = config.DataConfig(sequence_length=7, cache=str(tmp_path / cache))
    text = batches.load([*nodes, ("x", crossed)], data, _BYTES)["x"]
    return batches.NodeBatches(text.train, 5, seed=0, path="x").batches(0, 11).tolist()

  alone = stream("alone")
  assert alone == stream("before", ("b", b), ("a", a)) == stream("after", ("y", config.Swapped(b, a, 0.5)))


def test_evaluation_windows_are_those_of_the_text(folder):
  text, by_documents = _load(folder), _load(folder, packing="documents")
  level = evaluation.Evaluation([text.train, None, by_documents.train], 3, 6)
  assert level.counts.tolist() == [3, 0, 3]
  assert [level.num_targets(i) for i in range(3)] == [15, 0, sum(by_documents.train.num_targets(i) for i in (1, 3, 5))]
  arrays, counts = level.arrays()
  assert arrays.shape == (3, 3, 6) and arrays.dtype == np.int32 and counts.tolist() == [3, 0, 3]
  assert arrays[0].tolist() == [text.train[i].tolist() for i in windows.evenly_spaced(text.train, 3)]
  assert not arrays[1].any()
  # In pieces, as scoring asks for them; row 3 is a ghost.
  piece = level.take(np.array([0, 3, 2]), 2, np.array([1, 0, 1]), 2)
  assert piece[0].tolist() == [arrays[0, 2].tolist(), [0] * 6] and not piece[1].any()
  assert piece[2, 0].tolist() == arrays[2, 2].tolist()


def test_evaluation_without_any_text():
  arrays, counts = evaluation.Evaluation([None, None], 3, 6).arrays()
  assert arrays.shape == (2, 1, 6) and not counts.any()
