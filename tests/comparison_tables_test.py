"""The tables of a comparison: what they say in numbers and words, and that no name breaks them."""

import json
from pathlib import Path
from typing import Any

import pytest

from worldlm_jax import comparison_tables, metrics, verdicts
from worldlm_jax.verdicts import Run

HOSTILE = "law|<script>_x_*"


def _units(perplexity: float) -> dict[str, float]:
  return {"loss_nats": 1.0, "perplexity": perplexity, "bits_per_byte": perplexity / 4}


def _run(*values: float, nodes: tuple[str, ...]) -> Run:
  scores = {path: {kind: _units(v + more) for kind, more in (("received", 1), ("personalised", 0))}
            for path, v in zip(nodes, values, strict=True)}
  mean = sum(values) / len(values)
  tree = {kind: {"mean": _units(mean + more), "worst": _units(max(values) + more)}
          for kind, more in (("received", 1), ("personalised", 0))}
  return Run({"nodes": scores, "tree": tree, "tokens": 12_800, "bytes_down": 1_500_000, "bytes_up": 1_000_000,
              "seconds": {"training": 90.0}})


def _content(
  tmp_path: Path, runs: dict[str, list[Run]], nodes: tuple[str, ...] = (".", HOSTILE), alone: str | None = "local"
) -> dict[str, Any]:
  found = verdicts.results(runs, nodes)
  num_seeds = len(runs["worldlm"])
  content = {
    "own": "worldlm", "alone": alone, "seeds": list(range(num_seeds)), "command": "python -m x", "parameters": 431_040,
    "entries": {name: {"algorithm": name, "overrides": {}} for name in runs},
    "nodes": {path: {"parent": None, "name": path if path != "." else "world", "has_text": True,
                     "train_tokens": 64_000, "epochs": 0.2, "floor": None} for path in nodes},
    "results": found, "verdicts": [verdicts.verdict(path, found, "worldlm", alone) for path in nodes],
    "fairness": {"tokens": 12_800},
    "runs": [{"entry": name, "seed": k, "stopped": None if run.summary else "loss is nan"}
             for name, of in runs.items() for k, run in enumerate(of)],
  }
  metrics.write_json(tmp_path / "comparison.json", content)  # whoever reads the file can make the same page
  return json.loads((tmp_path / "comparison.json").read_text())


def _both(*values: float) -> Run:
  return _run(*values, nodes=(".", HOSTILE))


def _lines(page: str, title: str) -> list[list[str]]:
  """The cells of the table under a title."""
  section = page.partition(title)[2].partition("\n## ")[0]
  return [[cell.strip() for cell in line.strip("|").replace("\\|", "/").split("|")]
          for line in section.splitlines() if line.startswith("|")]


@pytest.fixture
def page(tmp_path: Path) -> str:
  return comparison_tables.page(_content(tmp_path, {
    "local": [_both(10.0, 20.0), _both(10.0, 20.0), _both(10.0, 20.0)],
    "centralized": [_both(6.0, 30.0), _both(6.0, 30.0), _both(6.0, 30.0)],
    "worldlm": [_both(8.0, 21.0), _both(8.0, 23.0), _both(8.0, 19.0)],
  }))


def test_the_table_of_entries(page: str) -> None:
  table = _lines(page, "# Comparison of 3 entries on 2 nodes with text")
  assert table[0] == ["entry", "received", "personalised", "worst", "ratio", "MB sent", "seconds"]
  assert table[2] == ["local", "16.000 ± 0.000", "15.000 ± 0.000", "20.000 ± 0.000", "1.038 ± 0.041", "2.5", "90 ± 0"]
  assert table[4][1:5] == ["15.500 ± 0.577", "14.500 ± 0.577", "21.000 ± 1.155", "1"]
  assert "± is the standard error over 3 seeds." in page


def test_the_verdicts(page: str) -> None:
  table = _lines(page, "## Does joining pay?")
  assert table[0] == ["node", "best option", "worldlm over local", "over the best other", "in words"]
  assert table[2] == ["world", "centralized", "+25.0% ± 0.0", "-25.0% ± 0.0 (centralized)",
                      "Joining pays. Best is centralized, which needs all text in one place."]
  assert table[3][1:3] == ["local", "-4.2% ± 5.3"]
  assert table[3][4] == "Joining seems to cost, but the difference is within the noise."
  assert "2 degrees of freedom" in page


def test_the_best_of_each_node_is_bold_in_both_tables(page: str) -> None:
  table = _lines(page, "## Perplexity of each node, personalised")
  assert table[0] == ["node", "local", "centralized", "worldlm"]
  assert table[2][1:] == ["10.000 ± 0.000", "**6.000 ± 0.000**", "8.000 ± 0.000"]
  assert table[3][1] == "**20.000 ± 0.000**" and "**" not in "".join(table[3][2:])
  assert _lines(page, "## Perplexity of each node, as received")[2][2] == "**7.000 ± 0.000**"


def test_what_was_given(page: str) -> None:
  assert "Every run trained on 12,800 tokens" in page and "431,040 parameters" in page and "\npython -m x\n" in page
  assert _lines(page, "## What all entries were given")[2] == ["world", "64,000", "0.20"]


def test_no_name_breaks_a_table(page: str) -> None:
  assert "| law\\|\\<script\\>\\_x\\_\\* " in page
  assert "<script" not in page.replace("\\<script", "")
  for title in ("# Comparison", "## Does joining", "## Perplexity of each node, p", "## Bits", "## What all"):
    widths = {len(line) for line in _lines(page, title)}
    assert len(widths) == 1


@pytest.mark.parametrize(("own", "words"), [
  ((8.0,), "Joining seems to pay; one seed cannot tell it from noise."),
  ((12.0,), "Joining seems to cost; one seed cannot tell it from noise."),
  ((8.0, 8.1, 8.2), "Joining pays."), ((12.0, 12.1, 12.2), "Joining costs: this node is better off alone."),
  ((10.0, 10.0), "Joining makes no difference."),
  ((8.0, 13.0, 7.0), "Joining seems to pay, but the difference is within the noise."),
])
def test_the_words_follow_the_numbers(tmp_path: Path, own: tuple[float, ...], words: str) -> None:
  runs = {"local": [_run(10.0, nodes=(".",)) for _ in own], "worldlm": [_run(v, nodes=(".",)) for v in own]}
  page = comparison_tables.page(_content(tmp_path, runs, nodes=(".",)))
  assert _lines(page, "## Does joining pay?")[2][-1] == words
  assert ("One seed: nothing is known of the noise." in page) == (len(own) == 1) == ("±" not in page)


@pytest.mark.parametrize("who", ["worldlm", "local", "fedavg"])
def test_an_entry_that_diverged_is_said_to_have(tmp_path: Path, who: str) -> None:
  runs = {name: [_both(10.0 - i, 20.0), _both(11.0, 21.0)] for i, name in enumerate(("local", "fedavg", "worldlm"))}
  runs[who][1] = Run(None)
  page = comparison_tables.page(_content(tmp_path, runs))
  row = next(line for line in _lines(page, "# Comparison") if line[0] == who)
  assert row[1:] == ["diverged", "-", "-", "-", "-", "-"]
  assert f"- {who}, seed 1: loss is nan" in page and "None" not in page and "nan " not in page
  words = _lines(page, "## Does joining pay?")[2][-1]
  assert words.startswith({"worldlm": "The training of worldlm diverged: no verdict.",
                           "local": "Nothing to hold it against", "fedavg": "Joining seems"}[who])


def test_without_anybody_alone_there_is_no_such_column(tmp_path: Path) -> None:
  runs = {"worldlm": [_both(8.0, 9.0)], "fedavg": [_both(9.0, 8.0)]}
  page = comparison_tables.page(_content(tmp_path, runs, alone=None))
  assert _lines(page, "## Does joining pay?")[0] == ["node", "best option", "over the best other", "in words"]
  assert "No entry stands for training alone (config.alone)." in page


def test_the_floor_is_shown_where_there_is_one(tmp_path: Path) -> None:
  content = _content(tmp_path, {"worldlm": [_both(8.0, 9.0)], "local": [_both(9.0, 8.0)]})
  assert _lines(comparison_tables.page(content), "## Bits per byte")[0] == ["node", "worldlm", "local"]
  content["nodes"]["."]["floor"] = {"bits_per_byte": 1.25}
  table = _lines(comparison_tables.page(content), "## Bits per byte")
  assert table[0] == ["node", "floor", "worldlm", "local"]
  assert table[2] == ["world", "1.2500", "2.0000", "2.2500"] and table[3][1] == "-"


def test_unknown_bits_are_a_dash(tmp_path: Path) -> None:
  content = _content(tmp_path, {"worldlm": [_both(8.0, float("nan"))], "local": [_both(9.0, 8.0)]})
  assert _lines(comparison_tables.page(content), "## Bits per byte")[3][1] == "-"
  assert "| nan" not in comparison_tables.page(content)
