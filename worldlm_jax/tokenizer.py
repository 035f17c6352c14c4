"""Trains a byte-level BPE tokenizer on the training text of a federation, or of a part of it.

  python -m worldlm_jax.tokenizer --config=configs/quickstart.py --vocab_size=2048 --out=runs/bpe.json
  python -m worldlm_jax.tokenizer --config=configs/folder.py --config.federation.folder=PATH --federation=law \\
      --max_bytes_per_node=10000000 --out=law.json

A run then takes it with --config.data.tokenizer=FILE. All nodes of a run share one tokenizer, since they
share the embedding; bits per byte compare across tokenizers.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tokenizers
from absl import flags

from worldlm_jax import checks, command, config as config_lib, experiment, federation as federation_lib, metrics
from worldlm_jax.data import cache, tokenizer as tokenizer_lib

SEPARATOR = tokenizer_lib.SEPARATORS[0]
SMALLEST = 257  # every byte, and the separator
TABLE_BYTES = 1_000_000  # of valid text per node that the table is made from

_OUT = flags.DEFINE_string("out", None, "The JSON file to write.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Size of the vocabulary, the separator included.")
_FEDERATION = flags.DEFINE_string("federation", federation_lib.ROOT, "Only this node and what is below it.")
_MAX_BYTES = flags.DEFINE_integer(
  "max_bytes_per_node", 0, "Use a sample of each node's text, at most so large, so that none outweighs others; 0: all."
)


def train(
  config: config_lib.Config, out: Path, vocab_size: int, path: str = federation_lib.ROOT, max_bytes_per_node: int = 0
) -> dict[str, float]:
  """Trains a tokenizer on the training documents of the subtree at `path` and writes it to `out`.

  Returns:
    Bytes per token of each node of the whole tree that has text, on its valid split.

  Raises:
    ValueError: bad input; nothing has been written.
  """
  checks.require(vocab_size >= SMALLEST, "--vocab_size", vocab_size, f"at least {SMALLEST}: every byte and a separator")
  checks.require(max_bytes_per_node >= 0, "--max_bytes_per_node", max_bytes_per_node, "at least 0")
  federation = federation_lib.resolve(config)
  checks.one_of("--federation", path, [member.path for member in federation.members])
  metrics.check_writable("--out", out)
  partial = out.with_name(out.name + ".new")
  try:
    return _train(config, federation, out, partial, vocab_size, path, max_bytes_per_node)
  finally:
    partial.unlink(missing_ok=True)


def _train(
  config: config_lib.Config, federation: federation_lib.Federation, out: Path, partial: Path, vocab_size: int,
  path: str, max_bytes_per_node: int,
) -> dict[str, float]:
  members = [member for member in federation.members if member.data is not None]
  sources = [(member.path, member.data) for member in members if member.data is not None]
  # The cache gives every node the documents that it will train on, or a sample of them, as bytes.
  limits = {
    member.path: min(filter(None, (member.settings.max_train_bytes, max_bytes_per_node)), default=0)
    for member in members
  }
  data = config_lib.DataConfig(invalid_utf8=config.data.invalid_utf8, cache=config.data.cache)
  texts = cache.load(sources, data, tokenizer_lib.ByteTokenizer(), print, limits)
  used = [texts[member.path] for member in federation.subtree(path) if member.path in texts]
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trained.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=[SEPARATOR], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  trained.train_from_iterator((document for text in used for document in _documents(text.splits["train"])), trainer)
  trained.save(str(partial))
  os.replace(partial, out)
  return bytes_per_token(tokenizer_lib.load(str(out)), texts)


def bytes_per_token(tokenizer: tokenizer_lib.Tokenizer, texts: Mapping[str, cache.Text]) -> dict[str, float]:
  """By node: bytes of valid text per token, separators not counted on either side."""
  found = {}
  for path, text in texts.items():
    documents = list(_documents(text.splits["valid"], TABLE_BYTES))
    tokens, _ = tokenizer.pack(documents)
    found[path] = sum(len(document.encode()) for document in documents) / (len(tokens) - len(documents))
  return found


def main(_: list[str]) -> int:
  """Trains the tokenizer of the flags and returns the exit code."""
  try:
    out = Path(str(_OUT.value)).expanduser()
    table = train(experiment.configured(), out, _VOCAB_SIZE.value, _FEDERATION.value, _MAX_BYTES.value)
  except (checks.InputError, OSError) as error:
    return command.failed(error)
  size = tokenizer_lib.load(str(out)).vocab_size
  print(f"{out}: {size} tokens" + ("; the text has no more than that to merge" if size < _VOCAB_SIZE.value else ""))
  print(f"{'node':<32} bytes per token")
  for path, value in table.items():
    print(f"{path:<32} {value:15.3f}")
  return command.OK


def _documents(split: cache.Split, max_bytes: int = 0) -> Iterator[str]:
  """The documents of a split of bytes, whole ones, until `max_bytes` are reached; 0 means all."""
  taken = 0
  for i, start in enumerate(split.starts):
    end = split.starts[i + 1] if i + 1 < len(split.starts) else len(split.tokens)
    content = split.tokens[int(start) + 1 : int(end)].astype(np.uint8).tobytes()
    yield content.decode()
    taken += len(content)
    if max_bytes and taken >= max_bytes:
      return


if __name__ == "__main__":
  command.start(main, experiment.Flags("out"))
