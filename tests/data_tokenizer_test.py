"""Round trips of the tokenizers, and what files of the tokenizers library may ask for."""

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from worldlm_jax.data import tokenizer

_TEXT = "Länder, rivers and 城市; the same words again: rivers and Länder.\n  indented <|endoftext|> text"


def _byte_level(*special: str) -> tokenizers.Tokenizer:
  """A byte-level BPE tokenizer trained on `_TEXT`."""
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trained.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trained.train_from_iterator([_TEXT] * 3, tokenizers.trainers.BpeTrainer(
    vocab_size=283, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False))
  return trained


@pytest.fixture(params=["bytes", "hugging face"])
def any_tokenizer(request, tmp_path):
  if request.param == "bytes":
    return tokenizer.load("bytes")
  _byte_level("<|endoftext|>").save(str(tmp_path / "tokenizer.json"))
  return tokenizer.load(str(tmp_path / "tokenizer.json"))


@hypothesis.given(st.text())
def test_bytes_round_trip(text):
  bytes_ = tokenizer.ByteTokenizer()
  ids = bytes_.encode(text)
  assert ids.dtype == np.int32 and len(ids) == len(text.encode())
  assert bytes_.decode(ids) == text
  assert bytes_.decode([256, *ids.tolist(), 256, 300]) == text


def test_round_trip_without_separator(any_tokenizer):
  ids = any_tokenizer.encode(_TEXT)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert any_tokenizer.separator_id not in ids  # even where the text spells it out
  assert max(ids.max(), any_tokenizer.separator_id) < any_tokenizer.vocab_size
  assert any_tokenizer.decode([any_tokenizer.separator_id, *ids.tolist(), any_tokenizer.separator_id]) == _TEXT
  assert any_tokenizer.encode("").shape == (0,)
  assert any_tokenizer.decode([]) == any_tokenizer.decode(np.zeros(0, np.int32)) == ""


@pytest.mark.parametrize("texts", [[_TEXT, "", "one"], ["a"], []])
def test_pack_puts_a_separator_before_each_text(any_tokenizer, texts):
  tokens, starts = any_tokenizer.pack(texts)
  expected = [[any_tokenizer.separator_id, *any_tokenizer.encode(text).tolist()] for text in texts]
  assert tokens.tolist() == [i for part in expected for i in part]
  assert starts.tolist() == [sum(map(len, expected[:i])) for i in range(len(texts))]
  assert tokens.dtype == tokenizer.token_dtype(any_tokenizer) == np.uint16


@hypothesis.given(st.lists(st.text(max_size=17), max_size=7))
def test_bytes_pack_any_text(texts):
  tokens, starts = tokenizer.ByteTokenizer().pack(texts)
  assert tokens.tolist() == [i for text in texts for i in (256, *text.encode())]
  assert (tokens[starts] == 256).all() and len(starts) == len(texts)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_on_disk_never_wrap(vocab_size, dtype):
  class Sized(tokenizer.ByteTokenizer):
    pass

  Sized.vocab_size = vocab_size
  assert tokenizer.token_dtype(Sized()) == dtype


def test_broken_text_is_replaced():
  assert tokenizer.ByteTokenizer().decode([97, 0xFF, 98]) == "a\ufffdb"


@pytest.mark.parametrize("separator", ["<|endoftext|>", "</s>", "<eos>", "[SEP]", "<|end_of_text|>"])
def test_separator_and_vocab_size_include_added_tokens(tmp_path, separator):
  trained = _byte_level()
  before = trained.get_vocab_size()
  trained.add_special_tokens(["<pad>", separator, "<mask>"])
  trained.save(str(tmp_path / "t.json"))
  loaded = tokenizer.load(str(tmp_path / "t.json"))
  assert (loaded.separator_id, loaded.vocab_size) == (before + 1, before + 3)


def test_the_first_separator_of_the_list_is_taken(tmp_path):
  _byte_level("[SEP]", "</s>").save(str(tmp_path / "t.json"))
  assert tokenizer.load(str(tmp_path / "t.json")).separator_id == 1


def test_vocabulary_with_gaps(tmp_path):
  tokenizers.Tokenizer(tokenizers.models.BPE({"<eos>": 5, "w": 11}, [])).save(str(tmp_path / "t.json"))
  loaded = tokenizer.load(str(tmp_path / "t.json"))
  assert loaded.vocab_size == 12
  assert loaded.decode([5, 11, 5]) == "w"  # this separator is not marked as special in the file


def test_a_separator_that_a_text_can_spell_out_is_refused(tmp_path):
  trained = _byte_level()
  trained.add_tokens(["<|endoftext|>"])  # not as a special one
  trained.save(str(tmp_path / "t.json"))
  with pytest.raises(ValueError, match=r"config.data.tokenizer=.*'<|endoftext|>' to be a special token, but a text"):
    tokenizer.load(str(tmp_path / "t.json"))


def test_documents_stay_whole_whatever_the_file_asks_for(tmp_path):
  trained = _byte_level("</s>")
  plain = trained.encode(_TEXT, add_special_tokens=False).ids
  trained.enable_truncation(5)
  trained.enable_padding(length=997)
  trained.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", trained.token_to_id("</s>"))])
  trained.save(str(tmp_path / "t.json"))
  assert tokenizer.load(str(tmp_path / "t.json")).encode(_TEXT).tolist() == plain


def test_name_depends_on_content_not_on_folder(tmp_path):
  names = []
  for folder, special in (("a", "</s>"), ("b", "</s>"), ("c", "<eos>")):
    (tmp_path / folder).mkdir()
    _byte_level(special).save(str(tmp_path / folder / "t.json"))
    names.append(tokenizer.load(str(tmp_path / folder / "t.json")).name)
  assert names[0] == names[1] != names[2]
  assert names[0].startswith("t.json@")


def test_missing_file(tmp_path):
  with pytest.raises(ValueError, match=r"config.data.tokenizer='.*no.json': expected 'bytes' or the path .*; correct"):
    tokenizer.load(str(tmp_path / "no.json"))


def test_file_that_is_no_tokenizer(tmp_path):
  (tmp_path / "t.json").write_text("{]")
  with pytest.raises(ValueError, match=r"t.json': expected a JSON file of the tokenizers library .*; save it with"):
    tokenizer.load(str(tmp_path / "t.json"))


def test_no_separator(tmp_path):
  _byte_level("<pad>").save(str(tmp_path / "t.json"))
  with pytest.raises(ValueError, match=r"expected a token that separates .*<\|endoftext\|>, </s>, <eos>.*; add one"):
    tokenizer.load(str(tmp_path / "t.json"))
