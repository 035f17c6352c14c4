"""The command as a person uses it: flags, mistakes, a whole comparison, and what is printed."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worldlm_jax import config as c, entries, model

REPOSITORY = Path(__file__).parent.parent
CONFIG = """
from worldlm_jax import config as c

def get_config():
  base = c.Config(
    rounds=2, data=c.DataConfig(sequence_length=16), node=c.NodeSettings(local_steps=2, batch_size=3),
    model=c.ModelConfig(num_layers=2, d_model=12, num_heads=2, num_kv_heads=1, d_ff=17, key_layer_share=0.5),
    evaluation=c.EvaluationConfig(valid_windows=3, test_windows=5),
  )
  return c.Comparison(base, [c.Entry("local", {"algorithm": "local"}), c.Entry("worldlm", {"algorithm": "worldlm"})])
"""


def _command(*arguments: str | Path, module: str = "compare") -> tuple[int, str, str]:
  """Exit code, standard output and standard error of the command, on one device."""
  done = subprocess.run(
    [sys.executable, "-m", f"worldlm_jax.{module}", *map(str, arguments)], cwd=REPOSITORY, capture_output=True,
    text=True, timeout=600, env=os.environ | {"COLUMNS": "120"},
  )
  return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
  """The runs of this file share what they compile."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
    yield


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
  """Those that name a comparison of two entries on two nodes of local text."""
  folder = tmp_path_factory.mktemp("files")
  (folder / "config.py").write_text(CONFIG)
  for name in ("law", "medicine"):
    (folder / "world" / name).mkdir(parents=True)
    for split in ("train", "valid", "test"):
      words = random.Random(name + split).choices(["wheat", "barley", "rye", "oats", name], k=200)
      (folder / "world" / name / f"{split}.txt").write_text(" ".join(words), encoding="utf-8")
  return [f"--config={folder / 'config.py'}", f"--config.base.federation.folder={folder / 'world'}"]


@pytest.mark.slow
def test_a_whole_comparison(flags: list[str], tmp_path: Path) -> None:
  out = tmp_path / "out"
  arguments = [*flags, f"--workdir={out}", "--config.seeds=0,5", "--config.base.rounds=3", "--node=law.local_steps=3"]
  code, output, errors = _command(*arguments)
  assert (code, errors) == (0, ""), errors
  assert {file.name for file in out.iterdir()} == {
    "comparison.json", "comparison.md", "locks", "report", "report.html", "runs"
  }
  runs = {f"{name}/seed{seed}" for name in ("local", "worldlm") for seed in (0, 5)}
  assert {str(file.parent.relative_to(out / "runs")) for file in out.glob("runs/*/*/summary.json")} == runs
  content = json.loads((out / "comparison.json").read_text(), parse_constant=pytest.fail)
  assert content["seeds"] == [0, 5] and list(content["results"]) == ["local", "worldlm"]
  assert content["entries"]["local"] == {"algorithm": "local", "overrides": {"algorithm": "local"}}
  assert content["fairness"]["tokens"] == 3 * (3 + 2) * 3 * 16
  assert content["fairness"]["evaluation"].keys() == {"law", "medicine"}
  own = content["results"]["worldlm"]
  first = json.loads((out / "runs" / "worldlm" / "seed0" / "summary.json").read_text())
  assert own["nodes"]["law"]["personalised"]["perplexity"]["values"][0] == (
    first["nodes"]["law"]["personalised"]["perplexity"]
  )
  assert own["bytes_up"]["mean"] > 0 == content["results"]["local"]["bytes_up"]["mean"]
  assert len(own["curves"]["law"]["personalised"]) == 3 and None not in own["curves"]["law"]["personalised"]
  assert own["matrix"]["corpora"] == ["law", "medicine"]
  assert {verdict["node"] for verdict in content["verdicts"]} == {"law", "medicine"}
  assert 1 < own["tree"]["received"]["mean"]["perplexity"]["mean"] < 300
  assert "run 4/4: worldlm, seed 5 is done" in output
  assert "| entry   |" in output and f"see {out}/comparison.md" in output
  assert output.rstrip().endswith(f"report: {out}/report.html")
  assert "--config.seeds=0,5" in (out / "comparison.md").read_text()
  before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
  code, again, errors = _command(*arguments)
  assert (code, errors) == (0, "") and "run " not in again
  assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_a_run_that_diverges_is_in_the_table(flags: list[str], tmp_path: Path) -> None:
  out = tmp_path / "out"
  code, output, errors = _command(
    *flags, f"--workdir={out}", "--config.seeds=0", "--config.base.rounds=1", "--config.base.node.warmup_steps=0",
    "--config.base.node.clip_norm=inf", "--node=medicine.learning_rate=1e30",
  )
  assert (code, errors) == (0, ""), errors
  assert len(re.findall(r"\| diverged \|", output)) == 2 and "the comparison goes on" in output
  assert json.loads((out / "comparison.json").read_text())["fairness"]["tokens"] is None
  assert "at node 'medicine'" in (out / "comparison.md").read_text()


@pytest.mark.parametrize(("added", "message"), [
  (["--config.base.rouns=3"], "--config.base.rouns: field='rouns': expected one of .*; did you mean 'rounds'?"),
  (["--config.rounds=3"], "--config.rounds: field='rounds': expected one of 'base', 'entries', 'seeds'"),
  (["--config.seeds=0,x"], "config.seeds=.*: expected different whole numbers"),
  (["--config.entries=3"], "flag='--config.entries': expected a single value; .* --only chooses"),
  (["--config.entries.x=3"], "flag='--config.entries.x': expected a single value; .* --only chooses"),
  (["--only=wordlm"], "--only='wordlm': expected one of 'local', 'worldlm'; did you mean 'worldlm'?"),
  (["--node=law.rouns=3"], "entry 'local': node 'law': setting='rouns': expected one of"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_mistakes_are_bad_input(flags: list[str], tmp_path: Path, added: list[str], message: str) -> None:
  code, _, errors = _command(*flags, f"--workdir={tmp_path / 'out'}", *added)
  assert code == 2 and len(errors.splitlines()) == 1
  assert re.match(f"error: .*{message}".replace("?", r"\?"), errors), errors
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("module", "config", "kind"), [
  ("compare", "configs/folder.py", "Comparison"), ("main", "configs/compare.py", "Config"),
])
def test_a_config_file_of_another_command_is_refused(tmp_path: Path, module: str, config: str, kind: str) -> None:
  code, _, errors = _command(f"--config={config}", f"--workdir={tmp_path / 'out'}", module=module)
  assert (code, errors) == (2, f"error: --config={config!r}: expected a file whose get_config() returns a {kind}; "
                            "worldlm_jax.compare takes a Comparison, every other command a Config\n")


def test_a_missing_config_file_is_bad_input(tmp_path: Path) -> None:
  code, _, errors = _command("--config=configs/compar.py", f"--workdir={tmp_path / 'out'}")
  assert (code, errors) == (2, "error: --config='configs/compar.py': expected a file; did you mean "
                            "'configs/compare.py'?\n")


def test_the_comparison_of_the_quick_start_is_valid() -> None:
  namespace: dict[str, object] = {}
  exec((REPOSITORY / "configs" / "compare.py").read_text(), namespace)
  quickstart: dict[str, object] = {}
  exec((REPOSITORY / "configs" / "quickstart.py").read_text(), quickstart)
  comparison, alike = namespace["get_config"](), quickstart["get_config"]()  # type: ignore[operator]
  assert isinstance(comparison, c.Comparison) and len(entries.plan(comparison)) == 8 * 3
  alike.checkpoint = comparison.base.checkpoint
  assert comparison.base == alike and comparison.base.model == model.PRESETS["tiny"]()
