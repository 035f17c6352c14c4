"""Prepares The Pile or mC4, once, as a folder tree of ArrayRecord files: a folder per node, a record per document.

  python -m worldlm_jax.prepare --corpus=pile --out=data/pile --max_bytes_per_node=1_000_000_000
  python -m worldlm_jax.prepare --corpus=mc4 --out=data/mc4 --nodes=.,romance,bantu --max_bytes_per_node=100_000_000

Each input file of the corpus becomes files such as legal/freelaw/train-00007.array_record, and one line of
.prepare/manifest.jsonl with their checksums. The same command again goes on: it checks what is there and does what
is missing or damaged. `--source` may be a local folder laid out like the corpus (see worldlm_jax/data/natural.py).
What is complete is kept, however the command ends.
"""

import collections
import contextlib
import dataclasses
import datetime
import errno
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
from absl import flags
from rich.console import Console
from rich.text import Text

from worldlm_jax import checks, command, metrics
from worldlm_jax.data import files, natural, shards
from worldlm_jax.data.documents import SPLITS
from worldlm_jax.progress import SECONDS_BETWEEN_PLAIN_LINES

WAITS_SECONDS = (5, 30, 120)  # before a remote file that could not be read is tried again
EVALUATION_SHARE = 20  # valid and test text are each limited to a 20th of what train text is
USUAL_RATIO = 3.0  # bytes of text per byte of a compressed input file, until it has been measured


class Interrupted(Exception):
  """SIGINT came; what is complete is kept."""


def prepare(corpus: str, out: str, source: str = "", max_bytes_per_node: int = 0, nodes: Sequence[str] = ()) -> str:
  """Does what the command does.

  Args:
    corpus: a name of `natural.RECIPES`.
    out: the folder to write: new, empty, or left by an earlier call with the same arguments.
    source: a local folder or an address for fsspec; "" for the recipe's own.
    max_bytes_per_node: of train text in UTF-8; 0 for no limit. The document that reaches it is the last.
    nodes: which to prepare, with those below them; none for all.

  Returns:
    What is there now, in words.

  Raises:
    InputError: an argument is wrong, or an input file is not what it should be.
    OSError: the disk is full, or a remote file could not be read in several attempts.
    Interrupted: SIGINT came.
  """
  checks.one_of("--corpus", corpus, natural.RECIPES)
  recipe = natural.RECIPES[corpus]
  selected = recipe.select(nodes)
  source = source or recipe.source
  if "://" not in source:
    source = str(Path(source).expanduser().resolve())
  listed = recipe.list_files(source)
  folder = Path(out).expanduser()
  header = {"corpus": corpus, "source": source, "max_bytes_per_node": max_bytes_per_node, "nodes": selected}
  with _claimed(folder, header) as rows:
    # A local input file may be removed once it has been read.
    inputs = recipe.inputs(listed.keys() | rows.keys(), selected)
    checks.require(bool(inputs), "--source", source, f"files named as in {recipe.source}, such as {recipe.example}")
    run = _Run(recipe, source, folder, max_bytes_per_node, selected, inputs, listed, rows)
    try:
      with run.screen:
        run.all_inputs()
    except KeyboardInterrupt as error:
      raise Interrupted(f"interrupted: {run.progress()}; run the same command again to go on") from error
    except Exception as error:
      if not metrics.out_of_space(error):
        raise
      message = f"no space left for {folder}: {run.progress()}; free some and run the same command again to go on"
      raise OSError(errno.ENOSPC, message) from error
    return run.closing_lines()


@dataclasses.dataclass(slots=True)
class _Run:
  """One call: what there is to read, and what has become of it."""

  recipe: natural.Recipe
  source: str
  out: Path
  limit: int  # of train text in bytes; 0: none
  nodes: dict[str, str]  # path -> tag
  inputs: list[natural.Input]
  listed: dict[str, natural.File]  # what the source has
  rows: dict[str, dict[str, Any]]  # of the manifest, by input file
  taken: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)  # text bytes
  complete: int = 0  # input files
  pace: "_Pace" = dataclasses.field(default_factory=lambda: _Pace())
  screen: "_Screen" = dataclasses.field(default_factory=lambda: _Screen())

  def all_inputs(self) -> None:
    """Goes through the input files in order, since what a limit leaves out of one depends on those before it."""
    if self.rows:
      self.screen.say(f"checking what was made of {len(self.rows)} input files")
    for item in self.inputs:
      places = self._places(item)
      row = self.rows.get(item.name)
      if row and not (places and self._is_intact(item, row)):
        self._forget(item.name)
        row = None
      if places and not row:
        row = self._retried(functools.partial(self._read, item))
        metrics.append_jsonl(_manifest(self.out), [row])
        self.rows[item.name] = row
        count, size = (sum(shard[key] for shard in row["shards"].values()) for key in ("documents", "text_bytes"))
        self.screen.say(f"{self._label(item)}: {count:,} documents, {size / 1e6:,.1f} MB")
      for shard in row["shards"].values() if row else ():
        self.taken[shard["node"], shard["split"]] += shard["text_bytes"]
      self.complete += 1

  def progress(self) -> str:
    """How far it is, in words."""
    return f"{self.complete} of {len(self.inputs)} input files are complete in {self.out}"

  def closing_lines(self) -> str:
    """The documents of every node and split, and what deserves attention."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    unknown: collections.Counter[str] = collections.Counter()
    for row in self.rows.values():
      unknown.update(row["unknown"])
      for shard in row["shards"].values():
        counts[shard["node"], shard["split"]] += shard["documents"]
    width = max(len("documents"), *map(len, self.nodes))
    lines = [f"{'documents':{width}}" + "".join(f"{split:>14}" for split in SPLITS) + "     MB of train"]
    for path in self.nodes:
      cells = "".join(f"{counts[path, split]:14,}" for split in SPLITS)
      lines.append(f"{path:{width}}{cells}{self.taken[path, 'train'] / 1e6:16,.1f}")
    for split in SPLITS:
      if without := [path for path in self.nodes if not counts[path, split]]:
        lines.append(f"without {split} documents, so not to be trained on: {', '.join(without)}")
    lines += [f"{tag}: {count:,} documents belong to no node" for tag, count in sorted(unknown.items())]
    if replaced := sum(row["replaced"] for row in self.rows.values()):
      lines.append(f"{replaced:,} invalid byte sequences were replaced")
    return "\n".join([*lines, f"{self.progress()}, with checksums in {_manifest(self.out)}"])

  def _label(self, item: natural.Input) -> str:
    return f"input {self.complete + 1} of {len(self.inputs)}, {item.name}"

  def _most(self, split: str) -> int:
    return self.limit if split == "train" else max(1, self.limit // EVALUATION_SHARE)

  def _places(self, item: natural.Input) -> set[tuple[str, str]]:
    """The nodes and splits that documents of an input file may go to, as far as they do not have their fill."""
    paths = [path for path, tag in self.nodes.items() if item.tag in ("", tag)]
    places = {(path, split) for path in paths for split in item.splits}
    return {place for place in places if not self.limit or self.taken[place] < self._most(place[1])}

  def _before(self, item: natural.Input) -> dict[str, int]:
    """What a limit makes an input file depend on: how much was taken from those before it."""
    return {f"{path} {split}": self.taken[path, split] for path, split in sorted(self._places(item)) if self.limit}

  def _is_intact(self, item: natural.Input, row: dict[str, Any]) -> bool:
    """Whether what was made of an input file is still there, and would be made of it again."""
    if item.name in self.listed:
      for key, value in self.listed[item.name]._asdict().items():
        checks.require(row[key] == value, f"{self.source}/{item.name}: {key}", value,
                       f"{row[key]!r}, as when {self.out} was prepared", "prepare another folder")
    if row["before"] != self._before(item):
      self.screen.say(f"there are other input files before {item.name} now: reading it again")
      return False
    for name, shard in row["shards"].items():
      self.screen.show(lambda: f"{self._label(item)}: checking what is there")
      if not (self.out / name).is_file() or shards.sha256(self.out / name) != shard["sha256"]:
        self.screen.say(f"{self.out / name} is missing or damaged: reading {item.name} again")
        return False
    return True

  def _forget(self, name: str) -> None:
    for shard in self.rows.pop(name)["shards"]:
      (self.out / shard).unlink(missing_ok=True)
    metrics.keep_jsonl(_manifest(self.out), lambda row: row.get("input") != name)

  def _read(self, item: natural.Input) -> dict[str, Any]:
    """Reads an input file, writes its shards and returns its line of the manifest."""
    path_of, known = {tag: path for path, tag in self.nodes.items()}, set(self.recipe.nodes.values())
    places, taken = self._places(item), self.taken.copy()
    unknown: collections.Counter[str] = collections.Counter()
    replaced = 0
    origin = f"{self.source}/{item.name}"
    file = self.listed.get(item.name, natural.File(0, ""))
    self.pace.begin()
    with shards.Writer(self.out, _aside(self.out)) as writer, files.open_stream(origin) as stream:
      for document in files.read_jsonl(stream, origin, "text", self.recipe.tag_field, "replace"):
        tag, encoded = item.tag or document.tag, document.text.encode()
        self.pace.add(len(encoded))
        self.screen.show(lambda: f"{self._label(item)}: {self.pace.words(self._bytes_left())}")
        if tag not in path_of:
          unknown.update([] if tag in known else [tag])  # what --nodes leaves out is known
          continue
        place = path_of[tag], item.split_of(encoded)
        if place not in places:
          continue
        writer.add(*place, item.number, encoded)
        replaced += document.replaced
        taken[place] += len(encoded)
        if self.limit and taken[place] >= self._most(place[1]):
          places.remove(place)
          if not places:
            break
      else:
        self.pace.end(file.bytes)
      written = {name: shard._asdict() for name, shard in writer.finish().items()}
    return {"input": item.name, **file._asdict(), "before": self._before(item), "shards": written,
            "unknown": dict(unknown), "replaced": replaced}

  def _retried(self, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `read`, which is tried several times if the source is remote and what is wrong may pass."""
    waits = list(WAITS_SECONDS)
    while True:
      try:
        return read()
      except Exception as error:  # each kind of source raises its own
        # An InputError that has no cause but the text itself will not pass.
        cause = error.__cause__ if isinstance(error, checks.InputError) else error
        if "://" not in self.source or cause is None or isinstance(cause, ValueError) or metrics.out_of_space(error):
          raise
        if not waits:
          raise OSError(f"{error}; {self.progress()}: run the same command again to go on") from error
        self.screen.say(f"{error}; trying again in {waits[0]} s")
        time.sleep(waits.pop(0))

  def _bytes_left(self) -> float:
    """Roughly, how many bytes of input files are still to be read, the current one included."""
    groups: dict[tuple[str, str], list[natural.Input]] = collections.defaultdict(list)
    for item in self.inputs[self.complete:]:
      groups[item.tag, item.split].append(item)
    total = 0.0
    for items in groups.values():
      rest = float(sum(self.listed[item.name].bytes for item in items if item.name in self.listed))
      if self.limit:
        missing = [self._most(split) - self.taken[path, split] for path, split in self._places(items[0])]
        # As if the nodes that share an input file had the same share of it.
        sharers = 1 if items[0].tag else len(self.nodes)
        rest = min(rest, max(missing, default=0) * sharers / self.pace.ratio())
      total += rest
    return total


@dataclasses.dataclass(slots=True)
class _Pace:
  """What this process has read, and how fast."""

  documents: int = 0
  text_bytes: int = 0
  whole: tuple[float, int, int] = (0.0, 0, 0)  # input files read to their ends: seconds, their bytes, bytes of text
  begun: tuple[float, int] = (0.0, 0)  # the current one: when it was begun, and `text_bytes` then

  def begin(self) -> None:
    """Notes that an input file is begun."""
    self.begun = time.monotonic(), self.text_bytes

  def add(self, text_bytes: int) -> None:
    """Counts a document."""
    self.documents += 1
    self.text_bytes += text_bytes

  def end(self, input_bytes: int) -> None:
    """Notes that an input file of that size has been read to its end."""
    new = time.monotonic() - self.begun[0], input_bytes, self.text_bytes - self.begun[1]
    self.whole = self.whole[0] + new[0], self.whole[1] + new[1], self.whole[2] + new[2]

  def ratio(self) -> float:
    """Bytes of text per byte of an input file."""
    return self.whole[2] / self.whole[1] if self.whole[1] and self.whole[2] else USUAL_RATIO

  def words(self, bytes_left: float) -> str:
    """Counts, speed, and how long it takes to read `bytes_left` bytes, of which the current file's are the first."""
    current = self.text_bytes - self.begun[1]
    seconds = max(self.whole[0] + time.monotonic() - self.begun[0], 1e-9)
    per_second = max(self.whole[2] + current, 1) / seconds
    left = datetime.timedelta(seconds=round(max(bytes_left * self.ratio() - current, 0) / per_second))
    return (f"{self.documents:,} documents, {self.text_bytes / 1e6:,.1f} MB of text, {per_second / 1e6:.1f} MB/s, "
            f"about {left} left")


class _Screen:
  """One line that is redrawn, on a terminal that can; elsewhere a line every ten seconds."""

  def __init__(self) -> None:
    self._console = Console()
    live = sys.stdout.isatty() and not self._console.is_dumb_terminal
    self._status = self._console.status("") if live else None
    self._seconds_between = 0.5 if live else SECONDS_BETWEEN_PLAIN_LINES
    self._shown_at = time.monotonic()

  def __enter__(self) -> None:
    if self._status:
      self._status.start()

  def __exit__(self, *_: Any) -> None:
    if self._status:
      self._status.stop()

  def say(self, text: str) -> None:
    """Prints a line that stays."""
    if self._status:
      self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
    else:
      print(text, flush=True)

  def show(self, text: Callable[[], str]) -> None:
    """Says what is going on, if it is time to."""
    if time.monotonic() - self._shown_at < self._seconds_between:
      return
    self._shown_at = time.monotonic()
    if self._status:
      self._status.update(Text(text()))
    else:
      self.say(text())


@contextlib.contextmanager
def _claimed(out: Path, header: dict[str, Any]) -> Iterator[dict[str, dict[str, Any]]]:
  """Keeps other processes out of the folder, and gives the lines of its manifest by input file."""
  manifest = _manifest(out)
  checks.require(not out.exists() or out.is_dir(), "--out", str(out), "a folder")
  checks.require(manifest.parent.is_dir() or not out.exists() or not any(out.iterdir()), "--out", str(out),
                 "a new or empty folder, or one that this command has prepared", "choose another")
  try:
    manifest.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(manifest.with_name("lock")).acquire(timeout=0)
  except filelock.Timeout:
    checks.fail("--out", str(out), "a folder that no other process is preparing", "wait for it, or choose another")
  except OSError as error:
    checks.fail("--out", str(out), "a folder that can be written to", f"{error.strerror}; choose another")
  with lock:
    metrics.keep_jsonl(manifest, lambda row: True)  # a last line that was cut short goes
    rows = metrics.read_jsonl(manifest)
    if not rows:
      metrics.append_jsonl(manifest, [header])
    found = checks.differences(rows[0], header) if rows else []
    checks.require(not found, "--out", str(out), "a new folder, or one prepared with the same arguments",
                   f"it differs in: {'; '.join(found[:8])}. Choose another")
    yield {row["input"]: row for row in rows[1:]}


def _manifest(out: Path) -> Path:
  # In a hidden folder, where it is not taken for documents of the root.
  return out / ".prepare" / "manifest.jsonl"


def _aside(out: Path) -> Path:
  return out / ".prepare" / "unfinished"


def define_flags() -> None:
  """Defines the flags. Not on import: other commands, which tests import too, have an --out of their own."""
  flags.DEFINE_string("corpus", None, f"Which corpus: {' or '.join(natural.RECIPES)}.")
  flags.DEFINE_string("out", None, "Folder to prepare, or to go on with.")
  flags.DEFINE_string("source", "", "Local folder or fsspec address of the corpus; the Hugging Face hub if not given.")
  flags.DEFINE_integer("max_bytes_per_node", 0, "Take at most this much train text for each node, and a 20th of it "
                       "as valid and as test text; 0: all.", lower_bound=0)
  flags.DEFINE_list("nodes", [], "Paths of the nodes to prepare, with those below them; '.' is the root alone.")


def main(_: list[str]) -> int:
  """Runs the command of the flags and returns the exit code."""
  given = flags.FLAGS
  try:
    print(prepare(given.corpus, given.out, given.source, given.max_bytes_per_node, given.nodes))
  except Interrupted as stop:
    return command.interrupted(stop)
  except (checks.InputError, OSError) as error:
    return command.failed(error)
  return command.OK


if __name__ == "__main__":
  define_flags()
  command.start(main, command.Flags("corpus", "out"))
