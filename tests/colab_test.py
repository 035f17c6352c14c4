"""The notebooks: what is committed is what their sources say, with outputs; and they run, here with tiny settings.

Their cells run in this process, as IPython would run them, instead of in a kernel each, which would import JAX anew.
"""

import ast
import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

matplotlib.use("Agg")

COLAB = Path(__file__).parent.parent / "colab"
NAMES = ("quickstart", "your_own_text", "inside_the_federation", "tpu")
# What replaces the cell that sets the same names: see `with_tiny_settings`.
TINY = {
  "quickstart": {"ROUNDS": 1, "STEPS_PER_ROUND": 1, "TEST_WINDOWS": 2},
  "your_own_text": {"ROUNDS": 1, "STEPS_PER_ROUND": 1, "SEEDS": (0,), "SIZE": 12000},
  "inside_the_federation": {"ROUNDS": 2, "STEPS_PER_ROUND": 1, "TRAIN_BYTES": 8000},
  "tpu": {"ROUNDS": 2, "STEPS_PER_ROUND": 1},
}
MINE = re.compile(r"/(?:tmp|root|home|work|Users)/")


def make() -> Any:
  """The module that makes them."""
  spec = importlib.util.spec_from_file_location("colab_make", COLAB / "make.py")
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def committed(name: str) -> list[dict[str, Any]]:
  return json.loads((COLAB / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def with_tiny_settings(source: str, settings: dict[str, Any]) -> str:
  """The cell with the values of `settings` in the place of its own."""
  lines = source.splitlines()
  for node in ast.parse(source).body:
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in settings:
      name = node.targets[0].id
      lines[node.lineno - 1] = f"{name} = {settings.pop(name)!r}"
  return "\n".join(lines)


def test_all_notebooks_are_here() -> None:
  assert set(NAMES) == set(make().NAMES) == {path.stem for path in COLAB.glob("*.ipynb")} == set(TINY)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_source_says_and_has_been_run(name: str) -> None:
  cells = committed(name)
  assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == make().cells(name), (
    f"make it anew: python -m colab.make {name}")
  code = [cell for cell in cells if cell["cell_type"] == "code"]
  assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
  outputs = [output for cell in code for output in cell["outputs"]]
  assert outputs and all(output["output_type"] != "error" for output in outputs)
  shown = json.dumps([output.get("text") or {kind: data for kind, data in output.get("data", {}).items()
                                             if not kind.startswith("image/")} for output in outputs])
  assert not (found := MINE.search(shown)), f"the path of a machine: {shown[found.start():][:60]}"
  assert "colab-badge.svg" in "".join(cells[0]["source"])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of what notebooks show; the package's own are the other tests' business
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  import jax
  import matplotlib.pyplot as plt

  from worldlm_jax import config, model

  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))  # so that nothing changes for other tests
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
  devices = jax.devices()[: 2 if name == "tpu" else 1]  # a program for eight takes long to compile
  monkeypatch.setattr(jax, "devices", lambda: devices)
  small = functools.partial(config.ModelConfig, num_layers=2, d_model=12, num_heads=2, num_kv_heads=1, d_ff=17)
  for preset in ("nano", "tiny"):
    monkeypatch.setitem(model.PRESETS, preset, small)
  settings, names = dict(TINY[name]), {"__name__": "__main__"}
  for kind, source in make().cells(name):
    if kind == "code":
      exec(compile(with_tiny_settings(source, settings), f"colab/{name}.ipynb", "exec"), names)
  plt.close("all")
  assert not settings, f"no cell sets {', '.join(settings)}"
