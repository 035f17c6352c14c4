"""Tokenizers as Hugging Face's `AutoTokenizer` loads them, with the very ids that they have here."""

import json
from pathlib import Path

import tokenizers

from worldlm_jax.data.tokenizer import SEPARATORS, ByteTokenizer, HuggingFaceTokenizer, Tokenizer

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"


def write(folder: Path, tokenizer: Tokenizer, model_max_length: int) -> None:
  """Writes the tokenizer's files into a folder that exists.

  A text has the same ids as here, unless it spells the separator out: `AutoTokenizer` then takes it for the separator,
  if it is not told `split_special_tokens=True`. None is put before a text.
  """
  as_file = byte_tokenizer() if isinstance(tokenizer, ByteTokenizer) else _as_read(tokenizer)
  as_file.save(str(folder / FILE))
  separator = as_file.id_to_token(tokenizer.separator_id)
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": separator, "eos_token": separator,
    "model_max_length": model_max_length, "clean_up_tokenization_spaces": False,
  }
  (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def byte_tokenizer() -> tokenizers.Tokenizer:
  """`ByteTokenizer` in terms of the library: a vocabulary of single bytes, and no merges."""
  vocabulary = {character: byte for byte, character in enumerate(_characters())}
  found = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  found.decoder = tokenizers.decoders.ByteLevel()
  found.add_special_tokens([tokenizers.AddedToken(SEPARATORS[0], special=True)])
  assert found.token_to_id(SEPARATORS[0]) == ByteTokenizer.separator_id
  return found


def _as_read(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
  """A copy of a file's tokenizer that puts nothing before or after a text, since ours does not."""
  assert isinstance(tokenizer, HuggingFaceTokenizer)
  content = json.loads(tokenizer.to_json())
  return tokenizers.Tokenizer.from_str(json.dumps(content | {"post_processor": _without_template(content)}))


def _without_template(content: dict) -> dict | None:
  processor = content.get("post_processor")
  return processor if processor and processor["type"] == "ByteLevel" else None  # that one adds no tokens


def _characters() -> list[str]:
  """By byte, the character by which the library's byte level writes it: itself where it can be seen."""
  seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  others = iter(range(256, 512))
  return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]
