"""Continues a prompt with the model of one node of a run, or with those of several, side by side.

  python -m worldlm_jax.generate --workdir=runs/quickstart --node=code/network --prompt="def connect("
  python -m worldlm_jax.generate --workdir=runs/quickstart --nodes=.,prose,code --prompt="The value of" \\
      --temperature=0.7 --top_p=0.9 --max_tokens=120 --seed=3

Ends where a model ends the document, or after --max_tokens.
"""

import contextlib
import itertools
import sys
import unicodedata
from collections.abc import Iterator, Sequence

import jax
from absl import flags
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from worldlm_jax import checks, command, compiled, generation, released

NARROWEST = 28  # columns on the screen that a model needs to stand beside others


def streams(
  models: Sequence[released.Released], prompt: str, sampling: generation.Sampling, max_tokens: int, seed: int
) -> list[Iterator[str]]:
  """What each model adds to the prompt, in pieces, as they are drawn."""
  generation.check(sampling, max_tokens)

  def stream(model: released.Released) -> Iterator[str]:
    ids = generation.prompt_ids(model.tokenizer, prompt)
    drawn = generation.tokens(model.arch, jax.device_put(model.params), ids, model.tokenizer.vocab_size,
                              sampling=sampling, max_tokens=max_tokens, seed=seed)
    return generation.text(model.tokenizer, ids, generation.until(drawn, model.tokenizer.separator_id))

  return [stream(model) for model in models]


def warnings(model: released.Released, prompt: str, max_tokens: int) -> list[str]:
  """What a person should know before reading."""
  trained, last = model.config.data.sequence_length, len(generation.prompt_ids(model.tokenizer, prompt)) + max_tokens
  said = []
  if last > trained:
    said.append(f"note: this model was trained on windows of {trained} tokens; what comes after so many, prompt "
                "included, is at positions that it has never seen, and gets worse")
  if not model.is_final:
    said.append(f"note: the run is not finished; this is its model after {model.round} round(s)")
  return said


def show(models: Sequence[released.Released], prompt: str, added: Sequence[Iterator[str]], console: Console) -> None:
  """Writes what models add to a prompt, while they do: of one as it is, of several in columns or, if there is no room
  or no terminal, one below the other."""
  if len(models) == 1:
    for piece in itertools.chain([prompt], added[0]):
      print(_printable(piece, console), end="", flush=True)
    print()
    return
  texts = [Text(_printable(prompt, console), style="dim") for _ in models]
  titles = [model.path for model in models]
  live = Live(console=console, refresh_per_second=12) if console.is_terminal else None
  with live or contextlib.nullcontext():
    for pieces in itertools.zip_longest(*added, fillvalue=""):
      for text, piece in zip(texts, pieces, strict=True):
        text.append(_printable(piece, console), style="not dim")
      if live:
        live.update(_arranged(titles, texts, console.width))
  if not live:
    console.print(_arranged(titles, texts, 0))


def _arranged(titles: Sequence[str], texts: Sequence[Text], width: int) -> RenderableType:
  if width < NARROWEST * len(texts):
    return Group(*(Panel(text, title=title, title_align="left", box=box.ROUNDED if width else box.ASCII)
                   for title, text in zip(titles, texts, strict=True)))
  table = Table(*titles, box=box.SIMPLE, expand=True)
  for column in table.columns:
    column.ratio, column.overflow = 1, "fold"
  table.add_row(*texts)
  return table


def _printable(piece: str, console: Console) -> str:
  """Models trained on bytes may write what steers a terminal."""
  if not console.is_terminal:
    return piece
  return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else generation.REPLACEMENT for c in piece)


def define_flags() -> None:
  """Defines the flags."""
  flags.DEFINE_string("workdir", None, "Folder of the run.")
  flags.DEFINE_string("node", "", "Path of the node; the root is '.'.")
  flags.DEFINE_list("nodes", [], "Instead of --node: several, side by side.")
  flags.DEFINE_string("prompt", "", "Beginning of the document; may be empty.")
  flags.DEFINE_integer("max_tokens", 200, "How many tokens to add at most.")
  flags.DEFINE_float("temperature", 0.8, "0 always takes the likeliest token, 1 draws as the model says.")
  flags.DEFINE_integer("top_k", 0, "Draw among the so many likeliest tokens; 0: among all.")
  flags.DEFINE_float("top_p", 1.0, "Draw among the likeliest tokens that have this probability together.")
  flags.DEFINE_integer("seed", 0, "Of the draws.")
  flags.DEFINE_string("tokenizer", "", "Where the run's tokenizer is now, if it has moved.")


def main(_: list[str]) -> int:
  """Runs the command of the flags and returns the exit code."""
  values, console = flags.FLAGS, Console()
  compiled.keep()
  try:
    checks.require(bool(values.node) != bool(values.nodes), "--node", values.node,
                   "either one node in --node or several in --nodes", "the root is '.'")
    sampling = generation.Sampling(values.temperature, values.top_k, values.top_p)
    generation.check(sampling, values.max_tokens)
    models = released.load_nodes(
      values.workdir, values.nodes or [values.node], tokenizer=values.tokenizer,
      say=lambda line: print(line, file=sys.stderr),
    )
    for line in warnings(models[0], values.prompt, values.max_tokens):
      print(line, file=sys.stderr)
    show(models, values.prompt, streams(models, values.prompt, sampling, values.max_tokens, values.seed), console)
  except (checks.InputError, OSError, jax.errors.JaxRuntimeError) as error:
    return command.failed(error)
  return command.OK


if __name__ == "__main__":
  define_flags()
  command.start(main, command.Flags("workdir"))
