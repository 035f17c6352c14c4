"""The report of a comparison: its sections from top to bottom."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from worldlm_jax.reporting import comparison_charts, figures, page, run_page, tree_charts, words
from worldlm_jax.reporting.comparison_charts import Look
from worldlm_jax.reporting.files import Comparison
from worldlm_jax.reporting.page import Html


@dataclasses.dataclass(frozen=True)
class Standing:
  """Own against training alone over the nodes, for the sentence at the top."""

  better: int
  worse: int
  surely_better: int
  surely_worse: int
  known: int

  @classmethod
  def of(cls, verdicts: Sequence[Mapping[str, Any]]) -> "Standing":
    gains = [(v["own_gain_percent"]["mean"], v["own_exceeds_noise"]) for v in verdicts
             if v["own_gain_percent"] is not None and words.known(v["own_gain_percent"]["mean"])]
    return cls(sum(g > 0 for g, _ in gains), sum(g < 0 for g, _ in gains), sum(g > 0 and bool(e) for g, e in gains),
               sum(g < 0 and bool(e) for g, e in gains), len(gains))


def make(comparison: Comparison, linked: Sequence[Mapping[str, Any]]) -> tuple[str, list[figures.Chart]]:
  """The page and the charts in it; `linked` are those of `runs` that have a report of their own."""
  drawn: list[figures.Chart] = []
  looks = [Look(words.clean(name), i) for i, name in enumerate(comparison.names)]
  parts = {
    "What joining does for each node": _verdicts(comparison),
    "Each node, by entry": _dots(comparison, looks, drawn), "The tree": _tree(comparison, drawn),
    "Entries": _entries(comparison), "Learning curves": _curves(comparison, looks, drawn),
    "Bytes and perplexity": _cost(comparison, looks, drawn),
    "Every model on every text": _matrix(comparison, drawn), "Fairness": _fairness(comparison),
    "Runs": _runs(comparison, linked),
  }
  columns = [] if comparison.tree.num_levels > 3 else [[["Each node, by entry"], ["The tree"]]]
  columns.append([["Learning curves"], ["Bytes and perplexity"]])
  if not any(chart.wide for chart in drawn if chart.name == "matrix"):
    columns.append([["Every model on every text"], ["Fairness", "Runs"]])
  title = f"Comparison: {Path(comparison.folder.absolute()).name}"
  body = [page.tag("h1", title), _subtitle(comparison), _lead(comparison), page.tiles(_headline(comparison)),
          page.contents([heading for heading, content in parts.items() if content]), page.sections(parts, columns)]
  return page.document(title, page.join(part for part in body if part)), drawn


def _subtitle(comparison: Comparison) -> Html:
  return page.paragraph(
    f"{len(comparison.names)} entries, {words.counted(len(comparison.content['seeds']), 'seed')}, on "
    f"{words.counted(len(comparison.tree.paths), 'node')}, {len(comparison.text_nodes())} of them with text. ± is the "
    "standard error over seeds. Perplexities are of the test texts, lower is better.", class_="sub")


def _lead(comparison: Comparison) -> Html:
  """The result in a sentence."""
  standing = Standing.of(comparison.content["verdicts"])
  if not words.known(_mean(comparison, comparison.own)["mean"]):
    return page.paragraph(page.tag("strong", comparison.own), " diverged with at least one of the seeds: its "
                          "mean is not known.", class_="banner")
  if comparison.alone is None or not standing.known:
    return Html("")
  several = len(comparison.content["seeds"]) > 1

  def surely(nodes: int, sure: int) -> str:
    return f" (beyond the noise for {sure})" if several and nodes else ""

  return page.paragraph(
    page.tag("strong", comparison.own), f" is better than training alone for "
    f"{standing.better} of the {standing.known} nodes with text{surely(standing.better, standing.surely_better)}, and "
    f"worse for {standing.worse or 'none'}{surely(standing.worse, standing.surely_worse)}.", class_="lead")


def _mean(comparison: Comparison, name: str, kind: str = "personalised", which: str = "mean",
          unit: str = "perplexity") -> Mapping[str, Any]:
  return comparison.results[name]["tree"][kind][which][unit]


def _headline(comparison: Comparison) -> list[tuple[str, str, str]]:
  own, alone = comparison.own, comparison.alone
  tiles = [_tile(f"{own}, personalised", _mean(comparison, own), "perplexity, mean over the tree"),
           _tile(f"{own}, as received", _mean(comparison, own, "received"), "perplexity, mean over the tree")]
  if alone is not None:
    tiles.append(_tile(f"{alone}: training alone", _mean(comparison, alone), "perplexity, personalised"))
  others = [name for name in comparison.names if name not in (own, alone)
            and words.known(_mean(comparison, name)["mean"])]
  if others:
    best = min(others, key=lambda name: _mean(comparison, name)["mean"])
    tiles.append(_tile("best of the others", _mean(comparison, best), f"{best}, personalised"))
  worst = _mean(comparison, own, which="worst")
  bits = _mean(comparison, own, unit="bits_per_byte")
  tiles += [_tile(f"{own}, worst node", worst, "perplexity, personalised"),
            _tile(f"{own}, bits per byte", bits, "personalised, mean", words.bits),
            ("sent", words.size(_sent(comparison, own)), f"by {own}, up and down")]
  return tiles


def _tile(what: str, stat: Mapping[str, Any], small: str, form: Callable[[Any], str] = words.perplexity,
          ) -> tuple[str, str, str]:
  error = stat["standard_error"]
  return what, form(stat["mean"]), f"± {form(error)}; {small}" if words.known(error) else small


def _sent(comparison: Comparison, name: str) -> float:
  means = [comparison.results[name][way]["mean"] for way in ("bytes_down", "bytes_up")]
  return sum(means) if all(map(words.known, means)) else math.nan


def _verdicts(comparison: Comparison) -> Html:
  own, alone = comparison.own, comparison.alone
  rows = []
  floors = {path: node["floor"]["perplexity"] for path, node in comparison.content["nodes"].items() if node["floor"]}
  for verdict in comparison.content["verdicts"]:
    best = verdict["best"]
    against = verdict["own_against_best_baseline_percent"]
    row = [page.breakable(comparison.tree.title(verdict["node"])),
           words.UNKNOWN if best is None else page.breakable(best),
           words.with_error(verdict["options"].get(own))]
    if alone is not None:
      row[1:1] = [words.gain_in_words(verdict["own_gain_percent"], verdict["own_exceeds_noise"]).capitalize()]
      row += [words.with_error(verdict["options"].get(alone)), words.percent_with_error(verdict["own_gain_percent"])]
    floor = [words.perplexity(floors.get(verdict["node"], math.nan))] if floors else []
    rows.append([*row, words.percent_with_error(against), *floor])
  headings = ["node", "best option", own, "against the best other"]
  left = 2
  if alone is not None:
    headings = ["node", f"what {own} does", "best option", own, f"{alone} (alone)", "gain over alone",
                "against the best other"]
    left = 3
  return page.join([
    page.table([*headings, *["entropy floor"] * bool(floors)], rows, left=left),
    page.paragraph(f"Personalised test perplexity. Gains are those of {own}; above zero it is better. They are beyond "
                   "the noise where a t-test over the seeds, paired, finds it at 95 %."),
  ])


def _dots(comparison: Comparison, looks: Sequence[Look], drawn: list[figures.Chart]) -> Html:
  alone, verdicts = comparison.alone, comparison.content["verdicts"]
  if not verdicts:
    return Html("")
  field = "options" if alone is None else "gain_percent"
  # Pooled training is no option of a node's, so that its verdicts leave it out.
  shown = [look for look in looks if comparison.names[look.place] in verdicts[0][field] and
           comparison.names[look.place] != alone]
  rows = [(comparison.tree.title(v["node"]), {look.place: v[field][comparison.names[look.place]] for look in shown})
          for v in verdicts]
  axis = "test perplexity, personalised" if alone is None else "← worse  ·  than training alone  ·  better →"
  drawn.append(comparison_charts.dots("nodes", "Personalised perplexity of each node by entry", shown, rows, axis,
                                      log=alone is None))
  caption = "Personalised test perplexity of each node"
  caption += "." if alone is None else (f", relative to {alone} (the line at 0): 10 % means that training alone has a "
                                        "perplexity 10 % higher.")
  return page.chart(drawn[-1], f"{caption} Bars are standard errors over seeds.")


def _tree(comparison: Comparison, drawn: list[figures.Chart]) -> Html:
  gains = {v["node"]: v["own_gain_percent"]["mean"] for v in comparison.content["verdicts"]
           if v["own_gain_percent"] is not None and words.known(v["own_gain_percent"]["mean"])}
  if not gains:
    return Html("")
  most = max(max(map(abs, gains.values())), 0.1)
  texts = set(comparison.text_nodes())
  cells = {}
  for path in comparison.tree.paths:
    gain = gains.get(path)
    line = "" if path not in texts else words.percent(gain)
    mark = "" if gain is None else "▲ " if gain > 0 else "▼ " if gain < 0 else ""
    cells[path] = tree_charts.Cell(mark + line, line, None if gain is None else 0.5 + gain / most / 2)
  scale = tree_charts.Scale(True, words.percent(-most), words.percent(most), f"gain of {comparison.own} over alone")
  drawn.append(tree_charts.nodes("tree", "The tree with each node's gain from joining", comparison.tree, cells, scale))
  return page.chart(drawn[-1], f"What {comparison.own} gains each node over training alone, personalised: ▲ better, "
                    "▼ worse.")


def _entries(comparison: Comparison) -> Html:
  rows = []
  for name in comparison.names:
    result = comparison.results[name]
    diverged = not words.known(_mean(comparison, name)["mean"])
    ratio = result["ratios"].get(comparison.own)
    label = f"{name} (diverged)" if diverged else name
    rows.append([
      page.breakable(label), words.with_error(_mean(comparison, name, "received")),
      words.with_error(_mean(comparison, name)), words.with_error(_mean(comparison, name, which="worst")),
      words.with_error(_mean(comparison, name, unit="bits_per_byte"), words.bits),
      "1" if name == comparison.own else words.with_error(ratio and ratio["personalised"], lambda v: f"{v:.3f}"),
      words.size(_sent(comparison, name)), words.duration(result["seconds"]["total"]["mean"]),
    ])
  entries = comparison.content["entries"]
  settings = [[name, page.code(entries[name]["algorithm"]),
               page.join(page.tag("div", page.code(f"{field}={value}")) for field, value in
                         entries[name]["overrides"].items()) or words.UNKNOWN] for name in comparison.names]
  return page.join([
    page.table(["entry", "received", "personalised", "worst node", "bits per byte",
                f"ratio to {comparison.own}", "sent", "time"], rows, marked=0),
    page.paragraph(f"Mean test perplexity over the nodes with text. The ratio is {comparison.own}'s perplexity to that "
                   "of the entry, personalised: above 1 the entry is better. An algorithm with one global model is "
                   "personalised by the same local steps as the others."),
    page.details("What the entries are", page.table(["entry", "algorithm", "set differently"], settings, left=3)),
  ])


def mean_curve(curves: Mapping[str, Mapping[str, Sequence[Any]]], kind: str = "personalised") -> list[float]:
  """Over nodes, each with its latest score; NaN until all of them have one, and where one has diverged."""
  lines = []
  for node in curves.values():
    line = np.array(words.numbers(node[kind]))
    if np.isfinite(line).any():
      for i in range(1, len(line)):  # in a sequential schedule the levels are scored in turn
        line[i] = line[i - 1] if np.isnan(line[i]) else line[i]
      lines.append(line)
  if not lines:
    return []
  return [float(value) for value in np.mean(lines, axis=0)]


def _curves(comparison: Comparison, looks: Sequence[Look], drawn: list[figures.Chart]) -> Html:
  curves = {look.place: mean_curve(comparison.results[comparison.names[look.place]]["curves"]) for look in looks}
  curves = {place: curve for place, curve in curves.items() if np.isfinite(curve).any()}
  if not curves:
    return Html("")
  shown = [look for look in looks if look.place in curves]
  drawn.append(comparison_charts.mean_curves("curves", "Mean valid perplexity of every entry over the rounds", shown,
                                             curves))
  return page.chart(drawn[-1], "The mean over nodes and seeds on the validation texts. Logarithmic.")


def _cost(comparison: Comparison, looks: Sequence[Look], drawn: list[figures.Chart]) -> Html:
  points = {place: (_sent(comparison, name), _mean(comparison, name)) for place, name in enumerate(comparison.names)}
  points = {place: (size, stat) for place, (size, stat) in points.items()
            if words.known(size) and words.known(stat["mean"])}
  if not points:
    return Html("")
  shown = [look for look in looks if look.place in points]
  drawn.append(comparison_charts.cost("cost", "Bytes sent against mean test perplexity", shown, points))
  return page.chart(drawn[-1], "Down and left is better. Bars are standard errors over seeds.")


def _matrix(comparison: Comparison, drawn: list[figures.Chart]) -> Html:
  content = comparison.results[comparison.own]["matrix"]
  if content is None:
    return Html("")
  titles = {path: comparison.tree.title(path) for path in comparison.tree.paths}
  above = [path for path in content["models"] if path not in titles]  # the server of algorithms that have one
  titles = dict.fromkeys(above, "server") | titles
  return run_page.matrix_section(content, titles, drawn, f"Of {comparison.own}, the mean over seeds. On its own text "
                                 "(outlined) a model should be the best, or close to it.")


def _fairness(comparison: Comparison) -> Html:
  fairness = comparison.content.get("fairness")
  if not fairness:
    return Html("")
  nodes = comparison.content["nodes"]
  rows = [[page.breakable(comparison.tree.title(path)), words.count(nodes[path]["train_tokens"]),
           words.perplexity(nodes[path]["epochs"])] for path in comparison.text_nodes()]
  return page.join([
    page.paragraph(f"Every entry trained on the same {words.count(fairness['tokens'])} tokens, from the same initial "
                   "parameters, in the same order, and was scored on the same texts; this was checked, by digests."),
    page.details("Text of each node", page.table(["node", "training tokens there are", "epochs"], rows)),
    page.details("The digests", page.listing(fairness)),
  ])


def _runs(comparison: Comparison, linked: Sequence[Mapping[str, Any]]) -> Html:
  rows = []
  for run in comparison.content["runs"]:
    seconds = words.duration(run["seconds"])
    what = [page.tag("a", "report", href=f"./{quote(run['workdir'])}/report.html")] if run in linked else []
    if run.get("stopped"):
      what.append(page.details("diverged", page.paragraph(run["stopped"])))
    rows.append([page.breakable(run["entry"]), str(run["seed"]), page.join(what) or words.UNKNOWN, seconds])
  table = page.table(["entry", "seed", "report", "time"], rows, left=3)
  return table if len(rows) <= 12 else page.join([
    page.table(["entry", "seed", "report", "time"], [row for row in rows if row[2] != words.UNKNOWN], left=3),
    page.details(f"All {len(rows)} runs", table)])
