"""Tokenizers: bytes, or a JSON file of the Hugging Face `tokenizers` library."""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from worldlm_jax import checks

SEPARATORS = ("<|endoftext|>", "</s>", "<eos>", "[SEP]", "<|end_of_text|>")  # looked for in this order


class Tokenizer(Protocol):
  """Text to ids and back. Ids are below `vocab_size`; `separator_id` stands between documents."""

  name: str  # tells tokenizers apart, wherever their files lie
  vocab_size: int
  separator_id: int

  def encode(self, text: str) -> np.ndarray:
    """The ids of `text` (int32 [tokens]), without any separator or other special token."""

  def pack(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts, a separator before each, and where the separators stand.

    Returns `token_dtype` [tokens] and int64 [texts].
    """

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of `ids`, without separators. Ids that form no text give replacement characters."""


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
  """The smallest type of ids on disk: uint16, or uint32 for a vocabulary of more than 65,536."""
  return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


class ByteTokenizer:
  """UTF-8 bytes as ids 0 to 255, and the separator 256."""

  name = "bytes"
  vocab_size = 257
  separator_id = 256

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def pack(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [text.encode() for text in texts]
    starts = _starts([len(part) for part in encoded])
    tokens = np.frombuffer(b"".join(b"\0" + part for part in encoded), np.uint8).astype(np.uint16)
    tokens[starts] = self.separator_id
    return tokens, starts

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    values = np.asarray(ids, np.int64)
    # No text for the separator, nor for the ids that a model with a rounded-up vocabulary may draw.
    return values[values < 256].astype(np.uint8).tobytes().decode(errors="replace")


class HuggingFaceTokenizer:
  """A tokenizer saved by the `tokenizers` library (a tokenizer.json of the Hugging Face hub).

  Raises:
    ValueError: the file cannot be read as a tokenizer, or has none of `SEPARATORS`.
  """

  def __init__(self, path: str):
    import tokenizers  # only those who use it wait for it

    self._path = path
    with self._explained():
      content = Path(path).expanduser().read_bytes()
      self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
    # A file may ask for truncation, padding or special tokens found in the text; documents must stay whole.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    separator = next((token for token in SEPARATORS if token in vocabulary), None)
    if separator is None:
      raise checks.InputError(f"config.data.tokenizer={path!r}: expected a token that separates documents, one of "
                       f"{', '.join(SEPARATORS)}; add one with tokenizers.Tokenizer.add_special_tokens")
    self.name = f"{Path(path).name}@{hashlib.sha256(content).hexdigest()[:8]}"
    self.vocab_size = max(vocabulary.values()) + 1  # ids need not be consecutive
    self.separator_id = vocabulary[separator]
    checks.require(self.vocab_size < 2**31, "config.data.tokenizer", path, f"ids below 2^31, not {self.vocab_size - 1}")
    checks.require(self.separator_id not in self.encode(separator), "config.data.tokenizer", path,
                   f"{separator!r} to be a special token, but a text that spells it out contains it too",
                   "add it with tokenizers.Tokenizer.add_special_tokens")

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    """What the library makes of a bad file, at once or with some text, is an `InputError` that names the file."""
    try:
      yield
    except BaseException as error:  # it raises bare Exceptions; and where it panics, what is none
      if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise
      raise checks.InputError(
        f"config.data.tokenizer={self._path!r}: expected a JSON file of the tokenizers library ({error}); save it with "
        "tokenizers.Tokenizer.save, or set config.data.tokenizer=bytes"
      ) from error

  def to_json(self) -> str:
    """The library's own description of it."""
    return str(self._tokenizer.to_str())

  def encode(self, text: str) -> np.ndarray:
    with self._explained():
      ids = self._tokenizer.encode(text, add_special_tokens=False).ids
    return np.asarray(ids, np.int32)

  def pack(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    with self._explained():  # the library spreads a batch over all cores
      ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    separated = itertools.chain.from_iterable((self.separator_id, *part) for part in ids)
    starts = _starts([len(part) for part in ids])
    return np.fromiter(separated, token_dtype(self), sum(map(len, ids)) + len(ids)), starts

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    with self._explained():
      text = self._tokenizer.decode([int(i) for i in ids if i != self.separator_id])
    return text


def _starts(lengths: Sequence[int]) -> np.ndarray:
  """Where the separators stand before texts of so many tokens."""
  return np.cumsum([0, *(length + 1 for length in lengths)], dtype=np.int64)[:-1]


def load(spec: str) -> Tokenizer:
  """The tokenizer that `config.data.tokenizer` names: "bytes", the path of a JSON file, or a folder that has one.

  Raises:
    ValueError: the file is missing, is no tokenizer, or has no token that separates documents.
  """
  return ByteTokenizer() if (path := file(spec)) is None else HuggingFaceTokenizer(str(path))


def file(spec: str) -> Path | None:
  """The file that `config.data.tokenizer` leads to; None for "bytes". Raises `ValueError` where there is none."""
  if spec == "bytes":
    return None
  path = Path(spec).expanduser()
  path = path / "tokenizer.json" if path.is_dir() else path  # as Hugging Face keeps it beside a model
  checks.require(path.is_file(), "config.data.tokenizer", spec, "'bytes' or the path of a tokenizers JSON file",
                 "correct the path, or set it to bytes")
  return path
