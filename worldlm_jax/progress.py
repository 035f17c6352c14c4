"""What the person sees during a run: a live table on a terminal, plain lines in a log.

Rounds count from 0 in these calls and from 1 on the screen. Call `stop` in a `finally`, so that a
failed run gives the terminal back.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from worldlm_jax import tree_sources

SECONDS_BETWEEN_PLAIN_LINES = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
  """One node after a round. None is what the node does not have, such as the loss of one without data."""

  path: str
  name: str
  depth: int  # 0 is the root
  tokens: int  # trained on since the start of the run
  loss_nats: float | None  # mean training loss of the round
  received: float | None  # valid perplexity of the model as it came from the parent
  personalised: float | None  # and of the node's own, at the end of the round
  previous: float | None  # the personalised perplexity of the round before
  top_source: str = ""  # the path of the node that its key layers took most from

  def values(self) -> list[str]:
    """The cells after the node's own, as text, in the order of `HEADINGS`."""
    return [_count(self.tokens), _number(self.loss_nats, 3), _number(self.received, 2),
            _number(self.personalised, 2), _change(self.previous, self.personalised), self.top_source or "-"]


HEADINGS = ("tokens seen", "loss", "perplexity received", "perplexity personalised", "change", "learnt most from")


class Reporter(Protocol):
  """Where the round loop reports to."""

  def start(self, title_lines: list[str], total_rounds: int, first_round: int) -> None:
    """Opens the report of rounds `first_round` (more than 0 in a resumed run) to `total_rounds - 1`."""

  def phase(self, round_index: int, text: str, fraction: float) -> None:
    """Says what is going on, and which `fraction` (0 to 1) of the round is done."""

  def round(self, round_index: int, rows: Sequence[Row], seconds: float) -> None:
    """Shows a finished round: one row per node, parents before their children."""

  def message(self, text: str) -> None:
    """Prints a line that stays, such as a warning."""

  def stop(self) -> None:
    """Closes the report. Does nothing the second time."""


def for_stdout() -> Reporter:
  """`LiveTable` where standard output is a terminal that can redraw, `PlainLines` elsewhere."""
  console = Console()
  return LiveTable(console) if sys.stdout.isatty() and not console.is_dumb_terminal else PlainLines()


class Silent:
  """Shows nothing: for notebooks and tests."""

  def start(self, title_lines: list[str], total_rounds: int, first_round: int) -> None:
    """Does nothing."""

  def phase(self, round_index: int, text: str, fraction: float) -> None:
    """Does nothing."""

  def round(self, round_index: int, rows: Sequence[Row], seconds: float) -> None:
    """Does nothing."""

  def message(self, text: str) -> None:
    """Does nothing."""

  def stop(self) -> None:
    """Does nothing."""


class PlainLines:
  """Prints a heading and one line per node after each round, without escape codes."""

  def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
    self._clock = clock
    self._printed_at = clock()
    self._pace = _Pace(0)

  def start(self, title_lines: list[str], total_rounds: int, first_round: int) -> None:
    self._pace = _Pace(total_rounds)
    self._print(title_lines)

  def phase(self, round_index: int, text: str, fraction: float) -> None:
    # A short round is one table; only a long one needs signs of life in between.
    if self._clock() - self._printed_at >= SECONDS_BETWEEN_PLAIN_LINES:
      left = self._pace.left(round_index + fraction)
      self._print([f"{self._pace.label(round_index)}: {text}, {fraction:.0%}{left and ', ' + left}"])

  def round(self, round_index: int, rows: Sequence[Row], seconds: float) -> None:
    self._pace.finished.append(seconds)
    heading = [f"{self._pace.label(round_index)}, {duration(seconds)}",
               "tokens", "loss", "received", "personalised", "change", "learnt most from"]
    cells = [[tree_sources.title(row.path, row.name), *row.values()] for row in rows]
    self._print(_aligned([heading, *cells]))

  def message(self, text: str) -> None:
    self._print([text])

  def stop(self) -> None:
    pass  # every line is out already

  def _print(self, lines: list[str]) -> None:
    for line in lines:
      print(line)
    sys.stdout.flush()
    self._printed_at = self._clock()


class LiveTable:
  """Redraws one table of the latest round in place, over a bar with the phase and the time left."""

  def __init__(self, console: Console | None = None) -> None:
    self._console = console or Console()
    self._pace = _Pace(0)
    self._rows: Sequence[Row] = ()
    self._round_index = 0
    self._phase = ""
    self._fraction = 0.0
    self._stopped = False
    self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)

  def start(self, title_lines: list[str], total_rounds: int, first_round: int) -> None:
    for line in title_lines:
      self.message(line)
    self._pace = _Pace(total_rounds)
    self._round_index = first_round
    self._live.start()

  def phase(self, round_index: int, text: str, fraction: float) -> None:
    self._round_index, self._phase, self._fraction = round_index, text, fraction

  def round(self, round_index: int, rows: Sequence[Row], seconds: float) -> None:
    self._pace.finished.append(seconds)
    self._rows = tuple(rows)
    self.phase(round_index, f"done in {duration(seconds)}", 1.0)
    self._live.refresh()

  def message(self, text: str) -> None:
    self._console.print(text, markup=False, highlight=False, emoji=False)

  def stop(self) -> None:
    self._stopped = True
    self._live.stop()

  def _render(self) -> RenderableType:
    return Group(self._table(), "", self._bar()) if self._rows else self._bar()

  def _table(self) -> Table:
    # Two spaces between columns where there is room; eighty columns have room for one.
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, int(self._console.width >= 90), 0, 0))
    table.add_column("node", no_wrap=True, overflow="ellipsis")
    for heading in HEADINGS[:-1]:
      table.add_column(heading.replace(" ", "\n", 1), justify="right", no_wrap=True)
    table.add_column("learnt most\nfrom", no_wrap=True, overflow="ellipsis")
    # A terminal cannot redraw what has scrolled off, so the rest waits for the last frame.
    shown = len(self._rows) if self._stopped else max(1, self._console.height - 7)
    for row in self._rows[:shown]:
      *values, change, top_source = row.values()
      style = {"-": "green", "+": "red"}.get(change[0], "") if len(change) > 1 else ""
      table.add_row(Text("  " * row.depth + row.name), *values, Text(change, style), Text(top_source))
    if shown < len(self._rows):
      table.add_row(Text(f"{len(self._rows) - shown} more ..."))
    return table

  def _bar(self) -> Table:
    done = self._round_index + self._fraction
    line = Table.grid(padding=(0, 2, 0, 0))
    for no_wrap in (True, True, False, True):  # only the phase gives way where there is no room
      line.add_column(no_wrap=no_wrap)
    line.add_row(self._pace.label(self._round_index),
                 ProgressBar(total=max(self._pace.total_rounds, 1), completed=done, width=12),
                 Text(self._phase, no_wrap=True, overflow="ellipsis"), Text(self._pace.left(done)))
    return line


@dataclasses.dataclass(slots=True)
class _Pace:
  """How fast the rounds of this process go."""

  total_rounds: int
  finished: list[float] = dataclasses.field(default_factory=list)  # seconds of each

  def label(self, round_index: int) -> str:
    return f"round {round_index + 1}/{self.total_rounds}"

  def left(self, rounds_done: float) -> str:
    """The time left in words; empty before the first round has ended and after the last."""
    rounds_left = self.total_rounds - rounds_done
    if not self.finished or rounds_left <= 0:
      return ""
    usual = self.finished[1:] or self.finished  # the first one also compiles
    return f"about {duration(rounds_left * sum(usual) / len(usual))} left"


def _aligned(lines: list[list[str]]) -> list[str]:
  """Joins cells in columns: numbers to the right, the first and the last column to the left."""
  widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
  joined = []
  for first, *values, last in lines:
    cells = [set_cell_size(first, widths[0])]  # by cells, not by characters: names may be wide
    cells += [value.rjust(width) for value, width in zip(values, widths[1:-1], strict=True)]
    joined.append("  ".join([*cells, last]))
  return joined


def _number(value: float | None, digits: int) -> str:
  if value is None:
    return "-"
  if not math.isfinite(value) or abs(value) < 1000:
    return f"{value:.{digits}f}"
  return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.1e}"


def _change(old: float | None, new: float | None) -> str:
  if old is None or new is None or not old > 0:
    return "-"
  return f"{min(new / old - 1, 9.99):+.1%}"


def _count(value: int) -> str:
  for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
    if value >= size:
      return f"{value / size:.2f}{unit}"
  return str(value)


def duration(seconds: float) -> str:
  """Seconds as people say them, such as "42 s" or "1 h 5 min"."""
  if seconds < 10:
    return f"{seconds:.1f} s"
  if seconds < 100:
    return f"{seconds:.0f} s"
  if seconds < 100 * 60:
    return f"{seconds / 60:.0f} min"
  return f"{seconds / 3600:.1f} h"


def closing_lines(summary: Mapping[str, Any], workdir: str) -> str:
  """What a finished run says: the test scores of every node and of the tree."""
  width = max(len("test split"), *(len(path) for path in summary["nodes"]))
  lines = [f"{'test split':{width}}    perplexity received  personalised  bits per byte"]
  for path, node in summary["nodes"].items():
    if "received" in node:
      received, own = node["received"], node["personalised"]
      lines.append(f"{path:{width}}{received['perplexity']:23.3f}{own['perplexity']:14.3f}{own['bits_per_byte']:15.4f}")
  tree = summary["tree"]
  means = [tree[kind]["mean"]["perplexity"] for kind in ("received", "personalised")]
  lines.append(f"{'mean':{width}}{means[0]:23.3f}{means[1]:14.3f}{tree['personalised']['mean']['bits_per_byte']:15.4f}")
  seconds = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in summary["seconds"].items())
  lines.append(f"seconds: {seconds}")
  lines.append(f"sent: {summary['bytes_down'] / 1e6:.1f} MB down, {summary['bytes_up'] / 1e6:.1f} MB up; see {workdir}")
  return "\n".join(lines)
