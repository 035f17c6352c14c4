"""Every block of code in README.md and docs/ does what it says, and every link there leads somewhere.

Blocks of Python are executed. Commands of the package are read by their own flag parsers and their experiments
resolved, tree and all; those in `RUN` are run with tiny settings. What needs a cluster, an account or hours is in
`NOT_RUN`, with the reason.
"""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from worldlm_jax import algorithms, config as c, entries, federation
from worldlm_jax.planning import machines

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
LANGUAGES = ("bash", "diff", "json", "python", "text", "yaml")
FENCE = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"# (\w+\.py)\n")  # a block that is a file begins with its name

COMPILER = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
MODEL = {"num_layers": 2, "d_model": 12, "num_heads": 2, "num_kv_heads": 1, "d_ff": 17, "key_layer_share": 0.5}
TINY = {
  "rounds": 1, "data.sequence_length": 16, "node.local_steps": 1, "node.batch_size": 2, "evaluation.valid_windows": 2,
  "evaluation.test_windows": 2, "evaluation.acceptance_windows": 2, "evaluation.matrix_windows": 1,
  **{f"model.{name}": value for name, value in MODEL.items()},
}
# Algorithms without attention, which takes longest to compile; main_test and compare_test run the same with it.
TINY_RUN = [f"--config.{name}={value}" for name, value in TINY.items()] + ["--config.algorithm=local"]
TINY_COMPARISON = [f"--config.base.{name}={value}" for name, value in TINY.items() if name != "rounds"] + [
  "--config.seeds=0,", "--only=fedavg", "--config.own=fedavg", "--config.alone=",
  "--config.base.evaluation.personalised=last",
]
# (page, words that its command has) -> what makes it tiny.
RUN: dict[tuple[str, str], list[str]] = {
  ("README.md", "worldlm_jax.main --workdir=runs/mine"): TINY_RUN,
  ("README.md", "worldlm_jax.compare"): TINY_COMPARISON,
  ("README.md", "worldlm_jax.report --workdir=runs/comparison"): [],
  ("README.md", "worldlm_jax.evaluate --workdir=runs/mine"): [],
  ("docs/plan.md", "--machine=h100x64 --config.federation.folder="): [],
  ("docs/data.md", "tfds.yaml"): TINY_RUN,
}
# The first words of a command -> why it is neither run nor parsed here.
NOT_RUN = {
  "bash launch/test.sh": "it runs these tests",
  "bash launch/tpu_vm.sh": "needs Google Cloud; launch_test runs it with stand-ins",
  "export ": "settings of launch/tpu_vm.sh",
  "tfds build": "needs the network, and TensorFlow",
  "tensorboard": "waits for a browser",
  "python -m benchmarks.": "benchmarks_test runs them at their smallest size",
  "python -m worldlm_jax.main --config=configs/synthetic.py --config.algorithm=fedatt":
    "the guide's rule is no part of the package; the test of the guide trains it",
  "worldlm train --config=configs/folder.py --config.federation.folder=PATH --workdir=runs/continued":
    "needs a public model; export_test continues from one that it has made",
  "python -m colab.make": "colab_test runs the notebooks with tiny settings",
}
# (page, first line of a block of Python) -> why it is not executed.
NOT_EXECUTED = {
  ("docs/evaluate.md", "from worldlm_jax import evaluate"): "evaluate_test scores models of a run that it has made",
  ("docs/export.md", "from transformers import AutoModelForCausalLM, AutoTokenizer"):
    "export_test loads what it has exported, and compares logits",
}


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced block."""

  page: str
  line: int
  language: str
  text: str
  before: str  # the paragraph above it

  def __str__(self) -> str:
    return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
  """All blocks of a page but directives of the site's generator."""
  text, found = page.read_text(encoding="utf-8"), []
  for match in FENCE.finditer(text):
    if not match[1].startswith("{"):
      above = text[: match.start()].strip().rpartition("\n\n")[2]
      found.append(Block(str(page.relative_to(REPOSITORY)), text.count("\n", 0, match.start()) + 1, match[1], match[3],
                         above))
  return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands_of(block: Block) -> list[list[str]]:
  """The commands of a block of bash, as words, without comments."""
  lines = block.text.replace("\\\n", " ").splitlines()
  return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [(block, words) for block in BLOCKS if block.language == "bash" for words in commands_of(block)]


def of(*languages: str) -> Any:
  """Parametrises a test over the blocks of some languages."""
  chosen = [block for block in BLOCKS if block.language in languages]
  return pytest.mark.parametrize("block", chosen, ids=str)


def package_command(words: list[str]) -> tuple[str, list[str]] | None:
  """The module that a command runs, and its arguments; None where it runs none of ours."""
  while re.match(r"\w+=", words[0]):
    words = words[1:]  # variables
  if words[0] == "srun":
    words = words[1:]
  if re.fullmatch(r"(\.venv/bin/)?python3?", words[0]) and words[1] == "-m":
    return words[2], words[3:]
  if words[0] == "worldlm":
    return "worldlm_jax.__main__", words[1:]
  if words[0].startswith("--"):  # flags alone are the training command's
    return "worldlm_jax.main", ["--config=configs/folder.py", "--config.federation.folder=PATH", *words]
  if words[:2] == ["bash", "launch/quickstart.sh"]:
    return "worldlm_jax.main", ["--config=configs/quickstart.py", "--workdir=DIR", *words[2:]]
  if words[:2] == ["bash", "launch/prepare.sh"]:
    return "worldlm_jax.prepare", words[2:]
  if words[0] == "bash" and "/launch/" in f"/{words[1]}":  # the script's own flags come first
    place = next((i for i, word in enumerate(words) if word.startswith("--config=")), None)
    return None if place is None else ("worldlm_jax.main", words[place:])
  return None


def named_nodes() -> set[str]:
  """The nodes that commands name, which the sample tree needs to have, and a second member of each federation."""
  text = " ".join(word for _, words in COMMANDS for word in words)
  swapped = re.findall(r"'([\w/]+)'", " ".join(re.findall(r"swap\.nodes=(\([^)]*\))", text)))
  found = {*re.findall(r"--node=([\w/]+)\.\w+=", text), *swapped, "medicine/cardiology"}
  return found | {f"{path.rpartition('/')[0]}/others" for path in found if "/" in path}


def write_text(folder: Path, kind: str = "txt") -> None:
  """Documents enough to be split."""
  folder.mkdir(parents=True, exist_ok=True)
  documents = [f"Document {i} of {folder.name}, of wheat, barley and rye: {i * i}." for i in range(99)]
  if kind == "txt":
    (folder / "documents.txt").write_text("\n\n".join(documents), encoding="utf-8")
  else:
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))


@dataclasses.dataclass
class Desk:
  """An empty place to work at, with sample texts, and a process that runs commands there."""

  folder: Path
  server: subprocess.Popen[str]

  def path(self, name: str) -> str:
    return f"{self.folder}/{name}"

  def with_own_paths(self, word: str) -> str:
    """A word of a command, with what stands for a reader's own paths replaced."""
    for pattern, path in (
      (r"(?<==)(PATH|texts|/mnt/shared/texts|/shared/texts)$", "world"), (r"(?<==)FOLDER$", "world"),
      (r"(?<==)FILE$", "small/medicine/documents.txt"),
      (r"(?<==)DIR$", "runs/dir"), (r"(?<==)(/mnt/shared/|/shared/)?runs/", "runs/"),
      (r"(?<==)world\.jsonl$", "world.jsonl"),
      (r"(?<==)(tfds|hf)\.yaml$", r"\1.yaml"), (r"(?<==)runs/bpe\.json$", "bpe.json"), (r"(?<==)data/", "data/"),
    ):
      word = re.sub(pattern, lambda match, path=path: self.path(match.expand(path)), word)
    return re.sub(r"^--config=CONFIG$", "--config=configs/synthetic.py", word)

  def run(self, module: str, arguments: list[str], *, run: bool, folder: Path = REPOSITORY) -> tuple[int, str]:
    """Exit code and output of a command, or of reading its flags."""
    request = {"module": module, "arguments": arguments, "run": run, "folder": str(folder),
               "output": self.path("output"), "environment": {"COLUMNS": "120"}}
    assert self.server.stdin and self.server.stdout
    self.server.stdin.write(json.dumps(request) + "\n")
    self.server.stdin.flush()
    code = int(self.server.stdout.readline())
    return code, Path(self.path("output")).read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
  folder = tmp_path_factory.mktemp("desk")
  for name in named_nodes():
    write_text(folder / "world" / name)
  write_text(folder / "small" / "law" / "eu")
  write_text(folder / "small" / "medicine")
  write_text(folder / "texts" / "mine", "jsonl")
  tagged = [{"text": f"Document {i}", "meta": {"domain": ("law/eu", "law/us")[i % 2]}} for i in range(99)]
  (folder / "world.jsonl").write_text("".join(json.dumps(document) + "\n" for document in tagged))
  for script in (found for block in BLOCKS if (found := SCRIPT.match(block.text))):
    (folder / script[1]).write_text(script.string)
  environment = os.environ | {
    "XLA_FLAGS": COMPILER, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "PYTHONPATH": str(REPOSITORY),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "HF_HUB_OFFLINE": "1",
  }
  server = subprocess.Popen([sys.executable, REPOSITORY / "tests" / "forked_commands.py"], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env=environment)
  with server:  # which then ends, since there is nothing more to read
    yield Desk(folder, server)


def resolved(experiment: Any, desk: Desk) -> None:
  """Resolves a config or a comparison, over the sample texts where it names a folder of somebody else's."""
  base = experiment.base if isinstance(experiment, c.Comparison) else experiment
  if base.federation.folder or base.federation == c.FederationConfig():
    base.federation.folder = desk.path("world")
  if isinstance(experiment, c.Comparison):
    entries.plan(experiment)
  else:
    algorithms.arranged(experiment, federation.resolve(experiment))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_block_says_what_it_is_in(page: Path) -> None:
  """Output and pseudo-code are `text`."""
  for block in blocks_of(page):
    assert block.language in LANGUAGES, f"{block}: mark it as one of {', '.join(LANGUAGES)}"


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "python"}))
def test_python_runs(page: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
  """The blocks of a page one after the other, in one namespace; those that are files are run by others."""
  monkeypatch.chdir(desk.folder)
  names: dict[str, Any] = {"c": c}  # as in a config file, of which many blocks are a part
  for block in BLOCKS:
    if block.page != page or block.language != "python" or "worldlm_jax/" in block.before:
      continue
    if SCRIPT.match(block.text) or (page, block.text.partition("\n")[0]) in NOT_EXECUTED:
      continue
    names.pop("get_config", None)
    exec(compile("\n" * block.line + block.text, page, "exec"), names)
    if "get_config" in names:
      resolved(names["get_config"](), desk)


@of("json")
def test_json_is_json(block: Block) -> None:
  json.loads(block.text)


@of("yaml")
def test_yaml_describes_a_tree_a_machine_or_a_task(block: Block, desk: Desk) -> None:
  if "data_source" in block.page:
    return  # its source is not part of the package; the test of that guide reads it
  file = desk.folder / "described.yaml"
  file.write_text(block.text)
  content = yaml.safe_load(block.text)
  if "task" in content:
    tasks = [yaml.safe_load(task.read_text()) for task in (REPOSITORY / "tests" / "tasks").glob("*.yaml")]
    assert content in [{key: value for key, value in task.items() if key != "metadata"} for task in tasks]
  elif "platform" in content:
    assert machines.load(str(file)).platform == content["platform"]
  else:
    found = federation.resolve(c.Config(federation=c.FederationConfig(yaml=str(file))))
    assert found.root.name == content["name"]


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block, _ in COMMANDS}))
def test_commands_are_understood(page: str, desk: Desk) -> None:
  """Those of a page one after the other, since later ones may need what earlier ones leave."""
  for block, words in COMMANDS:
    if block.page != page or any(shlex.join(words).startswith(begin) for begin in NOT_RUN):
      continue
    if words[0].rpartition("/")[2] == "pip":
      check_extras(words)
    elif words[0] in ("echo", "python") and words[1] != "-m":
      run_in_bash(words, desk.folder)
    elif command := package_command(words):
      check_script(words)
      read_or_run(block, *command, desk)
    else:
      assert words[0] == "bash", f"{block}: say in NOT_RUN why {shlex.join(words)} is not run, or how it is"
      check_script(words)


def check_extras(words: list[str]) -> None:
  """What pip is asked for is declared."""
  declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  asked = {extra for word in words for found in re.findall(r"\[([\w,]+)\]", word) for extra in found.split(",")}
  assert asked <= set(declared), f"no extra {asked - set(declared)}"


def run_in_bash(words: list[str], folder: Path) -> None:
  code = " ".join(word if word == ">" else shlex.quote(word) for word in words)
  subprocess.run(["bash", "-c", re.sub("^python ", f"{sys.executable} ", code)], cwd=folder, check=True)


def check_script(words: list[str]) -> None:
  """A script in launch/ is there, and knows the flags before those of the command that it runs."""
  if words[0] == "bash" and words[1] != "launch/prepare.sh":
    script = (REPOSITORY / words[1]).read_text()
    for flag in re.findall(r" --([a-z_-]+)", " ".join(words).partition("--config")[0]):
      assert flag in script, f"{words[1]} has no --{flag}"


def read_or_run(block: Block, module: str, arguments: list[str], desk: Desk) -> None:
  """Has the command read its flags and resolve its experiment; or runs it, where `RUN` says how."""
  line = " ".join([module, *arguments])
  tiny = next((flags for (page, has), flags in RUN.items()
               if page == block.page and all(word in line for word in has.split())), None)
  arguments = [desk.with_own_paths(word) for word in arguments]
  if re.search("configs/(mc4|pile)_", line) and "--config.federation" not in line:
    arguments.append(f"--config.federation.folder={desk.path('world')}")  # for what they have been prepared from
  if tiny is not None:
    arguments = [word.replace(desk.path("world"), desk.path("small")) for word in arguments] + tiny
  folder = REPOSITORY
  if "yaml=tfds" in line:  # which names a folder beside it
    folder, arguments = desk.folder, [word.replace("=configs", f"={REPOSITORY}/configs") for word in arguments]
  code, output = desk.run(module, arguments, run=tiny is not None, folder=folder)
  assert code == 0, f"{block}: {line}\n{output}"


def test_what_is_not_run_is_there() -> None:
  """Reasons and settings that no command needs any more go."""
  for begin in NOT_RUN:
    assert any(shlex.join(words).startswith(begin) for _, words in COMMANDS), f"no command begins with {begin}"
  for page, has in RUN:
    assert any(block.page == page and all(word in " ".join(words) for word in has.split()) for block, words in COMMANDS)


def anchors(page: Path) -> set[str]:
  """The anchors of a page's headings, as GitHub and the site make them."""
  text = FENCE.sub("", page.read_text(encoding="utf-8"))
  titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()).replace(" ", "-")
          for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
  text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if re.match(r"\w+:", target):
      continue
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    of_site = page.is_relative_to(REPOSITORY / "docs")  # whose generator finds no folders
    assert file.is_file() if of_site else file.exists(), f"{page.name}: {target}"
    assert not anchor or anchor in anchors(file), f"{page.name}: no heading for {target}"


def test_every_page_is_in_the_table_of_contents() -> None:
  docs = REPOSITORY / "docs"
  listed = set(re.findall(r"^([\w/]+)$", (docs / "index.md").read_text(), re.MULTILINE))
  there = {str(page.relative_to(docs).with_suffix("")) for page in docs.rglob("*.md")} - {"index"}
  assert there == listed, f"docs/index.md lists what is not there, or not all: {there ^ listed}"


def test_drawings_and_site_speak_of_one_repository() -> None:
  """One name on GitHub stands for the project, until it has an address: that of colab/make.py."""
  own = re.search(r'^REPOSITORY = "(.+)"', (REPOSITORY / "colab" / "make.py").read_text(), re.MULTILINE)
  assert own
  files = [*PAGES, *(REPOSITORY / "colab").glob("*.ipynb")]
  named = {name for file in files for name in re.findall(r"github(?:\.com)?/([\w.-]+/worldlm_jax)\b", file.read_text())}
  assert named <= {own[1]}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A copy of the package with everything that the guides to rules and sources add to it."""
  folder = tmp_path_factory.mktemp("extended")
  subprocess.run(["cp", "-r", REPOSITORY / "worldlm_jax", folder], check=True)
  for block in (block for block in BLOCKS if block.page in ("docs/howto/aggregation_rule.md",
                                                           "docs/howto/data_source.md")):
    if block.language == "python":
      path = re.findall(r"`(worldlm_jax/[\w/]+\.py)`", block.before)[-1]
      (folder / path).write_text(block.text)
    if block.language == "diff":
      apply(block.text, folder)
  return folder


def apply(diff: str, folder: Path) -> None:
  """Replaces each run of lines that begin with "-" by the run with "+" that follows."""
  for part in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
    file = folder / part.partition("\n")[0]
    text = file.read_text()
    changes = part.split("\n", 2)[2]
    for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n?)+)", changes, re.MULTILINE):
      old, new = (re.sub(r"^[-+]", "", lines, flags=re.MULTILINE).rstrip("\n") for lines in (old, new))
      assert text.count(old) == 1, f"{file.name} does not have this line any more, of a guide:\n{old}"
      text = text.replace(old, new)
    file.write_text(text)


def test_the_guides_rule_is_short() -> None:
  (rule,) = (block for block in BLOCKS if block.page == "docs/howto/aggregation_rule.md" and block.language == "python")
  assert len(rule.text.splitlines()) < 40


@pytest.mark.slow
def test_the_guides_rule_and_source_train(extended: Path, tmp_path: Path) -> None:
  """FedAtt over a tree of which one member's text is in a SQLite database, as the guides add them."""
  script = tmp_path / "try.py"
  script.write_text(TRY)
  (yaml_block,) = (b for b in BLOCKS if b.page == "docs/howto/data_source.md" and b.language == "yaml")
  (tmp_path / "tree.yaml").write_text(yaml_block.text)
  done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=600,
                        env=os.environ | {"PYTHONPATH": str(extended), "XLA_FLAGS": COMPILER})
  assert done.returncode == 0, done.stderr[-3000:]


TRY = f"""
import sqlite3
import numpy as np, jax, jax.numpy as jnp
from worldlm_jax import config as c, federation, train
from worldlm_jax.algorithms import fedatt

for name, table, column in (("cases.db", "documents", "text"), ("archive.db", "letters", "body")):
  with sqlite3.connect(name) as database:
    database.execute(f"CREATE TABLE {{table}} (id INTEGER, {{column}} TEXT)")
    rows = [(i, f"{{name}} {{i * i}} of wheat") for i in range(199)]
    database.executemany(f"INSERT INTO {{table}} VALUES (?, ?)", rows)

# The rule against the formula, one federation at a time; the third member is absent, the last row a ghost.
own, members = jnp.array([[1.0, 2.0], [0.0, 1.0], [9.0, 9.0]]), jnp.array([[2.0, 2], [1, 5], [7, 7], [3, 3]])
shares = jnp.array([[0.5, 0], [0.5, 0], [0, 0], [0, 1.0]])
config = c.Config(backbone=c.BackboneConfig(server_learning_rate=0.7))
rule = fedatt.make(config, None, None).backbone
class Below: params = {{"backbone": {{"x": members}}}}
merged = np.asarray(rule.merge({{"x": own}}, (), Below, shares, None, None)[0]["x"])
moved = np.array(members[:2] - own[0])
norm = np.linalg.norm(moved, axis=1)
alpha = np.exp(norm) / np.exp(norm).sum()
expected = [own[0] + 0.7 * alpha @ moved, own[1] + 0.7 * (members[3] - own[1]), own[2]]
np.testing.assert_allclose(merged, expected, rtol=1e-6)
lonely = np.asarray(rule.merge({{"x": own}}, (), Below, 0 * shares, None, None)[0]["x"])
np.testing.assert_array_equal(lonely, own)

base = c.Config(
  algorithm="fedatt", rounds=1, federation=c.FederationConfig(yaml="tree.yaml"), data=c.DataConfig(sequence_length=16),
  node=c.NodeSettings(local_steps=1, batch_size=2), model=c.ModelConfig(**{MODEL!r}),
  evaluation=c.EvaluationConfig(valid_windows=2, test_windows=2, matrix_windows=0),
  logging=c.LoggingConfig(tensorboard=False),
)
summary = train.run(base, "run")
assert np.isfinite(summary["tree"]["personalised"]["mean"]["perplexity"]), summary
assert summary["nodes"]["law"]["data"]["train"]["documents"] > 100, summary["nodes"]["law"]["data"]
"""
