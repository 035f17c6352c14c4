"""Scores the models of a run's nodes, on given texts or on the tasks of the lm-eval harness.

  python -m worldlm_jax.evaluate --workdir=runs/quickstart --node=code/data --texts=mine.txt,theirs.jsonl
  python -m worldlm_jax.evaluate --workdir=runs/quickstart --nodes=code/data,code/tools --parents \\
      --tasks=arc_easy,piqa,lambada_openai --out=scores.json

A text is a file of documents, or a folder of them: its perplexity and bits per byte are those of windows as in
training. Tasks need the extra `eval`, and the network for their data; docs/evaluate.md has those of the MosaicML
gauntlet. A model is the one that its node uses, from the newest checkpoint, be the run finished or not.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from worldlm_jax import checks, command, compiled, likelihood, metrics, released, text_scores
from worldlm_jax.progress import SECONDS_BETWEEN_PLAIN_LINES

TOKENS_AT_ONCE = 8192


def evaluate(
  workdir: str | Path, nodes: Sequence[str], *, texts: Sequence[str] = (), tasks: Sequence[str] = (),
  task_folder: str = "", num_fewshot: int | None = None, limit: int = 0, tokenizer: str = "",
  tokens_at_once: int = TOKENS_AT_ONCE,
) -> dict[str, Any]:
  """Does what the command does.

  Args:
    workdir: the folder of a run.
    nodes: their paths.
    texts: files or folders of documents.
    tasks: names of the harness's tasks or groups.
    task_folder: with YAML files of more tasks.
    num_fewshot: examples before each question; None for each task's own number.
    limit: documents of each task and windows of each text; 0 for all.
    tokenizer: "bytes" or a file, in the place of where the run found it.
    tokens_at_once: that are predicted at a time on each device.

  Returns:
    What --out gets: by node, what is known of its model, and the scores of each text and each task.

  Raises:
    checks.InputError: bad input, found before any model is scored.
  """
  checks.require(bool(texts) != bool(tasks), "--tasks", list(tasks), "either tasks or --texts", "give one of the two")
  checks.require(limit >= 0, "--limit", limit, "at least 0")
  checks.require(tokens_at_once > 0, "--tokens_at_once", tokens_at_once, "at least 1")
  nodes = list(dict.fromkeys(nodes))
  first = released.load(workdir, nodes[0], tokenizer=tokenizer, say=_say)
  released.check_nodes(first.run, nodes)
  data = first.config.data
  given = {path: text_scores.read(path, first.tokenizer, data) for path in texts}
  loaded = _harness().Tasks(tasks, task_folder, num_fewshot, limit) if tasks else None
  content: dict[str, Any] = {"workdir": str(workdir), "limit": limit, "nodes": {}}
  if tasks:
    content["lm_eval"] = _harness().version()
  for path in nodes:
    node = first if path == first.path else released.load(workdir, path, tokenizer=tokenizer)
    sizes, said = (data.sequence_length, tokens_at_once), _Progress(path)
    found: dict[str, Any] = {"round": node.round, "is_final": node.is_final, "tokens_trained_on": node.tokens}
    if loaded is None:
      scorer = likelihood.Scorer(node.arch, node.params, *sizes, said)
      found["texts"] = {name: text_scores.score(scorer, text, limit) for name, text in given.items()}
    else:
      found["tasks"] = loaded.evaluate(_harness().NodeLM(node.arch, node.params, node.tokenizer, *sizes, said))
    content["nodes"][path] = found
  return content


def with_ancestors(workdir: str | Path, nodes: Sequence[str]) -> list[str]:
  """The nodes, each followed by its parent, that one's parent, and so on up to the root; each node once."""
  run = released.open_run(workdir)
  released.check_nodes(run, nodes)
  found: dict[str, None] = {}
  for node in nodes:
    path: str | None = node
    while path is not None:
      found[path] = None
      path = run.tree.parents[path]
  return list(found)


def show(content: dict[str, Any], console: Console | None = None) -> None:
  """Prints the scores as a table."""
  of_texts = any("texts" in node for node in content["nodes"].values())
  headings = ["text", "perplexity", "bits per byte", "nats per token", "windows"] if of_texts else [
    "task", "metric", "value", "examples", "documents"
  ]
  table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
  for i, heading in enumerate(["node", *headings]):
    table.add_column(heading, justify="left" if i < (2 if of_texts else 3) else "right", overflow="fold")
  for path, node in content["nodes"].items():
    for name, found in node.get("texts", {}).items():
      table.add_row(path, name, f"{found['perplexity']:.3f}", f"{found['bits_per_byte']:.4f}",
                    _with_error(found["loss_nats"], found["standard_error_nats"]), str(found["windows"]))
    for name, found in node.get("tasks", {}).items():
      for metric, score in found["metrics"].items():
        counts = ("-" if found[key] is None else str(found[key]) for key in ("num_fewshot", "documents"))
        table.add_row(path, name, metric, _with_error(score["value"], score["standard_error"]), *counts)
  (console or Console(highlight=False)).print(table)


def _with_error(value: Any, error: float | None) -> str:
  if not isinstance(value, float):
    return str(value)
  return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


class _Progress:
  """Says now and then how much of a node's work is done."""

  def __init__(self, path: str):
    self._path, self._said_at = path, time.monotonic()

  def __call__(self, done: int, of: int) -> None:
    if done < of and time.monotonic() - self._said_at > SECONDS_BETWEEN_PLAIN_LINES:
      self._said_at = time.monotonic()
      _say(f"{self._path}: {done:,} of {of:,} scored")


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _harness() -> Any:
  try:
    from worldlm_jax import harness  # only those who use it wait for it
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lm_eval":
      raise
    raise checks.InputError("lm-eval is not installed, which has the tasks: pip install 'worldlm_jax[eval]'") from error
  return harness


def define_flags() -> None:
  """Defines the flags. Not on import: other commands, which tests import too, have a --workdir of their own."""
  flags.DEFINE_string("workdir", None, "Folder of a run, finished or not.")
  flags.DEFINE_string("node", "", "Path of a node; the root is '.'.")
  flags.DEFINE_list("nodes", [], "Paths of several nodes.")
  flags.DEFINE_bool("parents", False, "Also score the nodes above them, up to the root.")
  flags.DEFINE_list("texts", [], "Files or folders of documents: .txt, .jsonl, .parquet or .array_record.")
  flags.DEFINE_list("tasks", [], "Tasks or groups of lm-eval, such as arc_easy; * stands for anything.")
  flags.DEFINE_string("task_folder", "", "Folder with YAML files of more tasks.")
  flags.DEFINE_integer("num_fewshot", None, "Examples before each question; each task's own number if not given.",
                       lower_bound=0)
  flags.DEFINE_integer("limit", 0, "At most so many documents of each task, or windows of each text; 0: all.")
  flags.DEFINE_integer("tokens_at_once", TOKENS_AT_ONCE, "Roughly how many tokens a device predicts at a time.")
  flags.DEFINE_string("tokenizer", "", "'bytes' or a tokenizer's file, where it is no longer where the run found it.")
  flags.DEFINE_string("out", "", "JSON file to write the scores to.")


def main(_: list[str]) -> int:
  """Runs the command of the flags and returns the exit code."""
  given = flags.FLAGS
  compiled.keep()
  try:
    nodes = [*([given.node] if given.node else []), *given.nodes]
    checks.require(bool(nodes), "--node", given.node, "the path of a node", "or several with --nodes=A,B")
    out = Path(given.out).expanduser()
    if given.out:
      metrics.check_writable("--out", out)
    if given.parents:
      nodes = with_ancestors(given.workdir, nodes)
    content = evaluate(
      given.workdir, nodes, texts=given.texts, tasks=given.tasks, task_folder=given.task_folder,
      num_fewshot=given.num_fewshot, limit=given.limit, tokenizer=given.tokenizer, tokens_at_once=given.tokens_at_once,
    )
    if given.out:
      metrics.write_json(out, content)
  except (checks.InputError, OSError, RuntimeError) as error:
    return command.failed(error, "try a lower --tokens_at_once")
  show(content)
  return command.OK


if __name__ == "__main__":
  define_flags()
  command.start(main, command.Flags("workdir"))
