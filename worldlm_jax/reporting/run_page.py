"""The report of one run: its sections from top to bottom."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldlm_jax.reporting import figures, flows, heat_maps, page, privacy_section, run_charts, tree_charts, words
from worldlm_jax.reporting.files import Run, changed_settings, own_settings
from worldlm_jax.reporting.page import Html

LARGEST_TABLE = 3000  # cells of a matrix that are also written as a table
OTHERS = {
  "fedavg": ("FedAvg", "every node's model in every round, in float32"),
  "data_parallel": ("data-parallel training", "every node's gradients at every step, in float32"),
}


def make(run: Run, title: str, back: str = "") -> tuple[str, list[figures.Chart]]:
  """The page and the charts in it; `back` is the address of the comparison that the run belongs to."""
  drawn: list[figures.Chart] = []
  parts = {
    "The tree": _tree(run, drawn), "Learning curves": _curves(run, drawn), "All nodes": _nodes(run),
    "Every model on every text": _matrix(run, drawn), "Attention": _attention(run, drawn),
    "Routes of residual layers": _routes(run, drawn), "What the edges carried": _traffic(run, drawn),
    "Privacy": privacy_section.make(run), "Where the time went": _time(run, drawn),
    "Who gave what to whom": flows.section(run.receipts, run.tree),
    "Configuration": _configuration(run),
  }
  columns = [[["Attention"],
              ["Routes of residual layers", "What the edges carried", "Where the time went"]]]
  wide = {chart.name for chart in drawn if chart.wide}
  if "tree" not in wide:
    columns.append([["The tree"], ["Learning curves"]])
  if "matrix" not in wide:
    columns.append([["All nodes"], ["Every model on every text"]])
  up = page.paragraph(page.tag("a", "↑ the comparison", href=back), class_="sub") if back else Html("")
  body = [up, page.tag("h1", title), _subtitle(run), _state(run), page.tiles(_headline(run)),
          page.contents([heading for heading, content in parts.items() if content]), page.sections(parts, columns)]
  return page.document(title, page.join(part for part in body if part)), drawn


def name_of(run: Run) -> str:
  """What the page is called: the folder, since a run has no other name."""
  return Path(run.folder.absolute()).name


def matrix_section(content: Mapping[str, Any], titles: Mapping[str, str], drawn: list[figures.Chart],
                   note: str) -> Html:
  """The heat map of `models` x `corpora`, with the same numbers as a table where there are not too many.

  Args:
    content: paths of `models` and `corpora`, and `perplexity` by row and column.
    titles: of all nodes by path, in the order in which they are to stand: siblings side by side.
    drawn: gets the chart.
    note: what the reader should look for.
  """
  order = {path: place for place, path in enumerate(titles)}
  rows = sorted(range(len(content["models"])), key=lambda i: order[content["models"][i]])
  columns = sorted(range(len(content["corpora"])), key=lambda j: order[content["corpora"][j]])
  models = [(content["models"][i], titles[content["models"][i]]) for i in rows]
  corpora = [(content["corpora"][j], titles[content["corpora"][j]]) for j in columns]
  perplexity = [[content["perplexity"][i][j] for j in columns] for i in rows]
  if not models or not corpora:
    return Html("")
  chart = heat_maps.matrix("matrix", "Test perplexity of every node's model on every node's text", models, corpora,
                           perplexity)
  drawn.append(chart)
  caption = ("A row is a node's personalised model, a column a node's test text. Numbers are perplexities; the colour "
             "says how far a model is from the best one on that text.")
  parts = [page.paragraph(note), page.chart(chart, caption)]
  if len(models) * len(corpora) <= LARGEST_TABLE:
    lines = [[page.breakable(title), *map(words.perplexity, line)]
             for (_, title), line in zip(models, perplexity, strict=True)]
    parts.append(page.details("The numbers as a table", page.table(["model", *(t for _, t in corpora)], lines)))
  return page.join(parts)


def _subtitle(run: Run) -> Html:
  config = run.record["config"]
  num_texts = len(run.text_nodes())
  return page.paragraph(
    f"{words.counted(len(run.tree.paths), 'node')} in {words.counted(run.tree.num_levels, 'level')}, "
    f"{num_texts} with text · algorithm ", page.code(run.algorithm),
    f" · {run.rounds_done} of {words.counted(run.rounds_planned, 'round')} · seed {config['seed']}", class_="sub",
  )


def _state(run: Run) -> Html:
  if run.stopped:
    return page.paragraph("This run was stopped and cannot go on: ", run.stopped, class_="banner")
  if run.summary is None:
    return page.paragraph(
      f"This run is unfinished: {run.rounds_done} of {run.rounds_planned} rounds are recorded. The scores below are of "
      "the validation texts; those of the test texts come with the end of the run.", class_="banner")
  return Html("")


def scores(run: Run) -> dict[str, dict[str, Mapping[str, Any]]]:
  """received and personalised, by node with text: of the test split, or the last valid scores of an unfinished run."""
  if run.summary is not None:
    return {path: {kind: run.summary["nodes"][path][kind] for kind in ("received", "personalised")}
            for path in run.text_nodes() if "received" in run.summary["nodes"][path]}
  found: dict[str, dict[str, Mapping[str, Any]]] = {}
  for path in run.text_nodes():
    latest = {kind: row[kind] for row in run.rows_of(path) for kind in ("received", "personalised") if kind in row}
    if "personalised" in latest:
      found[path] = {"received": latest.get("received", latest["personalised"])} | latest
  return found


def _headline(run: Run) -> list[tuple[str, str, str]]:
  found, split = scores(run), "test" if run.summary is not None else "valid"
  tiles = []
  if run.summary is not None:
    tree = run.summary["tree"]
    own, received = tree["personalised"], tree["received"]
    worst = own["worst"]
    tiles = [
      ("perplexity, personalised", words.perplexity(own["mean"]["perplexity"]), f"{split} texts, mean over the tree"),
      ("perplexity, as received", words.perplexity(received["mean"]["perplexity"]),
       "what the run would hand down next"),
      ("worst node", words.perplexity(worst["perplexity"]), f"{run.tree.title(worst['node'])}, personalised"),
      ("bits per byte", words.bits(own["mean"]["bits_per_byte"]), "personalised, mean; compares across tokenizers"),
    ]
  elif found:
    means = {kind: float(np.mean(words.numbers([s[kind]["perplexity"] for s in found.values()])))
             for kind in ("personalised", "received")}
    tiles = [(f"perplexity, {name}", words.perplexity(means[kind]), f"{split} texts, last scores, mean")
             for kind, name in (("personalised", "personalised"), ("received", "as received"))]
  tokens, down, up = _totals(run)
  tiles += [("tokens", words.count(tokens), "trained on, all nodes"),
            ("sent", words.size(down + up), f"{words.size(down)} down, {words.size(up)} up")]
  for name, other in (run.summary or {}).get("bytes_of_others", {}).items():
    if words.known(other["times_ours"]):
      title, what = OTHERS[name]
      tiles.append((f"{title} would send", f"{other['times_ours']:.3g} times", f"{words.size(other['bytes'])}: {what}"))
  if run.summary is not None:
    seconds = run.summary["seconds"]
    longest = max(seconds, key=lambda what: seconds[what], default="")
    total = sum(seconds.values())
    share = f"{seconds[longest] / total:.0%} {longest.replace('_', ' ')}" if total else ""
    tiles.append(("time", words.duration(total), share))
  return tiles


def _totals(run: Run) -> tuple[float, float, float]:
  if run.summary is not None:
    return run.summary["tokens"], run.summary["bytes_down"], run.summary["bytes_up"]
  latest = {row["node"]: row["tokens"] for row in run.rows}
  return sum(latest.values()), sum(row["bytes_down"] for row in run.rows), sum(row["bytes_up"] for row in run.rows)


def _tree(run: Run, drawn: list[figures.Chart]) -> Html:
  found = scores(run)
  logs = {path: math.log(s["personalised"]["perplexity"]) for path, s in found.items()
          if words.known(s["personalised"]["perplexity"])}
  low, high = min(logs.values(), default=0.0), max(logs.values(), default=0.0)
  cells = {}
  for path in run.tree.paths:
    if path not in found:
      cells[path] = tree_charts.Cell("", "", None)
      continue
    received, own = (words.perplexity(found[path][kind]["perplexity"]) for kind in ("received", "personalised"))
    share = (logs[path] - low) / max(high - low, 1e-9) if path in logs else 1.0
    cells[path] = tree_charts.Cell(f"{received} → {own}", own, share)
  split = "test" if run.summary is not None else "valid"
  scale = tree_charts.Scale(False, words.perplexity(math.exp(low)) if logs else "", words.perplexity(math.exp(high))
                            if logs else "", f"{split} perplexity, personalised")
  chart = tree_charts.nodes("tree", f"The tree with each node's {split} perplexity", run.tree, cells, scale)
  drawn.append(chart)
  return page.chart(chart, "Each box: perplexity of the model as received from above → after the node's own training. "
                    "Lower is better. Texts differ in how hard they are: compare models on one text, not texts.")


def references(data: Mapping[str, Any]) -> dict[str, float]:
  """What else is known of a node's text, as perplexity per token."""
  found = {}
  if "floor" in data:
    found["entropy of the language"] = data["floor"]["perplexity"]
  if "compressor" in data and words.known(data["bytes_per_token"]):
    compressor = data["compressor"]
    found[f"{compressor['name']}, a compressor"] = 2 ** (compressor["bits_per_byte"] * data["bytes_per_token"])
  return {name: value for name, value in found.items() if words.known(value)}


def _curves(run: Run, drawn: list[figures.Chart]) -> Html:
  curves = []
  for path in run.text_nodes():
    rows = run.rows_of(path)
    received, own = (np.array(words.numbers([row.get(kind, {}).get("perplexity") for row in rows]))
                     for kind in ("received", "personalised"))
    if not (np.isfinite(received).any() or np.isfinite(own).any()):
      continue
    data = run.summary["nodes"][path].get("data", {}) if run.summary is not None else {}
    curves.append(run_charts.Curve(run.tree.title(path), np.array([row["round"] + 1 for row in rows]), received, own,
                                   references(data)))
  charts = run_charts.learning("curves", "Valid perplexity of each node over the rounds, as received and personalised",
                               curves)
  drawn += charts
  known = sorted({name for curve in curves for name in curve.references})
  more = f" The other lines, in the same unit: {words.sentence_list(known)}, on the test text." if known else ""
  return page.charts(charts, "Of the validation text: the model as it came from above at the start of a round, and "
                     f"after the node's own training. Logarithmic, the same scale in all panels.{more}")


def _nodes(run: Run) -> Html:
  found = scores(run)
  rows = []
  trusts = any("trust" in row for row in run.rows)
  for path in run.tree.paths:
    node_rows = run.rows_of(path)
    latest = node_rows[-1]["tokens"] if node_rows else 0
    tokens = latest if run.summary is None else run.summary["nodes"][path]["tokens"]
    own = found.get(path)
    numbers = [words.UNKNOWN] * 3 if own is None else [
      words.perplexity(own["received"]["perplexity"]), words.perplexity(own["personalised"]["perplexity"]),
      words.bits(own["personalised"]["bits_per_byte"])]
    trust = node_rows[-1].get("trust") if node_rows else None
    more = [words.UNKNOWN if trust is None else f"{trust:g}"] if trusts else []
    rows.append([page.breakable(run.tree.title(path)), *numbers, words.count(tokens), *more])
  split = "test" if run.summary is not None else "valid"
  return page.join([
    page.table(["node", "received", "personalised", "bits per byte", "tokens", *["trust"] * trusts], rows),
    page.paragraph(f"Perplexity on the {split} text of the model as received and personalised; bits per byte are of "
                   "the personalised one; tokens are what the node trained on."
                   + " Trust: how far from its parent's model towards its own the model in use lies." * trusts),
  ])


def _matrix(run: Run, drawn: list[figures.Chart]) -> Html:
  content = (run.summary or {}).get("matrix")
  if content is None:
    return Html("")
  titles = {path: run.tree.title(path) for path in run.tree.paths}
  return matrix_section(content, titles, drawn, "Do the models specialise? On its own text (outlined) a model should "
                        "be the best, or close to it.")


def attention_maps(run: Run) -> list[heat_maps.AttentionMap]:
  """One for each node and direction, averaged over key layers."""
  maps = []
  num_rounds = run.rounds_done
  for path in run.tree.paths:
    for field, how in (("attention_down", "takes in on the way down"), ("attention_up", "takes in from its members")):
      layers_by_round = {row["round"]: row[field] for row in run.rows_of(path) if row.get(field)}
      blank = np.full(num_rounds, np.nan)
      blank[list(layers_by_round)] = 0.0
      weights: dict[str, np.ndarray] = {}
      for index, layers in layers_by_round.items():
        for layer in layers:
          for source, weight in layer.items():
            if source not in weights:
              weights[source] = blank.copy()
            weights[source][index] += (float(weight) if words.known(weight) else 0.0) / len(layers)
      if weights:
        order = sorted(weights, key=lambda source: (source != "self", -np.nansum(weights[source]), source))
        maps.append(heat_maps.AttentionMap(f"{run.tree.title(path)} {how}", [_source(run, s) for s in order],
                                           np.array([weights[source] for source in order])))
  return maps


def _source(run: Run, name: str) -> str:
  path = name.removeprefix("residual of ")
  title = "itself" if name == "self" else run.tree.title(path)
  return title if path == name else f"residual of {title}"


def _attention(run: Run, drawn: list[figures.Chart]) -> Html:
  charts = heat_maps.attention("attention", "Attention weights of each node over the rounds",
                               attention_maps(run))
  drawn += charts
  over = run.record["config"]["key_layers"]["values"]
  meaning = (
    "A weight is how much of that source's update is added to the node's own update, which always counts in full (1); "
    "0 is training alone. At first a node takes its parent's model as it is, which counts 1 in its parent's row; later "
    "that row is the mean of everybody's updates, which counts for all of them. A federation adds the weighted mean of "
    "its members' updates." if over == "updates"
    else "The weights of a round add up to 1; what falls to “itself” is kept."
  )
  return page.charts(charts, f"How much each node took from whom, the mean over key layers. {meaning} Sources that "
                     "were never used are left out, and so are nodes that took nothing.")


def _routes(run: Run, drawn: list[figures.Chart]) -> Html:
  counts: dict[tuple[str, str], int] = {}
  for row in run.rows:
    for found in row.get("residuals_received", ()):
      if found["from"] in run.tree.paths and found["from"] != row["node"]:
        pair = (found["from"], row["node"])
        counts[pair] = counts.get(pair, 0) + 1
  if not counts:
    return Html("")
  chart = tree_charts.routes("routes", "From which node to which node residual layers travelled", run.tree, counts)
  drawn.append(chart)
  left_out = len(counts) - tree_charts.MOST_ROUTES
  few = f" The {tree_charts.MOST_ROUTES} most frequent of {len(counts)} routes." if left_out > 0 else ""
  rows = [[page.breakable(run.tree.title(a)), page.breakable(run.tree.title(b)), str(n)] for (a, b), n in
          sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:200]]
  return page.join([
    page.chart(chart, "Arrows lead from the node whose residual layer it was to the node that received it; the "
               f"thicker, the more often. Solid arrows lead down the page, dashed ones up.{few}"),
    page.details("The routes as a table", page.table(["from", "to", "times"], rows, left=2)),
  ])


def _traffic(run: Run, drawn: list[figures.Chart]) -> Html:
  edges = []
  for path in run.tree.paths:
    node: Mapping[str, Any]
    if run.summary is not None:
      node = run.summary["nodes"][path]
    else:
      node = {name: sum(row[name] for row in run.rows_of(path)) for name in ("bytes_down", "bytes_up")}
    if run.tree.parents[path] is not None:
      edges.append((run.tree.title(path), node["bytes_down"], node["bytes_up"]))
  if not any(down or up for _, down, up in edges):
    return Html("")
  drawn.append(run_charts.traffic("traffic", "Bytes over each node's edge to its parent", edges))
  kind = run.record["config"].get("payload", "float32")
  return page.chart(drawn[-1], f"Over each node's edge to its parent, all rounds together, as {kind}.")


def _time(run: Run, drawn: list[figures.Chart]) -> Html:
  if run.summary is None or not run.summary["seconds"]:
    return Html("")
  drawn.append(run_charts.time("time", "Seconds by activity", run.summary["seconds"]))
  return page.chart(drawn[-1], "Compiling happens once for each kind of phase.")


def _configuration(run: Run) -> Html:
  record = run.record
  changed = [(page.code(name), page.code(value), words.UNKNOWN if default is None else page.code(default))
             for name, value, default in changed_settings(record["config"])]
  own = [(page.breakable(run.tree.title(path)), page.code(name), page.code(value), page.code(above))
         for path, name, value, above in own_settings(run)]
  parts = [page.tag("h3", "What differs from the defaults"),
           page.table(["field", "value", "default"], changed, left=3) if changed else page.paragraph("Nothing.")]
  if own:
    shown = page.table(["node", "setting", "value", "its parent's"], own, left=4)
    heading = "Where nodes do not do as their parents"
    parts += [page.tag("h3", heading), shown] if len(own) <= 20 else [page.details(f"{heading} ({len(own)})", shown)]
  versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
  parts += [
    page.tag("h3", "Versions"), page.paragraph(versions),
    page.paragraph("Commit ", page.code(record["commit"]) if record.get("commit") else "not known", "; devices: ",
                   ", ".join(map(str, record.get("devices", []))) or "not known"),
    page.details("The whole configuration", page.listing({k: record[k] for k in ("config", "nodes")})),
  ]
  return page.join(parts)
