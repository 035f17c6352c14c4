"""A comparison as Markdown: aligned tables that also read well on a terminal."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len

from worldlm_jax import tree_sources
from worldlm_jax.verdicts import Stat

NOTHING = "-"


def page(content: Mapping[str, Any]) -> str:
  """comparison.md, from the content of comparison.json."""
  own, alone, seeds = content["own"], content["alone"], len(content["seeds"])
  spread = f"± is the standard error over {seeds} seeds." if seeds > 1 else "One seed: nothing is known of the noise."
  sections = [
    f"# Comparison of {_count(len(content['entries']), 'entry', 'entries')} on "
    f"{_count(len(content['verdicts']), 'node', 'nodes')} with text",
    entries_table(content),
    "Perplexity on the test split, per token; lower is better. *Received* is the model that a node would be handed "
    "next, *personalised* the same after the node's own training. Every algorithm has both: what is not personal by "
    "nature is its global model after the same local steps. *Worst* is the worst node, personalised. *Ratio* is the "
    f"entry's mean over {_name(own)}'s, personalised: above 1, {_name(own)} is better. {spread}",
    "## Does joining pay?",
    _verdict_table(content),
    _verdict_note(own, alone, seeds),
    "## Perplexity of each node, personalised", _perplexity_table(content, "personalised"),
    "## Perplexity of each node, as received", _perplexity_table(content, "received"),
    "## Bits per byte, personalised", _bits_table(content),
    "## What all entries were given", _given(content),
  ]
  return "\n\n".join(sections) + "\n"


def entries_table(content: Mapping[str, Any]) -> str:
  """One line per entry: scores of the tree, what was sent, and the time."""
  own, rows = content["own"], []
  for name, entry in content["results"].items():
    tree, ratios = entry["tree"], content["results"][own]["ratios"]
    ratio = "1" if name == own else _value(ratios[name]["personalised"])
    sent = [entry[way]["mean"] for way in ("bytes_down", "bytes_up")]
    cells = [_value(tree["received"]["mean"]["perplexity"]), _value(tree["personalised"]["mean"]["perplexity"]),
             _value(tree["personalised"]["worst"]["perplexity"]), ratio,
             NOTHING if None in sent else f"{sum(sent) / 1e6:,.1f}", _value(entry["seconds"]["total"], 0)]
    if entry["diverged"]:
      cells = ["diverged", *[NOTHING] * 5]
    rows.append([_name(name), *cells])
  return _table(["entry", "received", "personalised", "worst", "ratio", "MB sent", "seconds"], rows)


def number(value: float | None, digits: int = 3) -> str:
  """A number for a table; "-" for None."""
  if value is None:
    return NOTHING
  return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}"


def _verdict_table(content: Mapping[str, Any]) -> str:
  own, alone = content["own"], content["alone"]
  headings = ["node", "best option", f"{_name(own)} over {_name(alone or '')}", "over the best other", "in words"]
  rows = []
  for verdict in content["verdicts"]:
    best, gain = verdict["best"], verdict["own_gain_percent"]
    baseline, against = verdict["best_baseline"], _percent(verdict["own_against_best_baseline_percent"])
    rows.append([
      _path(content, verdict["node"]), NOTHING if best is None else _name(best), _percent(gain),
      against if baseline is None else f"{against} ({_name(baseline)})", _in_words(content, verdict),
    ])
  if alone is None:
    rows, headings = [[*row[:2], *row[3:]] for row in rows], [*headings[:2], *headings[3:]]
  return _table(headings, rows)


def _in_words(content: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
  """One sentence or two that a board can read."""
  own, best, gain = content["own"], verdict["best"], verdict["own_gain_percent"]
  if content["results"][own]["diverged"]:
    return f"The training of {_name(own)} diverged: no verdict."
  if gain is None or gain["mean"] is None:
    said = "Nothing to hold it against: no finished entry stands for training alone."
  elif gain["mean"] == 0:
    said = "Joining makes no difference."
  else:
    better, certain = gain["mean"] > 0, verdict["own_exceeds_noise"]
    said = {
      (True, True): "Joining pays.", (False, True): "Joining costs: this node is better off alone.",
      (True, False): "Joining seems to pay, but the difference is within the noise.",
      (False, False): "Joining seems to cost, but the difference is within the noise.",
      (True, None): "Joining seems to pay; one seed cannot tell it from noise.",
      (False, None): "Joining seems to cost; one seed cannot tell it from noise.",
    }[better, certain]
  if best in (own, content["alone"], None):
    return said
  pools = content["entries"][best]["algorithm"] == "centralized"
  return f"{said} Best is {_name(best)}{', which needs all text in one place' if pools else ''}."


def _verdict_note(own: str, alone: str | None, seeds: int) -> str:
  if alone is None:
    said = "No entry stands for training alone (config.alone)."
  else:
    said = (f"*{_name(own)} over {_name(alone)}* is what joining brings a node: by how many percent the perplexity of "
            f"{_name(alone)} lies above that of {_name(own)}; minus is a loss.")
  freedom = _count(seeds - 1, "degree", "degrees")
  test = "" if seeds == 1 else (
    "A difference exceeds the noise when its mean over seeds, taken in pairs, is larger than its standard error times "
    f"Student's t (two-sided, 5%, {freedom} of freedom)."
  )
  others = f"*Over the best other* holds {_name(own)} against the best of all other entries at that node."
  return " ".join(filter(None, [said, others, test]))


def _perplexity_table(content: Mapping[str, Any], kind: str) -> str:
  names, rows = list(content["results"]), []
  for path in (verdict["node"] for verdict in content["verdicts"]):
    stats = {name: content["results"][name]["nodes"][path][kind]["perplexity"] for name in names}
    least = min((s["mean"] for s in stats.values() if s["mean"] is not None), default=None)
    cells = [f"**{_value(s)}**" if s["mean"] is not None and s["mean"] == least else _value(s) for s in stats.values()]
    rows.append([_path(content, path), *cells])
  return _table(["node", *map(_name, names)], rows)


def _bits_table(content: Mapping[str, Any]) -> str:
  names, rows = list(content["results"]), []
  floors = {path: node["floor"] for path, node in content["nodes"].items() if node["floor"]}
  for path in (verdict["node"] for verdict in content["verdicts"]):
    values = [_value(content["results"][name]["nodes"][path]["personalised"]["bits_per_byte"], 4) for name in names]
    floor = [number(floors[path]["bits_per_byte"] if path in floors else None, 4)] if floors else []
    rows.append([_path(content, path), *floor, *values])
  table = _table(["node", *(["floor"] if floors else []), *map(_name, names)], rows)
  return table + ("\n\nThe floor is the entropy of the artificial language: no model can do better." if floors else "")


def _given(content: Mapping[str, Any]) -> str:
  fairness = content["fairness"]
  tokens = "an unknown number of" if fairness["tokens"] is None else f"{fairness['tokens']:,}"
  lines = [
    f"Every run trained on {tokens} tokens, from the same initial parameters for the same seed "
    f"({', '.join(map(str, content['seeds']))}), on the same windows of text, and was scored on the same text; "
    "this was checked after the runs.",
    f"The model has {content['parameters']:,} parameters.",
  ]
  if content["command"]:
    lines.append(f"```bash\n{content['command']}\n```")
  stopped = [f"- {_name(run['entry'])}, seed {run['seed']}: {run['stopped']}" for run in content["runs"]
             if run["stopped"]]
  if stopped:
    lines.append("Diverged, and therefore without numbers:\n\n" + "\n".join(stopped))
  rows = [[_path(content, path), f"{node['train_tokens']:,}", f"{node['epochs']:.2f}"]
          for path, node in content["nodes"].items() if node["has_text"]]
  return "\n\n".join([*lines, _table(["node", "tokens of training text", "epochs"], rows)])


def _value(stat: Stat, digits: int = 3) -> str:
  """Mean ± standard error."""
  if stat["mean"] is None or stat["standard_error"] is None:
    return number(stat["mean"], digits)
  return f"{number(stat['mean'], digits)} ± {number(stat['standard_error'], digits)}"


def _percent(stat: Stat | None) -> str:
  if stat is None or stat["mean"] is None:
    return NOTHING
  error = stat["standard_error"]
  return f"{stat['mean']:+.1f}%" + ("" if error is None else f" ± {error:.1f}")


def _path(content: Mapping[str, Any], path: str) -> str:
  return _name(tree_sources.title(path, content["nodes"][path]["name"]))


def _name(text: str) -> str:
  """A name as it is, whatever it holds: nothing in it is taken for Markdown or HTML."""
  text = re.sub(r"([\\`*<>&|\[\]~#]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)
  return " ".join(text.split())


def _count(number: int, one: str, many: str) -> str:
  return f"{number} {one if number == 1 else many}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table in columns: the first and those of words to the left, numbers to the right."""
  lines = [list(headings), *map(list, rows)]
  widths = [max(3, *map(cell_len, column)) for column in zip(*lines, strict=True)]
  left = [i == 0 or headings[i] in ("best option", "in words") for i in range(len(headings))]

  def joined(cells: Sequence[str]) -> str:
    padded = []
    for cell, width, to_left in zip(cells, widths, left, strict=True):
      space = " " * (width - cell_len(cell))
      padded.append(cell + space if to_left else space + cell)
    return f"| {' | '.join(padded)} |"

  rule = ["-" * (width - 1) + ("-" if to_left else ":") for width, to_left in zip(widths, left, strict=True)]
  return "\n".join(map(joined, [lines[0], rule, *lines[1:]]))
