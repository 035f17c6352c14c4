# %% [markdown]
# # Nodes on devices: mesh and sharding
#
# A federation is trained by one program on all devices that there are. This notebook shows where nodes lie, and that it
# makes no difference to the result. Choose a TPU or a GPU in Colab's menu *Runtime → Change runtime type*; without one,
# it makes four virtual devices out of the CPU, which is how the tests try what a pod would do.

# %% [markdown]
# ## The devices

# %%
ROUNDS = 3  # @param {type: "integer"}
STEPS_PER_ROUND = 10  # @param {type: "integer"}
PRESET = "nano"  # @param ["nano", "tiny"]

# %%
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")  # of the CPU; others take no notice

import jax

devices = jax.devices()
print(len(devices), devices[0].platform, "devices:", devices[0].device_kind)

# %% [markdown]
# ## The mesh
#
# Devices form a grid of three axes: `node` spreads the nodes of a level of the tree, `fsdp` one node's matrices and
# batches, `tensor` one node's matrix products. What `config.mesh` leaves open is chosen: as few devices to a node as it
# fits on, and no more groups of devices than there are nodes.

# %%
from worldlm_jax import config as c, partition

for nodes, gigabytes in ((1, 0.1), (3, 0.1), (16, 0.1)):
  mesh = partition.choose_mesh(c.MeshConfig(), nodes, gigabytes * 1e9, devices)
  print(f"{nodes:2} nodes of {gigabytes} GB each: {partition.describe(mesh)}")

# %% [markdown]
# ## Where a matrix lies
#
# The nodes of a level are stacked: axis 0 of every array is the node. Here are the key layers of four nodes, with two
# devices for each node where there are several. Matrices of a node, the last two axes, are cut along one of them; what
# is small lies whole on all of the node's devices.

# %%
from worldlm_jax import model

layers = model.PRESETS[PRESET]()
arch = model.architecture(layers, 257, num_key_layers=c.num_key_layers(layers))
mesh = partition.make_mesh(devices, fsdp=2 if len(devices) % 2 == 0 else 1)
nodes = partition.padded_size(4, mesh)
abstract = jax.tree.map(
  lambda leaf: jax.ShapeDtypeStruct((nodes, *leaf.shape), leaf.dtype), model.abstract_params(arch)
)
placed = partition.shardings(abstract, mesh)
for path, leaf in jax.tree_util.tree_leaves_with_path(abstract["key_layers"]):
  sharding = placed["key_layers"]
  for key in path:
    sharding = sharding[key.key]
  name = jax.tree_util.keystr(path, simple=True, separator=".")
  print(f"{name:22} {leaf.shape!s:20} of which a device holds {sharding.shard_shape(leaf.shape)}")

# %% [markdown]
# ## One program, any layout
#
# The same federation of four artificial languages, trained with a device for each node, and with two devices for each.
# Sums are taken in another order, so results differ by rounding; the rest is the same.

# %%
from worldlm_jax import compiled, train

compiled.keep()  # so that what follows compiles next to nothing


def experiment(mesh: c.MeshConfig) -> c.Config:
  return c.Config(
    rounds=ROUNDS,
    mesh=mesh,
    federation=c.FederationConfig(synthetic=c.SyntheticTree(branching=(4,), train_bytes=20_000, eval_bytes=5_000)),
    node=c.NodeSettings(local_steps=STEPS_PER_ROUND, batch_size=4, learning_rate=8e-3, warmup_steps=10),
    model=model.PRESETS[PRESET](),
    data=c.DataConfig(sequence_length=64),
    evaluation=c.EvaluationConfig(valid_windows=8, test_windows=16),
    checkpoint=c.CheckpointConfig(keep_last=ROUNDS),
    logging=c.LoggingConfig(tensorboard=False),
  )


count = len(devices)
layouts = {f"node={count}": c.MeshConfig(node=count, fsdp=1, tensor=1)}
if count % 2 == 0:
  layouts[f"node={count // 2} fsdp=2"] = c.MeshConfig(node=count // 2, fsdp=2, tensor=1)
perplexity = {}
for name, layout in layouts.items():
  summary = train.run(experiment(layout), f"runs/{name.replace(' ', '_')}", overwrite=True)
  perplexity[name] = summary["tree"]["personalised"]["mean"]["perplexity"]
  print(f"{name:16} mean test perplexity {perplexity[name]:.4f}")
print(f"largest difference: {max(perplexity.values()) - min(perplexity.values()):.1e}")

# %% [markdown]
# ## On another number of devices
#
# A checkpoint holds the nodes and nothing of the layout. Say that the machine of the first run went down after its
# first round, and that all there is to go on with has another mesh:

# %%
import shutil
from pathlib import Path

from worldlm_jax import progress

first, last = next(iter(layouts)), next(reversed(layouts))
folder = Path("runs") / first.replace(" ", "_")
for checkpoint in (folder / "checkpoints").glob("[0-9]*"):
  if int(checkpoint.name) > 10_000:  # round times 10,000
    shutil.rmtree(checkpoint)
(folder / "summary.json").unlink()
summary = train.run(experiment(layouts[last]), folder, reporter=progress.PlainLines())
resumed = summary["tree"]["personalised"]["mean"]["perplexity"]
print(f"begun with {first}, finished with {last}: {resumed:.4f}; at one go: {perplexity[first]:.4f}")

# %% [markdown]
# ## What a run would take
#
# Before renting anything: the memory, the traffic and the time of a run, here of a model of 400 million parameters over
# 40 organisations, on a slice of 64 TPU chips.

# %%
from worldlm_jax import plan
from worldlm_jax.planning import machines

large = c.Config(
  rounds=100,
  federation=c.FederationConfig(synthetic=c.SyntheticTree(branching=(8, 4), train_bytes=10_000_000)),
  node=c.NodeSettings(local_steps=200, batch_size=32),
  model=model.PRESETS["400m"](),
  data=c.DataConfig(sequence_length=1024),
)
plan.show(plan.make(large, machines.load("v5p-128")))

# %% [markdown]
# The script `launch/tpu_vm.sh` creates such a slice, starts a run there, and resumes it when the slice is preempted.
