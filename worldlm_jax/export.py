"""Writes models of a run as Hugging Face folders: weights, tokenizer and a card that says where they come from.

  python -m worldlm_jax.export --workdir=runs/quickstart --node=code/network --out=exported/network
  python -m worldlm_jax.export --workdir=runs/quickstart --all --out=exported --max_shard_size=2GB

A folder loads as LlamaForCausalLM in transformers, and --config.model.init_from=FOLDER continues from it. Needs the
extra `export`.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from worldlm_jax import checks, command, model_card, released, tree_sources
from worldlm_jax.data import tokenizer_files
from worldlm_jax.model import llama

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
AT_ONCE_BYTES = 8 * 10**9  # of parameters that are in memory at a time, if one model is not more
SPECIAL = {".": "root", "..": "server"}  # folders of the nodes whose paths are none


def export(
  workdir: str | Path, paths: Sequence[str], out: str | Path, *, max_shard_size: str = "5GB", tokenizer: str = "",
  say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
  """Writes models.

  Args:
    workdir: of the run.
    paths: of the nodes. One is written to `out` itself; of several, each to the folder below that has its path ("root",
      or "server" of an algorithm that puts one above the tree; "law/+" is the federation whose own text is "law").
      None at all means all of them, each below `out`.
    out: a new or empty folder. It is there once everything is written.
    max_shard_size: weights are spread over files of at most so much, such as "500MB".
    tokenizer: where the run's tokenizer is, if it has moved.
    say: is told what is written.

  Returns:
    The models' folders.

  Raises:
    checks.InputError: bad input; nothing has been written.
    OSError: no space, or no right to write.
  """
  limit, target = _bytes(max_shard_size), Path(out).expanduser()
  run = released.open_run(workdir)
  chosen = list(paths or run.tree.paths)
  released.check_nodes(run, chosen)
  folders = {path: Path() if len(paths) == 1 else _folder(path) for path in chosen}
  checks.require(len(set(folders.values())) == len(chosen), "--nodes", chosen, "nodes whose folders differ",
                 "export them one by one")
  checks.require(not target.exists() or (target.is_dir() and not any(target.iterdir())), "--out", str(out),
                 "a new or empty folder", "choose another")
  partial = target.with_name(target.name + ".new")
  if partial.exists():
    shutil.rmtree(partial)
  try:
    while chosen:
      first = released.load(workdir, chosen[0], tokenizer=tokenizer, say=say)
      count = max(1, AT_ONCE_BYTES // llama.total_bytes(first.arch))
      several = released.load_nodes(workdir, chosen[:count], tokenizer=tokenizer, say=say) if count > 1 else [first]
      for model in several:
        write(model, partial / folders[model.path], limit)
        say(f"{model.path}: {target / folders[model.path]}")
      chosen = chosen[count:]
    if target.exists():
      target.rmdir()
    partial.replace(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return [target / folder for folder in folders.values()]


def write(model: released.Released, folder: Path, max_shard_bytes: int) -> None:
  """Writes one model into a folder, which is made."""
  folder.mkdir(parents=True, exist_ok=True)
  length, separator = model.config.data.sequence_length, model.tokenizer.separator_id
  ids = {"bos_token_id": separator, "eos_token_id": separator}
  llama.write(folder, model.arch, model.params, max_shard_bytes, ids | {"max_position_embeddings": length})
  tokenizer_files.write(folder, model.tokenizer, length)
  (folder / "generation_config.json").write_text(json.dumps(ids | {"do_sample": True}, indent=2) + "\n", "utf-8")
  (folder / "README.md").write_text(model_card.make(model), encoding="utf-8")


def _folder(path: str) -> Path:
  ok = path in (*SPECIAL, "./") or all(map(tree_sources.is_name, path.removesuffix("/").split("/")))
  checks.require(ok, "--node", path, "a node whose path can be that of a folder", "export it alone, without --all")
  return Path(SPECIAL.get(path) or (f"{path}+" if path.endswith("/") else path))


def _bytes(text: str) -> int:
  found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B)", text.strip().upper())
  checks.require(found is not None and float(found[1]) > 0, "--max_shard_size", text, "a size such as 500MB or 5GB")
  assert found is not None
  return int(float(found[1]) * UNITS[found[2]])


def define_flags() -> None:
  """Defines the flags."""
  flags.DEFINE_string("workdir", None, "Folder of the run.")
  flags.DEFINE_string("out", None, "Folder to write; new or empty.")
  flags.DEFINE_list("node", [], "Path of the node; the root is '.'. Of several, each gets a folder of its own.")
  flags.DEFINE_bool("all", False, "All nodes, each into a folder of its own.")
  flags.DEFINE_string("max_shard_size", "5GB", "Weights are spread over files of at most so much.")
  flags.DEFINE_string("tokenizer", "", "Where the run's tokenizer is now, if it has moved.")


def main(_: list[str]) -> int:
  """Runs the command of the flags and returns the exit code."""
  values = flags.FLAGS
  try:
    checks.require(bool(values.node) != values.all, "--node", values.node, "nodes in --node, or --all of them",
                   "the root is '.'")
    export(values.workdir, values.node, values.out, max_shard_size=values.max_shard_size, tokenizer=values.tokenizer,
           say=lambda line: print(line, file=sys.stderr if "damaged" in line else sys.stdout))
  except (checks.InputError, OSError) as error:
    return command.failed(error)
  return command.OK


if __name__ == "__main__":
  define_flags()
  command.start(main, command.Flags("workdir", "out"))
