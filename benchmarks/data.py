"""How fast texts are read and tokenised, and that their size costs no memory.

  python -m benchmarks.data speed [--megabytes=64] [--text=FOLDER] [--repeats=3]    MB/s and ratios
  python -m benchmarks.data memory [--gigabytes=10]    peak memory of a run on 10 MB and on 10 GB

Rates are of UTF-8 text. Reading any format is held against a plain read of the .txt file, the cache of tokens against
the tokenizer alone, in turn. `speed` needs about eight times its text in free disk space, `memory` about three times.
"""

import functools
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from array_record.python import array_record_module

from benchmarks import measuring
from worldlm_jax import config
from worldlm_jax.data import cache, files, synthetic, tokenizer

# A child process that trains three rounds on one node and prints its peak memory, file pages left out.
_RUN = """
import sys, threading, time
from worldlm_jax import config as c, model, train
peak = [0]
def watch():
  while True:
    for line in open("/proc/self/status"):
      if line.startswith("RssAnon"):
        peak[0] = max(peak[0], int(line.split()[1]))
    time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
node = c.Node("world", c.Files(sys.argv[1]))
config = c.Config(
  rounds=3, federation=c.FederationConfig(root=node), node=c.NodeSettings(local_steps=25),
  model=model.PRESETS["tiny"](), data=c.DataConfig(cache=sys.argv[2]),
  evaluation=c.EvaluationConfig(valid_windows=32, test_windows=256),
)
begin = time.perf_counter()
summary = train.run(config, sys.argv[3])
share = summary["waiting_for_data_share"]
print(f"{peak[0] / 1024:.0f} {time.perf_counter() - begin:.0f} {share}")
"""


def documents(megabytes: float, text: str) -> list[str]:
  """Documents of that much text: of a folder of .txt files, over and over, or of an artificial language."""
  wanted, found, size = int(megabytes * 1e6), [], 0
  while size < wanted:
    for document in _endless(text):
      found.append(document)
      size += len(document.encode())
      if size >= wanted:
        break
  return found


def _endless(text: str) -> Iterator[str]:
  if text:
    for file in sorted(Path(text).rglob("train.txt")):
      read = files.open_files(config.Files(str(file)), "error")
      yield from (document.text for document in read.documents())
  else:
    source = config.Synthetic("a/b", train_bytes=2**40)
    yield from (document.text for document in synthetic.open_language(source).documents())


def write_formats(texts: list[str], folder: Path) -> list[Path]:
  """The same documents in every format that `Files` reads."""
  lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
  paths = [folder / f"texts{suffix}" for suffix in files.SUFFIXES if suffix != ".json.gz"]
  for path in paths:
    if path.name.endswith(".txt"):
      path.write_text("\n\n".join(texts), encoding="utf-8")
    elif path.name.endswith(".gz"):
      path.write_bytes(gzip.compress(lines, 6))
    elif path.name.endswith(".zst"):
      path.write_bytes(pa.Codec("zstd").compress(lines, asbytes=True))
    elif path.name.endswith(".jsonl"):
      path.write_bytes(lines)
    elif path.name.endswith(".parquet"):
      pq.write_table(pa.table({"text": texts}), path)
    else:
      writer = array_record_module.ArrayRecordWriter(str(path), "group_size:64")
      for text in texts:
        writer.write(text.encode())
      writer.close()
  return paths


def speed(megabytes: float, text: str, repeats: int) -> list[measuring.Table]:
  """Prints both tables."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    texts = documents(megabytes, text)
    size = sum(len(t.encode()) for t in texts) / 1e6
    where = f"{size:.0f} MB in {len(texts):,} documents of {text or 'an artificial language'}"
    paths = write_formats(texts, folder)
    readers: dict[str, Callable[[], Any]] = {"plain read of the .txt file": lambda: _plain_read(paths[0])}
    readers |= {"".join(path.suffixes): functools.partial(_read, path) for path in paths}
    reading = measuring.Table(f"Reading {where}", {"format": "reading", "rate": "MB/s of text", "ratio":
                                                   "against a plain read of the .txt file"})
    seconds = measuring.interleaved(readers, repeats)
    for format_, taken in seconds.items():
      reading.add({"format": format_, "rate": _rate(size, taken),
                   "ratio": measuring.ratios(next(iter(seconds.values())), taken)})
    tokenising = measuring.Table(f"Tokenising {where}", {
      "tokenizer": "tokenizer", "alone": "tokenizer alone, MB/s", "fresh": "into the cache, MB/s",
      "ratio": "against the tokenizer alone", "cached": "from the cache, MB/s"})
    for spec in (tokenizer.ByteTokenizer(), _train_bpe(texts, folder / "bpe.json")):
      data = config.DataConfig(cache=str(folder / "cache" / spec.name.partition("@")[0]))
      fill = functools.partial(_fill, spec, paths[0], data)
      rates = measuring.interleaved({
        "alone": functools.partial(_pack, spec, texts), "fresh": functools.partial(_fill_anew, fill, data.cache),
      }, repeats)
      rates |= measuring.interleaved({"cached": fill}, repeats)
      tokenising.add({
        "tokenizer": f"{spec.name.partition('@')[0]} ({spec.vocab_size})",
        "ratio": measuring.ratios(rates["alone"], rates["fresh"]),
        **{name: _rate(size, values) for name, values in rates.items()},
      })
  return [reading, tokenising]


def _rate(megabytes: float, seconds: list[float]) -> float:
  return megabytes / measuring.spread(seconds).median


def _fill_anew(fill: Callable[[], None], folder: str) -> None:
  shutil.rmtree(folder, ignore_errors=True)
  fill()


def _plain_read(path: Path) -> None:
  """The least that it takes to have text: reading and decoding."""
  with path.open(encoding="utf-8", newline="") as file:
    while file.read(1 << 20):
      pass


def _read(path: Path) -> int:
  return sum(1 for _ in files.open_files(config.Files(str(path)), "error").documents())


def _pack(spec: tokenizer.Tokenizer, texts: list[str]) -> None:
  for start in range(0, len(texts), 1000):
    spec.pack(texts[start : start + 1000])


def _fill(spec: tokenizer.Tokenizer, path: Path, data: config.DataConfig) -> None:
  cache.load([("world", config.Files(str(path)))], data, spec, lambda line: None)


def _train_bpe(texts: list[str], out: Path) -> tokenizer.Tokenizer:
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trained.train_from_iterator(texts[:5000], tokenizers.trainers.BpeTrainer(
    vocab_size=4096, special_tokens=[tokenizer.SEPARATORS[0]], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  trained.save(str(out))
  return tokenizer.load(str(out))


def memory(gigabytes: float) -> list[measuring.Table]:
  """Runs the same training on 10 MB and on `gigabytes` of text, each in a process of its own."""
  table = measuring.Table("Memory of a run", {
    "megabytes": "text, MB", "peak_mb": "peak memory, MB", "ratio": "against the smaller text",
    "seconds": "whole run, s", "waiting_share": "share of time waiting for data"})
  for size in (0.01, gigabytes):
    with tempfile.TemporaryDirectory() as name:
      folder = Path(name)
      written = _write_text(folder / "texts.txt", size * 1e9)
      command = [sys.executable, "-c", _RUN, str(folder / "texts.txt"), str(folder / "cache"), str(folder / "run")]
      found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
      peak, seconds, share = map(float, found)
      least = table.rows[0]["peak_mb"] if table.rows else peak
      table.add({"megabytes": written / 1e6, "peak_mb": peak, "ratio": peak / least, "seconds": seconds,
                 "waiting_share": share})
  return [table]


def _write_text(path: Path, size: float) -> int:
  """About `size` bytes of distinct documents: numbered repetitions of 20 MB of an artificial language."""
  texts = documents(min(size, 20e6) / 1e6, "")
  written, number = 0, 0
  with path.open("w", encoding="utf-8") as file:
    while written < size:
      part = "".join(f"{number + i} {text}\n\n" for i, text in enumerate(texts))
      file.write(part)
      number += len(texts)
      written += len(part.encode())
  return written


def main(argv: Sequence[str] | None = None) -> list[measuring.Table]:
  """Prints the tables."""
  parser = measuring.parser(__doc__)
  parser.add_argument("what", choices=["speed", "memory"])
  parser.add_argument("--megabytes", type=float, default=64)
  parser.add_argument("--gigabytes", type=float, default=10)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--text", default="", help="a folder tree with train.txt files")
  args = measuring.parse(parser, argv)
  if args.what == "speed":
    tables = speed(args.megabytes, args.text, args.repeats)
  else:
    tables = memory(args.gigabytes)
  measuring.finish(args, tables)
  return tables


if __name__ == "__main__":
  main()
