"""Rounds on meshes of 8 devices: the same result on each, parameters really spread, and no needless traffic."""

import collections
import math
import re

import jax
import pytest

from worldlm_jax import config as config_lib, engine, trees

MATRICES = ("kernel", "embedding")


def tree(node):
  return node(
    "world", node("a", node("p"), node("q"), node("r"), data=False),
    node("b", node("s"), node("t"), node("u"), node("v"), data=False), node("c"), data=False,
  )


def config_of(rounds):
  """Everything is on: trust, both kinds of sharing, residual layers, siblings that agree."""
  config = rounds.tiny_config(tree(rounds.node), update_threshold=-0.2, candidates="both")
  config.model = config_lib.ModelConfig(
    num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, key_layer_share=0.67
  )
  config.node.trust = "validated"
  config.node.backbone_independence, config.node.key_layer_independence = 3.0, 1.0
  return config


def run_on(rounds, num_devices, fsdp=1, tensor=1, nodes_at_once=0, on_host=False):
  config = config_of(rounds)
  config.nodes_at_once = nodes_at_once
  return rounds.run(config, num_devices=num_devices, fsdp=fsdp, tensor=tensor, on_host=on_host)


@pytest.fixture(scope="module")
def assert_same_result(rounds):
  expected = run_on(rounds, 1).params()

  def check(harness, atol=1e-5):
    for path, params in harness.params().items():
      rounds.assert_trees_close(params, expected[path], atol, f"node {path}: ")

  return check


@pytest.fixture(scope="module")
def on_eight(rounds):
  return run_on(rounds, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "tensor"), [
  (1, 1), (2, 2), pytest.param(8, 1, marks=pytest.mark.exhaustive),
])
def test_every_mesh_gives_the_result_of_one_device(rounds, assert_same_result, on_eight, fsdp, tensor):
  harness = run_on(rounds, 8, fsdp, tensor) if fsdp * tensor > 1 else on_eight
  assert_same_result(harness)
  count = 8 // (fsdp * tensor)
  for path, leaf in jax.tree_util.tree_leaves_with_path([(s.params, s.opt_state, s.update) for s in harness.state]):
    if any(name in jax.tree_util.keystr(path) for name in MATRICES):
      here = leaf.addressable_shards[0].data
      assert here.nbytes == leaf.nbytes // 8, f"{jax.tree_util.keystr(path)}: {here.shape} of {leaf.shape}"
      assert here.shape[0] == leaf.shape[0] // count


@pytest.mark.exhaustive
def test_three_devices_with_ghosts_give_the_result_of_one(rounds, assert_same_result):
  assert_same_result(run_on(rounds, 3))


@pytest.mark.slow
def test_nodes_that_wait_on_the_host_give_the_result_of_one_device(rounds, assert_same_result):
  """On 4 devices that train and one that stands for the host; the lowest level has 7 nodes and a ghost."""
  harness = run_on(rounds, 4, fsdp=2, nodes_at_once=2, on_host=True)
  assert_same_result(harness)
  for leaf in jax.tree.leaves(harness.state):
    assert leaf.sharding.device_set == {jax.devices()[-1]}


def travelled(compiled):
  """The bytes that each kind of collective of a program gives a device, however often it is repeated."""
  sizes = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
  computations, entry, current = {}, "", None
  for line in compiled.as_text().splitlines():
    if (begin := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)) and not line.startswith(" "):
      current = begin[2]
      computations[current], entry = [], current if begin[1] else entry
    elif current:
      computations[current].append(line)
  found = collections.Counter()

  def visit(name, times):
    for line in computations[name]:
      if op := re.search(r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)\(", line):
        shapes = re.findall(r"(f32|s32|u32|pred)\[([\d,]*)\]", op[1])
        found[op[2]] += times * sum(sizes[kind] * math.prod(int(d) for d in dims.split(",") if d)
                                    for kind, dims in shapes)
      repeats = times
      if " while(" in line:
        count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)  # not so of the loop over optimizer steps
        repeats = times * int(count[1]) if count else times
      inner = re.findall(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line)
      for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
        inner += re.findall(r"%?([\w.\-]+)", group)
      for other in inner:
        if other in computations:
          visit(other, repeats)

  visit(entry, 1)
  return found


@pytest.mark.slow
def test_a_round_moves_what_the_algorithm_needs_and_nothing_else(on_eight):
  """One reduction of the backbone per federation level; updates twice among siblings: to compare, and to mix."""
  harness = on_eight
  model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), harness.state[0].params)
  backbone, keys = trees.num_bytes(model["backbone"]), trees.num_bytes(model["key_layers"])
  small = 2000  # weights, masks, tables of inner products
  topologies, programs = harness.engine.topologies, harness.engine._compiled
  neighbours = [len(topology.neighbours.permutations) * len(topology.parent) // 8 for topology in topologies]
  # Between the two levels of federations and leaves: 1 root, 3 nodes below it, 7 leaves.
  expected = {
    ("up", 0): {"all-reduce": backbone + keys},
    # Means and a residual layer each; the members' updates are compared with each other.
    ("up", 1): {"all-reduce": 3 * (backbone + 2 * keys), "collective-permute": neighbours[2] * keys},
    # The relevance, in the first round, looks at the whole model once; then the parent's model for those who share, how
    # far it has moved and the residual layers of level 1 twice, and key layers a third time to hand residuals down.
    ("down", 1): {"all-reduce": 2 * (backbone + keys) + 2 * backbone + (1 + 3) * 3 * keys,
                  "collective-permute": neighbours[1] * (2 * backbone + 3 * keys)},
    # The residual layers here are those that level 1 received; nobody is below to hand them down to.
    ("down", 2): {"all-reduce": 3 * 2 * (backbone + keys) + 3 * 2 * backbone + (3 + 3) * 2 * keys,
                  "collective-permute": neighbours[2] * 2 * (backbone + keys)},
  }
  # What is no stack of layers is fetched outside of loops, and the compiler may keep it from the first time.
  kept = {("down", 1): {"all-reduce": 1, "collective-permute": neighbours[1]},
          ("down", 2): {"all-reduce": 3, "collective-permute": neighbours[2]}}
  for name, bytes_ in expected.items():
    found = travelled(programs[name])
    for kind in found | bytes_:
      most = bytes_.get(kind, 0)
      least = most - kept.get(name, {}).get(kind, 0) * backbone
      assert least <= found[kind] <= most + small, f"{name} {kind}: {found} {bytes_}"
  for name, program in programs.items():
    if name[0] in ("train", "take state", "put", "settle"):
      assert not travelled(program), f"{name}: {travelled(program)}"


@pytest.mark.slow
def test_what_trains_takes_the_same_memory_however_many_nodes_wait_on_the_host(rounds, monkeypatch):
  """Of 8 and of 64 nodes, 4 are on the device that trains at a time; the result is that of all 64 at once."""
  device, real = jax.devices()[0], engine.Engine._call

  def on_device():
    return sum(shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards
               if shard.device == device)

  def config_with(num_nodes, at_once):
    leaves = [rounds.node(f"n{i}") for i in range(num_nodes)]
    config = rounds.tiny_config(rounds.node("world", *leaves, data=False), update_threshold=-0.2)
    config.node.trust, config.nodes_at_once = "validated", at_once
    return config

  peaks, found = [], None
  for num_nodes in (8, 64):
    before, seen = on_device(), []

    def call(self, *args, seen=seen, before=before, **options):
      result = real(self, *args, **options)
      seen.append(on_device() - before)
      return result

    monkeypatch.setattr(engine.Engine, "_call", call)
    harness = rounds.run(config_with(num_nodes, 4), rounds=1, on_host=True)
    found = harness.params()
    peaks.append(max(seen))
    monkeypatch.setattr(engine.Engine, "_call", real)
    del harness
  state_of_one = 4 * 4 * sum(leaf.size for leaf in jax.tree.leaves(found["n0"]))  # parameters, moments, update
  assert 4 * state_of_one < peaks[0], "four nodes train at a time"
  assert peaks[1] < 1.1 * peaks[0] < 1.1 * 10 * state_of_one, (peaks, state_of_one)
  expected = rounds.run(config_with(64, 64), rounds=1).params()
  for path in ("n0", "n31", "n63", "."):
    rounds.assert_trees_close(found[path], expected[path], 1e-5, f"node {path}: ")
