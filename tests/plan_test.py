"""Plans: their memory and operations against XLA's own analysis, their bytes against what a run counts.

XLA's analysis is that of the CPU, which is the machine that there is.
"""

import dataclasses
import functools
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from worldlm_jax import checks, config as c, federation, local, model, partition, plan, scoring, train, trees
from worldlm_jax.planning import machines, memory, traffic, work

REPOSITORY = Path(__file__).parent.parent
BOTH = ("backbone", "key_layers")
SMALL = {"num_layers": 5, "d_model": 96, "num_heads": 4, "num_kv_heads": 2, "d_ff": 256, "key_layer_share": 0.4}
MACHINE = machines.Machine(
  platform="gpu", devices=8, processes=2, memory_gb=40.0, memory_gb_per_s=1000.0, tflops_float32=10.0,
  tflops_bfloat16=100.0, utilisation=0.5, host_memory_gb=500.0, host_link_gb_per_s=20.0, device_link_gb_per_s=100.0,
  node_link_gbit_per_s=8.0, node_latency_ms=10.0,
)


def mesh():
  return partition.make_mesh(jax.devices()[:1])


def stacked(tree, count):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), tree)


def compiled_training(arch, optimizer, shape, nodes, tracks):
  """What XLA says of a wave's training: arguments and results, those given up counted once, and temporaries."""
  params = model.abstract_params(arch)
  moments = jax.eval_shape(local.optimizer(optimizer).init, params)
  update = {part: params[part] for part in tracks}
  ints, floats = (functools.partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int32, jnp.float32))
  each = nodes,
  load = local.Workload(ints((nodes, *shape)), floats((nodes, shape[0])), ints(each), ints(each), floats(each),
                        floats(each), floats(each))

  def phase(own, load):
    params, moments, update = own
    trained = local.train_nodes(arch, optimizer, mesh(), params, moments, load)
    moved = {part: trees.subtract(trained.params[part], params[part]) for part in update}
    moved = trees.where(trained.steps > 0, moved, update)
    return (trained.params, trained.opt_state, moved), (trained.losses, trained.steps, trained.tokens)

  own = tuple(stacked(tree, nodes) for tree in (params, moments, update))
  found = jax.jit(phase, donate_argnums=0).lower(own, load).compile().memory_analysis()
  return (found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
          - found.alias_size_in_bytes)


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "batch", "length", "nodes", "optimizer", "tracks"), [
  ({}, 8, 128, 1, {}, BOTH),  # activations are most of it
  ({"remat": "blocks"}, 8, 128, 1, {}, BOTH),
  ({"d_model": 64, "d_ff": 192}, 2, 512, 1, {}, BOTH),  # the scores of attention are
  ({"d_model": 192, "d_ff": 512}, 1, 32, 1, {}, BOTH),  # parameters and moments are
  ({"vocab_size": 20_011, "tied_head": False, "remat": "blocks"}, 4, 128, 1, {}, BOTH),  # logits are
  ({"vocab_size": 20_011, "num_layers": 3}, 8, 256, 1, {}, ()),  # in chunks
  ({"compute_dtype": "bfloat16"}, 4, 64, 2, {"microbatch_size": 2}, BOTH),
  ({"d_model": 128}, 4, 64, 1, {"name": "sgd"}, ()),
])
def test_training_takes_what_xla_says(changes, batch, length, nodes, optimizer, tracks):
  arch = model.architecture(c.ModelConfig(**SMALL | changes), 257)
  shape, optimizer = (3, batch, length + 1), c.OptimizerConfig(**optimizer)
  planned = memory.training(arch, optimizer, shape, nodes, mesh(), "cpu", tracks)
  measured = compiled_training(arch, optimizer, shape, nodes, tracks)
  assert planned.total == pytest.approx(measured, rel=0.15)
  assert planned.total == planned.wave + planned.temporary


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "windows", "length"), [({}, 32, 128), ({"vocab_size": 8009}, 8, 257)])
def test_scoring_takes_what_xla_says(changes, windows, length):
  arch = model.architecture(c.ModelConfig(**SMALL | changes), 257)
  arguments = (stacked(model.abstract_params(arch), 1), jax.ShapeDtypeStruct((1, windows, length + 1), jnp.int32),
               jax.ShapeDtypeStruct((1,), jnp.int32))
  score = functools.partial(scoring.score_nodes, arch, mesh())
  # Which tests do without where they can (conftest.py); it needs less memory here.
  usual = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ["XLA_FLAGS"] else {}
  found = jax.jit(score).lower(*arguments).compile(usual).memory_analysis()
  planned = memory.scoring(arch, windows, length, 1, mesh(), "cpu", trusts=False)
  assert planned == pytest.approx(found.argument_size_in_bytes + found.temp_size_in_bytes, rel=0.15)


def test_less_is_saved_for_the_backward_pass_with_remat_and_in_smaller_batches():
  def planned(remat, micro):
    arch = model.architecture(c.ModelConfig(**SMALL, remat=remat), 257)
    optimizer = c.OptimizerConfig(microbatch_size=micro)
    return memory.training(arch, optimizer, (3, 8, 129), 1, mesh(), "cpu", BOTH).activations

  assert planned("blocks", 0) < planned("none", 0) / 10
  assert planned("none", 2) == pytest.approx(planned("none", 0) / 4, rel=0.01)  # scales of norms stay


def test_operations_are_those_that_xla_counts():
  # Of loops XLA counts one iteration, so there are none here: one block below, one key layer.
  arch = model.architecture(c.ModelConfig(**SMALL | {"num_layers": 2, "key_layer_share": 0.5}), 257)
  windows, length = 3, 131
  params, batch = model.abstract_params(arch), jax.ShapeDtypeStruct((windows, length + 1), jnp.int32)

  def loss(params, batch):
    return model.loss_sum(arch, params, batch, jnp.ones(windows, bool))

  planned = work.operations(arch, windows, length)
  for function, expected in ((loss, planned.forward), (jax.grad(loss), planned.training)):
    counted = jax.jit(function).lower(params, batch).compile().cost_analysis()["flops"]
    assert windows * length * expected == pytest.approx(counted, rel=0.1)


def test_remat_computes_more():
  def training(**changes):
    return work.operations(model.architecture(c.ModelConfig(**SMALL | changes), 257), 64, 256).training

  plain, again = training(), training(remat="blocks")
  assert plain < again < 4 / 3 * plain


def texts_of(tree, **changes):
  """A config whose model is tiny, over windows of 16 tokens."""
  config = c.Config(
    rounds=3,
    node=c.NodeSettings(local_steps=2, batch_size=2, backbone_independence=math.inf, key_layer_independence=math.inf),
    model=c.ModelConfig(num_layers=3, d_model=16, num_heads=2, num_kv_heads=1, d_ff=24, key_layer_share=0.67),
    data=c.DataConfig(sequence_length=16),
    evaluation=c.EvaluationConfig(valid_windows=1, test_windows=1, acceptance_windows=1, matrix_windows=0),
    logging=c.LoggingConfig(tensorboard=False),
  )
  config.federation.root = tree
  return dataclasses.replace(config, **changes)


def language(name, *children, text=True, **settings):
  data = c.Synthetic(lineage=name, train_bytes=4000, eval_bytes=1000) if text else None
  return c.Node(name, data, list(children), settings)


def tree():
  """Uneven in depth, in repeats, and in who has text."""
  return language(
    "world",
    language("north", language("fjord"), language("coast"), language("isle", local_steps=0),
             text=False, rounds_per_parent_round=2),
    language("south", language("delta", language("marsh"), language("mouth"), text=False), language("plain")),
    text=False,
  )


def small_tree():
  """As uneven, with fewer levels to compile."""
  return language(
    "world", language("north", language("fjord"), language("isle", local_steps=0), text=False,
                      rounds_per_parent_round=2),
    language("south", language("delta"), language("plain")), text=False,
  )


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "changes"), [
  ("worldlm", {"key_layers": c.KeyLayerConfig(candidates="both", residuals_per_layer=2, residuals_received=3)}),
  pytest.param("worldlm_paper", {"schedule": "sequential", "rounds": 2}, marks=pytest.mark.exhaustive),
])
@pytest.mark.usefixtures("on_one_device")
def test_bytes_are_those_that_a_run_counts(tmp_path, algorithm, changes):
  config = texts_of(small_tree(), algorithm=algorithm, **changes)
  train.run(config, tmp_path)
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  counted = [{} for _ in range(1 + max(row["round"] for row in rows))]
  for row in rows:
    counted[row["round"]][row["node"]] = [row["bytes_down"], row["bytes_up"]]
  assert counted == list(plan.make(config, MACHINE).sent)


def test_half_the_bits_are_half_the_bytes():
  config = texts_of(tree())
  config.key_layers.candidates = "both"  # so that parents mix, whatever the bits
  params = model.abstract_params(model.architecture(config.model, 257))
  whole, half = (
    traffic.total(plan.make(dataclasses.replace(config, payload=kind), MACHINE).sent)
    for kind in ("float32", "bfloat16")
  )
  assert whole == (2 * half[0], 2 * half[1]) and min(half) > trees.num_bytes(params)


def test_gradients_at_every_step_are_many_more_bytes():
  config = texts_of(tree())
  found = plan.make(config, MACHINE)
  num_bytes = trees.num_bytes(model.abstract_params(found.arch))
  steps = sum(m.settings.local_steps * (2 if m.path.startswith("north/") else 1)
              for m in federation.resolve(config).members if m.trains)
  assert traffic.total(found.data_parallel) == (3 * steps * num_bytes, 3 * steps * num_bytes)
  assert found.tokens == 3 * steps * 2 * 16
  clients = sum(m.data is not None for m in found.federation.members)
  assert traffic.total(found.fedavg) == (3 * clients * num_bytes, 3 * clients * num_bytes)


def test_the_state_is_that_of_all_levels_spread_over_the_devices():
  config = c.Config(model=c.ModelConfig(**SMALL, vocab_size=256))
  config.federation.synthetic.branching = (2, 4)
  found = plan.make(config, MACHINE)
  assert found.mesh == {"node": 8, "fsdp": 1, "tensor": 1} and found.waves == (1, 1, 1)
  params = trees.num_bytes(model.abstract_params(found.arch))
  assert found.state["parameters"] == found.state["update"] == 3 * params  # one node of each level, or its ghost
  assert found.state["moments"] == pytest.approx(6 * params, rel=1e-3)
  assert found.fits and not found.on_host


def test_nodes_wait_on_the_host_where_the_device_has_no_room():
  config = c.Config(model=dataclasses.replace(model.PRESETS["400m"]()), data=c.DataConfig(sequence_length=512),
                    optimizer=c.OptimizerConfig(microbatch_size=1))
  config.federation.synthetic.branching = (3, 8)
  one = dataclasses.replace(MACHINE, devices=1, processes=1)
  found = plan.make(config, one)
  assert found.on_host and found.fits and found.waves[2] == math.ceil(24 / found.nodes_at_once)
  assert any(seconds.host > 0 for seconds in found.seconds)
  assert not plan.make(config, dataclasses.replace(one, memory_gb=4.0)).fits
  assert not plan.make(config, dataclasses.replace(one, host_memory_gb=10.0)).fits


def test_time_follows_the_rates_of_the_machine():
  config = texts_of(tree(), model=c.ModelConfig(**SMALL, compute_dtype="bfloat16"))
  one = dataclasses.replace(MACHINE, devices=1, processes=1)
  slow, fast = (plan.make(config, dataclasses.replace(one, tflops_bfloat16=rate)).seconds[0] for rate in (1.0, 10.0))
  assert slow.compute == pytest.approx(10 * fast.compute) and slow.evaluation == pytest.approx(10 * fast.evaluation)
  assert slow.exchange == fast.exchange and slow.links == fast.links
  wide = plan.make(config, dataclasses.replace(one, node_link_gbit_per_s=80.0, node_latency_ms=1.0)).seconds[0]
  assert wide.links == pytest.approx(slow.links / 10)


def test_what_is_printed_says_what_was_assumed():
  config = texts_of(tree())
  config.evaluation.valid_windows = 0
  text = io.StringIO()
  plan.show(plan.make(config, machines.load("h200x1")), Console(file=text, width=80))
  for expected in ("11 nodes in 4 levels (1, 2, 6, 2)", "mesh: node 1 x fsdp 1 x tensor 1", "state of all nodes",
                   "of 141 GB", "worldlm ", "FedAvg, one server", "data-parallel", "40% of 494.5 TFLOP/s",
                   "scoring all valid windows takes no time", "1 Gbit/s and 50 ms"):
    assert expected in text.getvalue()


def test_a_machine_of_a_file_is_what_it_says(tmp_path):
  file = tmp_path / "mine.yaml"
  file.write_text(json.dumps(dataclasses.asdict(MACHINE)))
  assert machines.load(str(file)) == MACHINE
  assert machines.load("h100x64").devices == 64


@pytest.mark.parametrize(("change", "message"), [
  ({"devices": 0}, "devices=0: expected a whole number, at least 1"),
  ({"memory_gb": "80"}, "memory_gb='80': expected a positive number"),
  ({"utilisation": 40.0}, "utilisation=40.0: expected a share, at most 1"),
  ({"platform": "npu"}, "platform='npu': expected one of 'cpu', 'gpu', 'tpu'"),
  ({"memory": 80.0}, "field='memory': expected one of"),
  ({"processes": 3}, "devices=8: expected a multiple of processes=3"),
  ({"host_memory_gb": None}, "host_memory_gb=None: expected a positive number"),
])
def test_a_wrong_machine_is_refused_by_its_field(tmp_path, change, message):
  file = tmp_path / "mine.yaml"
  file.write_text(json.dumps(dataclasses.asdict(MACHINE) | change))
  with pytest.raises(checks.InputError, match="--machine") as caught:
    machines.load(str(file))
  assert message in str(caught.value)


def test_a_machine_that_nobody_knows_is_refused(tmp_path):
  with pytest.raises(checks.InputError, match=r"--machine='h100x46': .*did you mean 'h100x64'\?"):
    machines.load("h100x46")
  file = tmp_path / "mine.yaml"
  file.write_text("platform: gpu\n")
  with pytest.raises(checks.InputError, match="missing fields=\\['devices', 'processes'"):
    machines.load(str(file))
  for text in ("- 1\n", "a: [\n"):
    file.write_text(text)
    with pytest.raises(checks.InputError, match="--machine="):
      machines.load(str(file))


def test_here_is_this_computer():
  here = machines.load("here")
  assert (here.platform, here.devices) == ("cpu", len(jax.devices()))
  assert 0 < here.memory_gb <= here.host_memory_gb and 0 < here.tflops_float32 < 100
  assert np.isfinite(dataclasses.astuple(here)[1:]).all()


@pytest.mark.slow
def test_the_command_needs_a_plan_or_a_folder():
  def run(*flags):
    command = [sys.executable, "-m", "worldlm_jax.main", "--config=configs/synthetic.py", *flags]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ, timeout=600)

  planned, refused, unknown = run("--plan", "--machine=v5p-128"), run(), run("--plan", "--machine=v5p")
  assert planned.returncode == 0 and "64 tpu device(s) of 102 GB, 16 process(es)" in planned.stdout, planned.stderr
  assert refused.returncode == 2 and refused.stderr.startswith("error: --workdir=None: expected a folder")
  assert unknown.returncode == 2 and "did you mean 'v5p-128'?" in unknown.stderr
