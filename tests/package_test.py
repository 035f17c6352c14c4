"""What is installed: the wheel and what it says of itself."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

import worldlm_jax
from worldlm_jax.__main__ import COMMANDS

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "worldlm_jax"
EXTRAS = {"data", "eval", "report", "dev"}


@pytest.fixture(scope="module")
def project() -> dict:
  return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(tmp_path: Path) -> None:
  source = tmp_path / "source"
  kept_out = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "*.egg-info", "build", "runs", "data")
  shutil.copytree(REPOSITORY, source, ignore=kept_out)
  shutil.copytree(PACKAGE / "data", source / "worldlm_jax" / "data", dirs_exist_ok=True)
  command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--disable-pip-version-check",
             "--wheel-dir", tmp_path, source]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  [wheel] = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
    [about] = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    metadata = message_from_bytes(archive.read(f"{about}/METADATA"))
    scripts = archive.read(f"{about}/entry_points.txt").decode()
  modules = {str(path.relative_to(REPOSITORY)) for path in PACKAGE.rglob("*.py")}
  assert {name for name in names if not name.startswith(about)} == modules | {"worldlm_jax/py.typed"}
  assert metadata["Version"] == worldlm_jax.__version__ and metadata["Requires-Python"] == ">=3.11"
  assert set(metadata.get_all("Provides-Extra")) >= EXTRAS
  assert "worldlm = worldlm_jax.__main__:main" in scripts


def test_the_lock_has_what_every_requirement_allows(project: dict) -> None:
  """Each requirement of the package and of `dev` with what it takes in has a version there that is new enough."""
  locked = {
    _normal(name): version for name, _, version in (
      line.partition("==") for line in (REPOSITORY / "requirements.lock").read_text().splitlines() if "==" in line
    )
  }
  extras, wanted = project["optional-dependencies"], list(project["dependencies"])
  waiting = ["dev"]
  while waiting:
    for requirement in extras[waiting.pop()]:
      own = re.match(r"worldlm_jax\[(.+)\]", requirement)
      if own:
        waiting += own[1].split(",")
      else:
        wanted.append(requirement)
  for requirement in wanted:
    found = re.fullmatch(r"([\w.-]+)(?:\[.*\])?(?:>=([\w.]+))?(?:==.*)?", requirement)
    assert found, requirement
    version = locked.get(_normal(found[1]))
    assert version is not None, f"{requirement} is not in requirements.lock"
    assert _number(version) >= _number(found[2] or "0"), (requirement, version)


def test_commands_start_with_what_is_required(project: dict) -> None:
  """Nothing that is imported on the way to a command's first line comes with an extra, or only with another library."""
  modules = {"absl-py": "absl", "pyyaml": "yaml", "orbax-checkpoint": "orbax"}
  required = {re.split(r"[\[>=]", name)[0] for name in project["dependencies"]}
  known = {modules.get(name, name.replace("-", "_")) for name in required} | set(sys.stdlib_module_names)
  waiting, seen = list(COMMANDS.values()), set()
  while waiting:
    name = waiting.pop()
    place = PACKAGE.joinpath(*name.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if name in seen or not file.exists():  # the latter is a name within a module
      continue
    seen.add(name)
    for imported in _imported(file):
      package, _, inner = imported.partition(".")
      if package == "worldlm_jax":
        waiting += [inner, inner.rpartition(".")[0]] if inner else []
      else:
        assert package in known, f"worldlm_jax.{name} imports {package}, which the package does not require"
  assert len(seen) > 60


def test_the_citation_is_of_this_version() -> None:
  citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
  assert citation["version"] == worldlm_jax.__version__
  assert f"## {worldlm_jax.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")


def _imported(file: Path) -> set[str]:
  """Dotted names that a module imports at its top; those of `if TYPE_CHECKING` do not count."""
  found: set[str] = set()
  for node in ast.parse(file.read_text(encoding="utf-8")).body:
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def _normal(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def _number(version: str) -> tuple[int, ...]:
  return tuple(int(part) for part in re.findall(r"\d+", version))
