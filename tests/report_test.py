"""The report: one page that stands by itself, whatever names, sizes and gaps the files of a run have."""

import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from worldlm_jax import checks, config as c, federation as federation_lib, metrics, records, report, verdicts, workdir
from worldlm_jax.reporting import comparison_page, figures, files, heat_maps, page, run_page, words
from worldlm_jax.scoring import Score

HOSTILE = ("<script>alert(1)<", "\"><img src=x onerror=alert(2)>", "$\\frac{a}$", "a&amp;b", "\x00\x1b[31m",
           "东南亚 ไทย", "a-name-of-sixty-characters-that-goes-on-and-on-until-the-end-xx", "\ud800", "{0} %s")
SECONDS = {"training": 70.0, "compiling": 12.5, "aggregating": 0.0}


def node(name: str, *children: c.Node, text: bool = True) -> c.Node:
  return c.Node(name, c.Files("texts") if text else None, list(children))


def small_tree() -> c.Node:
  return node("world", node("law", node("eu"), node("uk"), text=False), node("code", node("python")), text=False)


def wide_tree(branching: tuple[int, ...], name: str = "n") -> c.Node:
  """As many children at each level; the leaves have text."""
  if not branching:
    return node(name)
  return node(name, *(wide_tree(branching[1:], f"{name}{i}") for i in range(branching[0])), text=False)


def config_of(root: c.Node, rounds: int, **fields: Any) -> c.Config:
  return c.Config(rounds=rounds, federation=c.FederationConfig(root=root), **fields)


def score(draw: random.Random, base: float) -> dict[str, float]:
  return records.score_record(Score(base + draw.uniform(-0.03, 0.03), 1), 1.5)


def rows_of(config: c.Config, federation: federation_lib.Federation, rounds: int, gain: float) -> list[dict[str, Any]]:
  """As a run writes them: losses that fall, attention among siblings, a residual layer here and there."""
  draw = random.Random(f"{config.seed} {gain}")
  found = []
  for index in range(rounds):
    rows = records.blank(federation, index)
    for member in federation.members:
      row = rows[member.path]
      children = [m.path for m in federation.members if m.parent == member.path]
      siblings = [m.path for m in federation.members if m.parent == member.parent and m.path != member.path]
      row["tokens"] = 1000 * (index + 1) if member.data else 0
      if member.parent is not None and gain:
        row |= {"bytes_down": 1_724_160, "bytes_up": 1_724_160 * draw.choice([1, 3])}
        row["attention_down"] = [{p: draw.random() / 4 for p in siblings} | {f"residual of {member.parent}": 0.2}] * 2
      if children:
        row["attention_up"] = [{p: 1 / len(children) for p in children}] * 2
      if member.data:
        base = 2.2 + 2 * math.exp(-index) - gain
        row |= {"received": score(draw, base + 0.3), "personalised": score(draw, base)}
        if index:
          origin = draw.choice([m for m in federation.members if m is not member] or [member])
          row["residuals_received"] = [{"layer": 0, "from": origin.path, "made_in_round": index - 1}]
    found += rows.values()
  return found


def summary_of(config: c.Config, federation: federation_lib.Federation, rows: list[dict[str, Any]]) -> dict[str, Any]:
  last = {row["node"]: row for row in rows}
  texts = [m.path for m in federation.members if m.data]
  sent = {m.path: [sum(r[name] for r in rows if r["node"] == m.path) for name in ("bytes_down", "bytes_up")]
          for m in federation.members}
  data = {path: {"bytes_per_token": 1.5, "floor": records.score_record(Score(1.7, 1), 1.5),
                 "compressor": {"name": "xz", "bits_per_byte": 2.4}} for path in texts}
  found = records.summary(federation, {path: row["tokens"] for path, row in last.items()}, sent,
                          {path: last[path]["received"] for path in texts},
                          {path: last[path]["personalised"] for path in texts}, SECONDS, data)
  draw = random.Random(config.seed)
  grid = [[draw.uniform(8, 9) + 4 * (model.path != corpus) for corpus in texts] for model in federation.members]
  matrix = {"models": [m.path for m in federation.members], "corpora": texts, "perplexity": grid}
  fair = {"initial_parameters": "ab12", "batches": dict.fromkeys(texts, "cd"), "evaluation": dict.fromkeys(texts, "ef")}
  return found | {"matrix": matrix, "fairness": fair}


def write_run(folder: Path, config: c.Config, *, rounds: int | None = None, gain: float = 0.1) -> verdicts.Run:
  """A run's folder; unfinished where `rounds` are fewer than the config's."""
  folder.mkdir(parents=True, exist_ok=True)
  federation = federation_lib.resolve(config)
  rounds = config.rounds if rounds is None else rounds
  rows = rows_of(config, federation, rounds, gain)
  environment = {"versions": {"jax": "1.2.3"}, "commit": "c0ffee", "devices": ["cpu:0"]}
  metrics.write_json(folder / "config.json", workdir.describe(config, federation, {}) | environment)
  (folder / "metrics.jsonl").unlink(missing_ok=True)
  metrics.append_jsonl(folder / "metrics.jsonl", rows)
  summary = summary_of(config, federation, rows) if rounds == config.rounds else None
  if summary is not None:
    metrics.write_json(folder / "summary.json", summary)
  return verdicts.Run(summary, rows)


def write_comparison(folder: Path, root: c.Node, gains: dict[str, float | None], seeds: tuple[int, ...] = (0, 1, 2),
                     rounds: int = 3, alone: str | None = "local", with_runs: tuple[str, ...] = ("worldlm",)) -> None:
  """A comparison's folder; an entry whose gain is None has diverged in its last seed."""
  folder.mkdir(parents=True, exist_ok=True)
  federation = federation_lib.resolve(config_of(root, rounds))
  runs: dict[str, list[verdicts.Run]] = {}
  listed = []
  for name, gain in gains.items():
    for seed in seeds:
      place = f"runs/{name}/seed{seed}"
      config = config_of(root, rounds, seed=seed)
      if name in with_runs:
        found = write_run(folder / place, config, gain=gain or 0.0)
      else:
        rows = rows_of(config, federation, rounds, gain or 0.0)
        found = verdicts.Run(summary_of(config, federation, rows), rows)
      runs.setdefault(name, []).append(verdicts.Run(None, found.rows) if gain is None and seed == seeds[-1] else found)
      listed.append({"entry": name, "seed": seed, "workdir": place, "seconds": 80.0})
  texts = [m.path for m in federation.members if m.data]
  results = verdicts.results(runs, texts)
  metrics.write_json(folder / "comparison.json", {
    "own": "worldlm", "alone": alone, "seeds": list(seeds), "runs": listed, "results": results,
    "entries": {name: {"algorithm": name, "overrides": {"node.local_steps": 3} if gain else {}}
                for name, gain in gains.items()},
    "nodes": {m.path: {"parent": m.parent, "name": m.name, "has_text": m.data is not None, "train_tokens": 9000,
                       "epochs": 0.7, "floor": None} for m in federation.members},
    "verdicts": [verdicts.verdict(path, {name: found for name, found in results.items() if name != "centralized"},
                                  "worldlm", alone) for path in texts],
    "fairness": {"tokens": 9000, "initial_parameters": "ab12"},
  })


class Page(HTMLParser):
  """What a browser makes of a page: its elements, its text, and whether everything that is opened is closed."""

  VOID = frozenset({"meta", "link", "br", "wbr", "hr", "img"})

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.words: list[str] = []
    self.open: list[str] = []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
    self.tags.append((tag, dict(attributes)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
    self.tags.append((tag, dict(attributes)))

  def handle_endtag(self, tag: str) -> None:
    assert self.open.pop() == tag

  def handle_data(self, data: str) -> None:
    if not self.open or self.open[-1] != "style":
      self.words.append(data)

  @property
  def text(self) -> str:
    return re.sub(r"\s+", " ", "".join(self.words))


def made(folder: Path, every_run: bool = False) -> Page:
  return Page(report.report(folder, every_run).read_text(encoding="utf-8"))


def attributes(found: Page, name: str) -> list[str]:
  return [value for _, given in found.tags for key, value in given.items() if key == name and value is not None]


def assert_stands_by_itself(found: Page) -> None:
  """Nothing comes in from outside, nothing runs, and every reference within the page leads somewhere."""
  assert {tag for tag, _ in found.tags}.isdisjoint({"script", "iframe", "object", "embed", "form", "img", "b"})
  assert not [key for _, given in found.tags for key in given if key.startswith("on")]
  ids = attributes(found, "id")
  assert len(ids) == len(set(ids))
  for value in [*attributes(found, "href"), *attributes(found, "xlink:href"), *attributes(found, "src")]:
    assert value.startswith(("#", "data:image/", "./runs/", "../")), value
    assert not value.startswith("#") or value[1:] in ids
  for value in [v for _, given in found.tags for v in given.values() if v and "url(" in v]:
    assert "url(" not in value.replace("url(#", "")
    assert all(name in ids for name in re.findall(r"url\(#([^)]*)\)", value))
  assert not re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]", found.text)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A finished run with its report."""
  folder = tmp_path_factory.mktemp("runs") / "small"
  write_run(folder, config_of(small_tree(), 3, node=c.NodeSettings(local_steps=7)))
  report.report(folder)
  return folder


def test_a_run_gets_one_page_and_pictures(run_folder: Path) -> None:
  found = Page((run_folder / "report.html").read_text(encoding="utf-8"))
  assert_stands_by_itself(found)
  summary = json.loads((run_folder / "summary.json").read_text())
  tree = summary["tree"]
  for expected in (f"{tree['personalised']['mean']['perplexity']:.2f}", f"{tree['received']['mean']['perplexity']:.2f}",
                   f"{tree['personalised']['worst']['node']}, personalised", "c0ffee", "node.local_steps",
                   "3 of 3 rounds", "Every model on every text", "xz, a compressor", "entropy of the language",
                   "residual of world", "train", "unfinished"):
    assert (expected in found.text) == (expected != "unfinished"), expected
  charts = {path.stem: path.read_bytes() for path in (run_folder / "report").iterdir()}
  assert charts.keys() == {"tree", "curves", "matrix", "attention", "routes", "traffic", "time"}
  for png in charts.values():
    assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20]) == round(figures.NARROW * figures.PNG_DPI)
  svgs = [given for tag, given in found.tags if tag == "svg"]
  assert len(svgs) == 2 * len(charts) and all(given["aria-label"] for given in svgs)  # light and dark


def test_the_same_files_give_the_same_bytes(run_folder: Path) -> None:
  before = {path: path.read_bytes() for path in [run_folder / "report.html", *(run_folder / "report").iterdir()]}
  report.report(run_folder)
  assert all(path.read_bytes() == content for path, content in before.items())


def test_names_are_shown_and_never_obeyed(tmp_path: Path) -> None:
  first, *others = HOSTILE
  root = node("<b>root</b>", node(first, node("script>")), *map(node, others))
  write_run(tmp_path, config_of(root, 2))
  found = made(tmp_path)
  assert_stands_by_itself(found)
  shown = ("<script>alert(1)</script>", *HOSTILE[1:4], "<b>root</b>", "东南亚 ไทย", "\ufffd\ufffd[31m", HOSTILE[6])
  for expected in shown:
    assert expected in found.text, expected


@pytest.mark.parametrize(("root", "rounds"), [
  (node("alone"), 1), (wide_tree((1, 1, 1, 1, 1)), 2),
  pytest.param(wide_tree((4, 16)), 40, marks=pytest.mark.exhaustive),
], ids=["one node, one round", "six levels", "69 nodes"])
def test_trees_of_any_shape(tmp_path: Path, root: c.Node, rounds: int) -> None:
  run = write_run(tmp_path, config_of(root, rounds))
  found = made(tmp_path)
  assert_stands_by_itself(found)
  assert run.summary is not None
  for entry in run.summary["nodes"].values():
    if "personalised" in entry:
      assert f"{entry['personalised']['perplexity']:.2f}" in found.text


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
  config = config_of(small_tree(), 5)
  run = write_run(tmp_path, config, rounds=2)
  found = made(tmp_path)
  assert_stands_by_itself(found)
  assert "This run is unfinished: 2 of 5 rounds are recorded" in found.text
  assert f"{run.rows[-1]['personalised']['perplexity']:.2f}" in found.text
  write_run(tmp_path, config, rounds=0)
  metrics.write_json(tmp_path / "stopped.json", {"reason": "the loss <is> NaN"})
  found = made(tmp_path)
  assert "stopped and cannot go on: the loss <is> NaN" in found.text


def test_what_is_not_known_is_a_dash(tmp_path: Path) -> None:
  write_run(tmp_path, config_of(small_tree(), 2))
  summary = json.loads((tmp_path / "summary.json").read_text())
  for entry in [e for e in summary["nodes"].values() if "data" in e]:
    entry["personalised"] |= {"bits_per_byte": None, "perplexity": None}
    entry["data"] |= {"bytes_per_token": None}
  summary["tree"]["personalised"]["mean"] |= {"bits_per_byte": None, "perplexity": None}
  summary["matrix"]["perplexity"][0] = [None] * 4
  metrics.write_json(tmp_path / "summary.json", summary)
  found = made(tmp_path)
  assert_stands_by_itself(found)
  assert not re.search(r"\b(nan|None|inf)\b", found.text.partition("The whole configuration")[0])
  assert "xz" not in found.text and "entropy of the language" in found.text


@pytest.mark.parametrize(("files_there", "message"), [
  ({}, "expected a folder that holds a run (config.json) or a comparison (comparison.json)"),
  ({"runs/worldlm/seed0/config.json": "{}"}, "a comparison writes its file at the end: run it again to finish it"),
  ({"config.json": "{"}, "config.json: expected readable JSON"),
  ({"config.json": '{"config": 1}'}, "config.json: missing=['nodes', 'versions']"),
  ({"comparison.json": "[]"}, "comparison.json: type='list': expected a JSON object; make the run"),
])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, files_there: dict[str, str], message: str) -> None:
  for name, content in files_there.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
  with pytest.raises(checks.InputError) as caught:
    report.report(tmp_path)
  assert message in str(caught.value)
  assert not (tmp_path / "report.html").exists()


def test_the_command(tmp_path: Path) -> None:
  write_run(tmp_path / "run", config_of(node("alone"), 1))
  command = [sys.executable, "-m", "worldlm_jax.report"]
  done = subprocess.run([*command, f"--workdir={tmp_path / 'run'}"], capture_output=True, text=True, timeout=600)
  assert (done.returncode, done.stdout, done.stderr) == (0, f"report: {tmp_path / 'run' / 'report.html'}\n", "")
  done = subprocess.run([*command, f"--workdir={tmp_path}"], capture_output=True, text=True, timeout=600)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith(f"error: --workdir={str(tmp_path)!r}: expected a folder")
  assert done.stderr.count("\n") == 1


def test_a_missing_matplotlib_is_one_line(run_folder: Path) -> None:
  without = "import runpy, sys; sys.modules['matplotlib'] = None; "
  without += "runpy.run_module('worldlm_jax.report', run_name='__main__')"
  done = subprocess.run([sys.executable, "-c", without, f"--workdir={run_folder}"], capture_output=True, text=True,
                        timeout=600)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == ("error: matplotlib is not installed, with which the charts are drawn: "
                         "pip install 'worldlm_jax[report]'\n")


GAINS: dict[str, float | None] = {"fedavg": 0.05, "local": 0.0, "worldlm": 0.15}


def test_a_comparison_says_what_joining_does(tmp_path: Path) -> None:
  write_comparison(tmp_path, small_tree(), GAINS)
  found = made(tmp_path)
  assert_stands_by_itself(found)
  content = json.loads((tmp_path / "comparison.json").read_text())
  gains = [v["own_gain_percent"]["mean"] for v in content["verdicts"]]
  assert min(gains) > 0 and f"worldlm is better than training alone for {len(gains)} of the 4 nodes" in found.text
  assert "and worse for none." in found.text and found.text.count("Joining helps, beyond the noise") >= 3
  for gain in gains:
    assert f"{gain:+.1f} ±" in found.text
  for name in GAINS:
    stat = content["results"][name]["tree"]["personalised"]["mean"]["perplexity"]
    assert f"{stat['mean']:.2f} ± {stat['standard_error']:.2f}" in found.text
  assert "./runs/worldlm/seed0/report.html" in attributes(found, "href")
  assert {path.stem for path in (tmp_path / "report").iterdir()} == {"nodes", "tree", "curves", "cost", "matrix"}
  single = Page((tmp_path / "runs/worldlm/seed0/report.html").read_text(encoding="utf-8"))
  assert_stands_by_itself(single)
  assert "../../../report.html" in attributes(single, "href") and "worldlm, seed 0" in single.text
  assert not (tmp_path / "runs/worldlm/seed1/report.html").exists()


def test_all_runs_get_a_report_when_asked(tmp_path: Path) -> None:
  write_comparison(tmp_path, node("alone"), GAINS, seeds=(0,), rounds=1, with_runs=("worldlm", "local"))
  found = made(tmp_path, every_run=True)
  links = [href for href in attributes(found, "href") if href.endswith("report.html")]
  assert sorted(links) == ["./runs/local/seed0/report.html", "./runs/worldlm/seed0/report.html"]
  assert all((tmp_path / link).exists() for link in links)
  assert "joining helps, by this one seed" in found.text.lower()


@pytest.mark.parametrize(("gains", "alone", "expected"), [
  (GAINS | {"fedavg": None}, "local", "fedavg (diverged)"),
  (GAINS | {"worldlm": None}, "local", "worldlm diverged with at least one of the seeds"),
  (GAINS | {"local": None}, "local", "Not known"),
  (GAINS, None, "best option"),
], ids=["another diverged", "own diverged", "alone diverged", "nobody alone"])
def test_comparisons_with_gaps(
  tmp_path: Path, gains: dict[str, float | None], alone: str | None, expected: str
) -> None:
  write_comparison(tmp_path, wide_tree((2,)), gains, seeds=(0, 1), rounds=2, alone=alone, with_runs=())
  found = made(tmp_path)
  assert_stands_by_itself(found)
  assert expected in found.text
  assert not re.search(r"\b(nan|None)\b", found.text)


def test_pooled_training_is_shown_but_is_no_option_of_a_node(tmp_path: Path) -> None:
  write_comparison(tmp_path, small_tree(), {"local": 0.0, "centralized": 0.3, "worldlm": 0.2}, with_runs=())
  assert "centralized" in made(tmp_path).text
  assert "best option" in made(tmp_path).text


def test_a_comparison_on_artificial_languages_shows_their_entropy(tmp_path: Path) -> None:
  write_comparison(tmp_path, small_tree(), {"local": 0.0, "worldlm": 0.2}, with_runs=())
  assert "entropy floor" not in made(tmp_path).text
  content = json.loads((tmp_path / "comparison.json").read_text())
  content["nodes"]["law/uk"]["floor"] = {"perplexity": 3.25, "bits_per_byte": 1.7}
  metrics.write_json(tmp_path / "comparison.json", content)
  shown = made(tmp_path).text
  assert "entropy floor" in shown and "3.25" in shown


def test_runs_outside_the_comparison_are_not_touched(tmp_path: Path) -> None:
  write_comparison(tmp_path / "comparison", node("alone"), GAINS, seeds=(0,), rounds=1, with_runs=())
  write_run(tmp_path / "elsewhere", config_of(node("alone"), 1))
  content = json.loads((tmp_path / "comparison/comparison.json").read_text())
  content["runs"][-1]["workdir"] = "../elsewhere"
  metrics.write_json(tmp_path / "comparison/comparison.json", content)
  with pytest.raises(checks.InputError, match="a folder within the comparison's"):
    report.report(tmp_path / "comparison")
  assert not (tmp_path / "elsewhere/report.html").exists()


def test_attention_is_the_mean_over_layers_of_rounds_that_attended(tmp_path: Path) -> None:
  write_run(tmp_path, config_of(node("top", node("a"), node("b")), 3))
  rows = metrics.read_jsonl(tmp_path / "metrics.jsonl")
  for row in rows:
    row.pop("attention_down", None)
    row.pop("attention_up", None)
    if row["node"] == "a" and row["round"] != 1:
      row["attention_down"] = [{"b": 0.25, "self": 0.5}, {"residual of .": 0.75, "self": 0.5} if row["round"] else {}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  found, = run_page.attention_maps(files.load_run(tmp_path))
  assert (found.title, found.sources) == ("a takes in on the way down", ["itself", "residual of top", "b"])
  assert [[None if math.isnan(v) else v for v in line] for line in found.weights] == [
    [0.25, None, 0.5], [0.0, None, 0.375], [0.125, None, 0.125]
  ]
  fewer = heat_maps.AttentionMap("x", list("abcd"), found.weights[[0, 1, 2, 2]]).most(2)
  assert fewer.sources == ["a", "b", "2 others"] and fewer.weights[2].tolist()[::2] == [0.25, 0.25]


def test_mean_curves_take_each_nodes_latest_score() -> None:
  curves = {"a": {"personalised": [4.0, 2.0, None, None]}, "b": {"personalised": [None, None, 8.0, 6.0]},
            "without": {"personalised": [None] * 4}}
  found = comparison_page.mean_curve(curves)
  assert [math.isnan(value) for value in found] == [True, True, False, False] and found[2:] == [5.0, 4.0]


def test_references_are_in_perplexity_per_token() -> None:
  data = {"bytes_per_token": 2.0, "compressor": {"name": "xz", "bits_per_byte": 3.0}, "floor": {"perplexity": 9.0}}
  assert run_page.references(data) == {"entropy of the language": 9.0, "xz, a compressor": 64.0}
  assert run_page.references(data | {"bytes_per_token": None}) == {"entropy of the language": 9.0}


def test_settings_that_differ_are_found(tmp_path: Path) -> None:
  root = c.Node("top", None, [c.Node("a", c.Files("t"), settings={"local_steps": 3}), c.Node("b", c.Files("t"))])
  write_run(tmp_path, config_of(root, 1, model=c.ModelConfig(num_layers=5)))
  run = files.load_run(tmp_path)
  assert files.changed_settings(run.record["config"]) == [("rounds", 1, 10), ("model.num_layers", 5, 4)]
  assert files.own_settings(run) == [("a", "local_steps", 3, 20)]


def test_paths_make_a_tree_depth_first() -> None:
  parents = {"./": None, "b": "./", "a": "./", ".": "./", "b/x": "b", "a/y": "a", "b/x/z": "b/x"}
  nodes = {path: {"parent": parent, "name": path.rpartition("/")[2] if path[0] != "." else "root"}
           for path, parent in parents.items()}
  tree = files.Tree.of(nodes)
  assert tree.paths == ("./", "b", "b/x", "b/x/z", "a", "a/y", ".") and tree.num_levels == 4
  assert (tree.children["b"], tree.name("b/x"), tree.depth("b/x/z")) == (["b/x"], "x", 3)
  assert [tree.title(path) for path in ("./", ".", "b/x")] == ["root/", "root", "b/x"]


def test_names_are_shortened_to_what_fits() -> None:
  assert words.shorten("abcdefgh", 5) == "ab…gh" and words.shorten("abc", 5) == "abc"
  for length in (0.4, 1.0, 3.0):
    shown = figures.fit("W" * 30 + "i" * 30, length, 9)
    assert figures.text_width(shown, 9) <= length and "…" in shown
  assert figures.fit("short", 3.0, 9) == "short"


def test_numbers_are_short() -> None:
  assert [words.size(v) for v in (0, 999, 1_724_160, 3.5e9, None)] == ["0 B", "999 B", "1.72 MB", "3.5 GB", "\u2013"]
  assert [words.perplexity(v) for v in (7.1234, 198.2, 54321.0, 3e7, math.nan)] == [
    "7.12", "198.2", "54,321", "3.0e+07", "\u2013"]
  assert words.percent_with_error({"mean": -4.21, "standard_error": 0.5}) == "\u22124.2 ± 0.5 %"
  assert words.percent_with_error({"mean": 1.0, "standard_error": None}) == "+1.0 %"
  assert [words.duration(v) for v in (2.5, 73, 600, 9000)] == ["2.5 s", "73 s", "10 min", "2.5 h"]


def test_everything_but_html_is_escaped() -> None:
  assert page.tag("p", "<i>", page.Html("<i>"), class_='"') == '<p class="&quot;">&lt;i&gt;<i></p>'
  assert page.breakable("a/b<c") == "a/<wbr>b&lt;c"


def test_the_matrix_stands_in_the_order_of_the_tree() -> None:
  content = {"models": [".", "a", "b", "a/x"], "corpora": ["b", "a/x"], "perplexity": [[1, 2], [3, 4], [5, 6], [7, 8]]}
  titles = {path: path for path in (".", "a", "a/x", "b")}
  found = Page(run_page.matrix_section(content, titles, [], "note"))
  words_of_the_table = "".join(found.words).partition("as a table")[2].split()
  assert " ".join(words_of_the_table) == "modela/xb.2.001.00 a4.003.00 a/x8.007.00 b6.005.00"
