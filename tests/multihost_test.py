"""Several processes: each reads the text of its own nodes alone, and all train as one process would."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# Argument: number of processes, own number, port, folder of texts, file for the result. A process finds only
# the texts of its own nodes: reading any other would fail.
WORKER = """
import sys
import jax, numpy as np
count, index, port, texts, out = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
if count > 1:
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"localhost:{port}", count, index)
from worldlm_jax import algorithms, config as c, engine, federation, feed, model, partition, schedule
from worldlm_jax.data import batches, tokenizer

names = [f"n{i}" for i in range(7)]
config = c.Config(
  federation=c.FederationConfig(root=c.Node("world", None, [c.Node(n, c.Files(f"{texts}/{n}")) for n in names])),
  node=c.NodeSettings(local_steps=2, batch_size=3, warmup_steps=1), data=c.DataConfig(sequence_length=13),
  model=c.ModelConfig(num_layers=2, d_model=12, num_heads=3, num_kv_heads=1, d_ff=17, key_layer_share=0.5),
)
tree = federation.resolve(config)
mesh = partition.make_mesh()
assert mesh.size == 4
level = tree.levels[1]
own = partition.own_nodes(len(level), mesh)
texts = batches.load([(m.path, m.data) for m, mine in zip(level, own) if mine], config.data, tokenizer.ByteTokenizer())
streams = {p: batches.NodeBatches(t.train, 3, 0, p) for p, t in texts.items()}
arch = model.architecture(config.model, 257)
tokens = {m.path: 900 for m in level}
runner = engine.Engine(config, tree, arch, mesh, algorithms.make(config, arch, tree), tokens)
step = next(s for s in schedule.round_steps(tree, None) if s.kind == "train" and s.level == 1)
rates = {m.path: np.full(2, 0.01, np.float32) for m in level}
shape = feed.workload_shape(tree, 1, 0, 13)
work = feed.workload(tree, step, streams, rates, {m.path: 0 for m in level}, shape, tokens)
state, _ = runner.train(runner.init(), 1, work)
found = {}
for leaf_index, leaf in enumerate(jax.tree.leaves(state[1].params)):
  for shard in leaf.addressable_shards:
    for row, values in zip(range(8)[shard.index[0]], np.asarray(shard.data)):
      found[f"{row}-{leaf_index}"] = values
np.savez(out, own=own, **found)
"""


def _start(count: int, index: int, port: int, texts: Path, out: Path, cache: Path) -> subprocess.Popen[str]:
  environment = {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // count} --xla_backend_optimization_level=0",
    "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu", "PATH": "",
  }
  command = [sys.executable, "-c", WORKER, str(count), str(index), str(port), str(texts), str(out)]
  return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)


def _finish(*processes: subprocess.Popen[str]) -> None:
  try:
    for process in processes:
      _, errors = process.communicate(timeout=300)
      assert process.returncode == 0, errors
  finally:
    for process in processes:
      process.kill()


def _write(folder: Path, names: list[str]) -> Path:
  for name in names:
    (folder / name).mkdir(parents=True)
    draw = np.random.default_rng([*name.encode()])
    for split, size in (("train", 900), ("valid", 90), ("test", 90)):
      (folder / name / f"{split}.txt").write_text("".join(draw.choice(list("abcdefg ")) for _ in range(size)))
  return folder


@pytest.mark.slow
def test_two_processes_train_as_one_and_read_their_own_nodes_alone(tmp_path: Path) -> None:
  names = [f"n{i}" for i in range(7)]
  _finish(_start(1, 0, 0, _write(tmp_path / "all", names), tmp_path / "one.npz", tmp_path / "cache"))
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  # Eight rows, two of them on each device: nodes 0 to 3 are the first process's.
  halves = [_write(tmp_path / "first", names[:4]), _write(tmp_path / "second", names[4:])]
  _finish(*[
    _start(2, i, port, half, tmp_path / f"two{i}.npz", tmp_path / f"cache{i}") for i, half in enumerate(halves)
  ])
  one, first, second = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two0", "two1"))
  assert first["own"].tolist() == [True] * 4 + [False] * 3 and second["own"].tolist() == [False] * 4 + [True] * 3
  assert one["own"].all()
  for name in one.files:
    if name != "own":
      row = int(name.split("-")[0])
      np.testing.assert_array_equal((first if row < 4 else second)[name], one[name], err_msg=name)
