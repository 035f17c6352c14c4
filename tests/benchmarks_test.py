"""Each benchmark runs at its smallest size, and what it says besides speeds is true."""

import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import subprocess
import sys
import time

import jax
import pytest

from benchmarks import all as all_lib, faults, growth, measuring, setups, utilisation
from worldlm_jax import metrics, model


def run(name, tmp_path, *flags):
  """The tables of a benchmark, as its JSON file has them."""
  out = tmp_path / "results" / f"{name}.json"
  importlib.import_module(f"benchmarks.{name}").main([*all_lib.SUITES["smallest"][name], *flags, f"--out={out}"])
  found = json.loads(out.read_text())
  assert found["machine"]["jax"] == jax.__version__
  return found["tables"]


def assert_spread(found):
  median, low, high = found
  assert 0 < low <= median <= high < math.inf


@pytest.mark.slow
def test_rounds_books_each_block_between_two_bare_loops(tmp_path):
  [table] = run("rounds", tmp_path)
  [row] = table["rows"]
  assert_spread(row["ratio"])
  assert len(row["seconds_per_round"]) == 1 and len(row["bare_seconds"]) == 2
  assert row["parts_seconds"]["training"] > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("drjax") is None, reason="drjax is not installed: pip install drjax")
def test_a_round_of_fedavg_is_drjaxs(tmp_path):
  [table] = run("fedavg", tmp_path)
  for row in table["rows"]:
    assert row["difference"] < 1e-5 < 1e-4 < row["largest_step"]
    assert_spread(row["ratio"])
    assert row["peak_mb"] > 0 and row["drjax_peak_mb"] > 0


@pytest.mark.slow
def test_exchange_needs_more_than_a_copy(tmp_path):
  [table] = run("exchange", tmp_path)
  [row] = table["rows"]
  assert_spread(row["attention_ratio"])
  assert_spread(row["exchange_ratio"])
  assert row["extra_memory_mb"] > 0
  blocks = model.abstract_params(model.architecture(setups.MODELS["nano"](), 257))["key_layers"]
  assert row["key_layer_mb"] * 1e6 == sum(4 * leaf.size for leaf in jax.tree.leaves(blocks))


@pytest.mark.slow
def test_growth_counts_nodes_and_levels(tmp_path):
  [table] = run("growth", tmp_path, f"--png={tmp_path / 'growth.png'}")
  [row] = table["rows"]
  assert (row["nodes"], row["levels"]) == (2, 3)
  assert_spread(row["round_ratio"])
  assert row["memory_mb"] > 0 and row["bare_memory_mb"] > 0
  assert row["bare_compile_seconds"] > 0 and row["compile_seconds"] > 0
  assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_utilisation_is_the_share_of_the_peak(tmp_path):
  [table] = run("utilisation", tmp_path)
  [row] = table["rows"]
  assert row["utilisation"] == pytest.approx(row["tokens_per_second"] * row["flops_per_token"] / 1e12)
  assert_spread(row["ratio"])


def matmul_flops(jaxpr):
  """Of all matrix products of a program."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    inner = sum(matmul_flops(getattr(value, "jaxpr", value)) for value in eqn.params.values()
                if hasattr(getattr(value, "jaxpr", value), "eqns"))
    total += inner * eqn.params.get("length", 1)
  return total


@pytest.mark.parametrize("tied_head", [True, False])
def test_flops_are_those_of_the_models_matrix_products(tied_head):
  config = dataclasses.replace(setups.MODELS["tiny"](), tied_head=tied_head)
  arch, length = model.architecture(config, 257), 512
  forward = jax.make_jaxpr(functools.partial(model.apply, arch))(
    model.abstract_params(arch), jax.ShapeDtypeStruct((1, length), "int32")
  )
  masked_half = 2 * arch.num_layers * arch.d_model * length
  expected = utilisation.flops_per_token(arch, length) / 3 + masked_half
  assert matmul_flops(forward.jaxpr) / length == pytest.approx(expected, rel=0.01)  # norms are no matrices


@pytest.mark.slow
def test_data_reads_every_format(tmp_path):
  reading, tokenising = run("data", tmp_path)
  assert len(reading["rows"]) > 5
  for row in reading["rows"] + tokenising["rows"]:
    assert_spread(row["ratio"])


TINY = """
from worldlm_jax import config as c

def get_config(part):
  leaves = [c.Node(name, c.Synthetic(name, train_bytes=2_000, eval_bytes=600)) for name in "ab"]
  return c.Config(
    algorithm="fedavg", federation=c.FederationConfig(root=c.Node("world", None, leaves)),
    node=c.NodeSettings(local_steps=1, batch_size=2, loss_before=0.3),
    model=c.ModelConfig(num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, d_ff=8, key_layer_share=0.0),
    data=c.DataConfig(sequence_length=13), logging=c.LoggingConfig(tensorboard=False),
    evaluation=c.EvaluationConfig(valid_windows=2, test_windows=2, matrix_windows=0),
    checkpoint=c.CheckpointConfig(every_rounds=3),
  )
"""


@pytest.mark.slow
@pytest.mark.exhaustive  # train_test kills at chosen places
def test_what_was_killed_after_some_more_rounds_loses_nothing(tmp_path):
  (tmp_path / "tiny.py").write_text(TINY)
  config = f"{tmp_path / 'tiny.py'}:kills"
  unbroken, killed = (faults.Run(config, 9, tmp_path / name) for name in ("unbroken", "killed"))
  unbroken.to_the_end()
  process = killed.start()
  while process.poll() is None and not 0 < killed.saved() < killed.recorded():
    time.sleep(0.01)
  assert killed.kill_after(process, 0)
  saved = killed.saved()
  killed.to_the_end()
  assert killed.went_on_after() == saved > 0
  assert killed.outcome() == unbroken.outcome()


@pytest.mark.skipif(sys.platform != "linux", reason="other processes are looked at in /proc")
def test_a_process_is_sampled_until_it_ends(tmp_path):
  tried = faults.Run("unread", 1, tmp_path / "run")
  process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
  assert tried.sample(process).round == -1
  (tmp_path / "run").mkdir()
  rows = [{"round": index, "node": path} for index in range(700) for path in "ab"]
  metrics.append_jsonl(tmp_path / "run" / "metrics.jsonl", rows)
  with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
    file.write('{"round": 700')  # the row is not complete
  sample = tried.sample(process)
  assert (sample.round, sample.threads) == (699, 1) and sample.memory_mb > 0 and sample.files >= 3
  process.communicate(b"\n")
  assert tried.sample(process) is None


def test_failures_are_counted():
  rows = [{"turnout": {"late": 1, "not_asked": 2}}, {"turnout": {"late": 1}, "rejected": ["too_large"]}, {"failed": ""}]
  assert {row["what"]: row["count"] for row in faults._failures(rows).rows} == {
    "late": 2, "not_asked": 2, "rejected: too_large": 1, "training failed": 1
  }


def test_growth_is_that_of_a_warm_process():
  samples = [faults.Sample(index, 100.0 + 0.5 * index + 900 * (index < 10), 7 + (index > 40), 3) for index in range(42)]
  memory, files, threads = faults._growth(samples).rows
  assert memory["growth"] == pytest.approx(0.5 * 20.5, abs=0.5) and memory["slope"] == pytest.approx(500)
  assert (files["second"], files["last"]) == (measuring.Spread(7, 7, 7), measuring.Spread(7, 7, 7))
  assert threads["growth"] == 0


def test_contenders_take_turns():
  calls = []
  seconds = measuring.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
  assert "".join(calls) == "ab" + "ab" + "ba"
  assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_mistake_in_a_list_of_names_is_told(capsys):
  with pytest.raises(SystemExit):
    growth.main(["--axes=depth"])
  assert "--axes: depth: expected of nodes, depths, models, layers" in capsys.readouterr().err
