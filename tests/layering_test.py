"""The house rules that can be read off the source: layers, sizes, names, and settings that nothing reads."""

import ast
import dataclasses
import graphlib
import inspect
from pathlib import Path

import pytest

import worldlm_jax
from worldlm_jax import config

PACKAGE = Path(worldlm_jax.__file__).parent
LAYERS = (
  ("trees", "checks", "plain", "command"),
  ("config", "rngs", "validation"),
  ("model", "data", "distributed", "federation", "governance", "links", "moves", "partition", "metrics", "progress",
   "sharing", "signals", "tree_sources", "watching"),
  ("attendance", "local", "continuation", "exchange", "generation", "likelihood", "privacy", "scoring", "schedule"),
  ("state", "algorithms", "oracle", "oracle_attention", "oracle_guards", "oracle_nodes", "oracle_privacy",
   "oracle_rules"),
  ("checkpoint", "compiled", "engine", "fairness", "feed", "ledger", "matrix", "plan", "planning", "receipts",
   "records", "settling", "spending", "text_scores", "texts", "train", "workdir"),
  ("comparison", "comparison_tables", "entries", "verdicts"),
  ("reporting", "released", "harness", "model_card"),
  ("experiment", "main", "compare", "prepare", "report", "evaluate", "export", "generate", "tokenizer", "__main__"),
)
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}

# Dotted name within the package, such as "model.presets", -> its syntax tree; a package's own is "model".
MODULES = {
  ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
  for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"
}
PACKAGES = {".".join(path.parent.relative_to(PACKAGE).parts) for path in PACKAGE.rglob("__init__.py")}


def imported_names(name: str) -> set[str]:
  """Every absolute dotted name that a module imports, in functions too; `from a import b` gives "a.b"."""
  found = set()
  for node in ast.walk(MODULES[name]):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      # Level 1 is the module's own package, which for a package is the module itself.
      parts = ["worldlm_jax", *name.split(".")]
      base = parts[:len(parts) - node.level + (name in PACKAGES)] if node.level else []
      found |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
  return found


def imported_modules(name: str) -> set[str]:
  """Which of our modules a module imports; of an imported name, the module that it is in."""
  found = set()
  for full_name in imported_names(name):
    package, _, inner = full_name.partition(".")
    while package == "worldlm_jax" and inner and inner not in MODULES:
      inner = inner.rpartition(".")[0]
    if package == "worldlm_jax" and inner:
      found.add(inner)
  return found - {name}


def top(name: str) -> str:
  return name.partition(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_only_downward(name: str) -> None:
  assert top(name) in LAYER, f"worldlm_jax/{top(name)} has no layer: add it to LAYERS in tests/layering_test.py"
  for other in imported_modules(name):
    assert LAYER.get(top(other), 0) <= LAYER[top(name)], f"{name} is below {other} and may not import it"


def test_no_module_imports_itself_in_a_circle() -> None:
  graphlib.TopologicalSorter({name: imported_modules(name) for name in MODULES}).prepare()  # raises CycleError


@pytest.mark.parametrize("name", MODULES)
def test_only_the_model_knows_flax(name: str) -> None:
  flax = {other for other in imported_names(name) if top(other) == "flax"}
  assert top(name) == "model" or not flax, f"{name} imports {flax}; the rest sees the model as init() and apply()"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short_and_named_for_what_they_hold(path: Path) -> None:
  text = path.read_text()
  assert len(text.splitlines()) < 420, "split the file by what its parts are about"
  assert path.stem != "utils", "name the module for what is in it"
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      assert node.end_lineno - node.lineno < 85, f"{node.name} is over 85 lines"


def is_validator(node: ast.AST) -> bool:
  return isinstance(node, ast.FunctionDef) and node.name.lstrip("_").startswith("validate")


def test_every_setting_is_read() -> None:
  """A field is read by `.field` or, for getattr, by its name as a string; validating it is not a use."""
  read = set()
  for name, tree in MODULES.items():
    for node in (node for part in tree.body if not is_validator(part) for node in ast.walk(part)):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        read.add(node.attr)
      elif isinstance(node, ast.Constant) and name not in ("config", "validation"):
        read.add(node.value)
  settings = {field: f"{cls.__name__}.{field}" for _, cls in inspect.getmembers(config, dataclasses.is_dataclass)
              for field in cls.__dataclass_fields__}
  unread = [full_name for field, full_name in settings.items() if field not in read]
  assert not unread, f"nothing reads {', '.join(unread)}: use them or remove them"
