"""The tables: what they say, that they fit, and that names are printed as they are."""

import io
import sys

import pytest
from rich.console import Console

from worldlm_jax.progress import LiveTable, PlainLines, Row, for_stdout

ROWS = (
  Row(".", "world", 0, 1_234_567, 3.21449, 24.61, 23.904, 24.7, "biomedical"),
  Row("biomedical", "biomedical", 1, 98_765, None, None, None, None),
  Row("biomedical/abstracts", "abstracts", 2, 987, 5.5, 1234.5, 1300.0, 1250.0, "biomedical/abstracts"),
)


class Clock:
  """A clock that the test moves."""

  now = 0.0

  def __call__(self) -> float:
    return self.now


def live_table(width: int, height: int = 40) -> tuple[LiveTable, Console]:
  """A live table, and the console that records all it draws: what is drawn over stays in the record."""
  console = Console(record=True, force_terminal=True, width=width, height=height, file=io.StringIO(), color_system=None)
  return LiveTable(console), console


def last_frame(console: Console) -> list[str]:
  """The lines of the last table that was drawn, from the second of its headings on."""
  lines = [line.rstrip() for line in console.export_text().splitlines()]
  return lines[max(i for i, line in enumerate(lines) if line.startswith("node")):]


def test_plain_lines_are_aligned_and_carry_no_escape_codes(capsys: pytest.CaptureFixture[str]) -> None:
  reporter = PlainLines(Clock())
  reporter.start(["worldlm_jax, 3 nodes"], total_rounds=7, first_round=2)
  reporter.round(2, ROWS, seconds=12.4)
  reporter.message("[bold]a message")
  reporter.stop()
  assert capsys.readouterr().out == """\
worldlm_jax, 3 nodes
round 3/7, 12 s       tokens   loss  received  personalised  change  learnt most from
world                  1.23M  3.214     24.61         23.90   -3.2%  biomedical
biomedical            98.77k      -         -             -       -  -
biomedical/abstracts     987  5.500     1,234         1,300   +4.0%  biomedical/abstracts
[bold]a message
"""


def test_plain_lines_say_the_phase_at_most_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
  clock = Clock()
  reporter = PlainLines(clock)
  reporter.start([], total_rounds=5, first_round=0)
  for clock.now in range(0, 35, 3):
    reporter.phase(0, "training", clock.now / 40)
  assert capsys.readouterr().out == "round 1/5: training, 30%\nround 1/5: training, 60%\n"
  reporter.round(0, (), seconds=40.0)
  clock.now += 10
  reporter.phase(1, "training", 0.5)
  assert capsys.readouterr().out.splitlines()[-1] == "round 2/5: training, 50%, about 2 min left"


def test_the_time_left_leaves_out_the_round_that_compiled(capsys: pytest.CaptureFixture[str]) -> None:
  clock = Clock()
  reporter = PlainLines(clock)
  reporter.start([], total_rounds=11, first_round=0)
  for index, seconds in enumerate((1000.0, 20.0, 40.0)):
    reporter.round(index, (), seconds)
  clock.now += 10
  reporter.phase(3, "training", 0.0)
  assert capsys.readouterr().out.splitlines()[-1].endswith("about 4 min left")


def test_perplexities_that_are_not_finite_are_shown_as_such() -> None:
  row = Row("a", "a", 1, 0, float("nan"), float("inf"), float("inf"), 3.0)
  assert row.values() == ["0", "nan", "inf", "inf", "+999.0%", "-"]


@pytest.mark.parametrize("width", [80, 100])
def test_the_live_table_fits(width: int) -> None:
  reporter, console = live_table(width)
  reporter.start(["worldlm_jax, 3 nodes"], total_rounds=7, first_round=0)
  reporter.round(0, ROWS, seconds=12.4)
  reporter.phase(1, "training the 2 nodes of biomedical", 0.25)
  reporter.stop()
  frame = last_frame(console)
  text = "\n".join(frame)
  assert "…" not in text and max(map(len, frame)) <= width
  assert frame[0].split() == ["node", "seen", "loss", "received", "personalised", "change", "from"]
  assert frame[2].split() == ["world", "1.23M", "3.214", "24.61", "23.90", "-3.2%", "biomedical"]
  assert frame[3].split() == ["biomedical", "98.77k", *"-----"]
  assert frame[3].startswith("  biomedical") and frame[4].startswith("    abstracts")
  assert frame[4].endswith("biomedical/abstracts")
  assert frame[-1].startswith("round 2/7") and "training the 2 nodes of biomedical" in frame[-1]
  assert frame[-1].endswith("about 71 s left")


def test_a_long_phase_gives_way_to_the_time_left() -> None:
  reporter, console = live_table(80)
  reporter.start([], total_rounds=7, first_round=0)
  reporter.round(0, ROWS, seconds=12.4)
  reporter.phase(1, "training " + "very " * 20 + "long", 0.25)
  reporter.stop()
  assert last_frame(console)[-1].endswith("…  about 71 s left")


def test_names_with_markup_are_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
  row = Row("[bold]x[/bold]", "[bold]x[/bold]", 1, 5, 1.0, 2.0, 3.0, None, "[/red]:smile:")
  live, console = live_table(100)
  for reporter in (live, PlainLines()):
    reporter.start(["[red]title"], total_rounds=1, first_round=0)
    reporter.phase(0, "[i]phase", 0.5)
    reporter.message("[/b]:smile:")
    reporter.round(0, [row], 1.0)
    reporter.stop()
  for text in (console.export_text(), capsys.readouterr().out):
    for literal in ("[red]title", "[/b]:smile:", "[bold]x[/bold]", "[/red]:smile:"):
      assert literal in text


def test_a_tree_taller_than_the_terminal_is_cut_until_the_end() -> None:
  reporter, console = live_table(100, height=20)
  rows = [Row(f"n{i}", f"n{i}", 1, i, 1.0, 2.0, 3.0, None) for i in range(31)]
  reporter.start([], total_rounds=3, first_round=0)
  reporter.round(0, rows, 1.0)
  assert "18 more ..." in console.export_text(clear=False)
  assert "n30" not in console.export_text(clear=False)
  assert len(last_frame(console)) < 20
  reporter.stop()
  reporter.stop()
  assert "n30" in console.export_text()


def test_a_terminal_gets_the_table_and_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
  assert isinstance(for_stdout(), PlainLines)
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  monkeypatch.setenv("TERM", "xterm")
  assert isinstance(for_stdout(), LiveTable)
  monkeypatch.setenv("TERM", "dumb")
  assert isinstance(for_stdout(), PlainLines)
