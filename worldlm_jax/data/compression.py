"""What a general compressor makes of a node's text: a yardstick for bits per byte that needs no model.

It has seen the training text before, as a model has: what counts is by how much the compressed text grows
when the test text is added. Both are bounded, by taking documents spread over the text, so that a node
takes about a second.
"""

import contextlib
import json
import lzma
import os
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path

from worldlm_jax.data import cache, writing
from worldlm_jax.data.tokenizer import Tokenizer

NAME = "xz"
VERSION = 1  # of what is computed
TRAIN_BYTES = 1 << 20
TEST_BYTES = 1 << 19


def references(
  texts: Mapping[str, cache.Text], tokenizer: Tokenizer, report: Callable[[str], None]
) -> dict[str, float]:
  """Bits per byte that the compressor reaches on each test text, by path; kept in the cache beside the text.

  A text that the tokenizer does not give back is left out. `report` is told when something has to be computed.
  """
  places = {text.place: text for text in texts.values() if text.lossless}
  found = {place: _recorded(place) for place in places}
  if missing := [place for place, value in found.items() if value is None]:
    report(f"compressing a sample of {len(missing)} text(s), to compare with")
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # the compressor lets go of Python's lock
      found |= zip(missing, pool.map(lambda place: _measure(places[place], tokenizer), missing), strict=True)
  values = {path: found.get(text.place) for path, text in texts.items()}
  return {path: value for path, value in values.items() if value is not None}


def _recorded(place: Path) -> float | None:
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
    record = json.loads((place / "compressor.json").read_text(encoding="utf-8"))
    if record["version"] == VERSION:
      return float(record["bits_per_byte"])
  return None


def _measure(text: cache.Text, tokenizer: Tokenizer) -> float:
  seen = _sample(text.splits["train"], tokenizer, TRAIN_BYTES)
  test = _sample(text.splits["test"], tokenizer, TEST_BYTES)
  before, after = b"".join(b"\n" + part for part in seen), b"".join(b"\n" + part for part in test)
  # As for a model, separators have to be predicted and do not count as text.
  value = 8 * (_size(before + after) - _size(before)) / sum(map(len, test))
  partial = text.place / f"compressor.{os.getpid()}.new"
  with contextlib.suppress(OSError):  # a cache that can only be read still serves
    writing.write_synced(partial, json.dumps({"version": VERSION, "bits_per_byte": value}).encode())
    partial.replace(text.place / "compressor.json")
  return value


def _sample(split: cache.Split, tokenizer: Tokenizer, most: int) -> list[bytes]:
  """Documents spread evenly over a split, as UTF-8; at most `most` bytes in all."""
  step = -(-split.counts.text_bytes // most)
  found, left = [], most
  for i in range(0, len(split.starts), step):
    begin = int(split.starts[i]) + 1
    end = int(split.starts[i + 1]) if i + 1 < len(split.starts) else len(split.tokens)
    content = tokenizer.decode(split.tokens[begin : min(end, begin + left)]).encode()[:left]
    found.append(content)
    left -= len(content)
    if not left:
      break
  return found


def _size(content: bytes) -> int:
  # A window of the content's own size finds as much as the preset's 64 MB, and takes a fraction of the memory.
  chain = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(4096, len(content))}]
  return len(lzma.compress(content, lzma.FORMAT_RAW, filters=chain))
