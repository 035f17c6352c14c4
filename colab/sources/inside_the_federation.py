# %% [markdown]
# # Inside the federation
#
# Who learns what from whom? This notebook trains two families of three artificial languages each, about which
# everything is known: the languages of a family share all but the last step of their history, and no model can get
# below a language's entropy. Then it looks at whom the nodes' key layers attend to, which layers travel to another
# family, how far the models drift apart, and how well every model speaks every language.

# %%
ROUNDS = 8  # @param {type: "integer"}
STEPS_PER_ROUND = 20  # @param {type: "integer"}
TRAIN_BYTES = 20_000  # of each language

# %% [markdown]
# ## The run
#
# Key layers are personal from the start (`key_layer_independence=inf`), so that attention is at work in every round;
# the backbone is shared for a while. By default nodes attend to everybody's mean update, with the whole of their model.
# Here they look at those of their siblings one by one, each layer for itself, so that there is more to see.
# All checkpoints are kept, to look at the models of every round.

# %%
import math

from worldlm_jax import config as c, model, train

experiment = c.Config(
  rounds=ROUNDS,
  federation=c.FederationConfig(
    synthetic=c.SyntheticTree(branching=(2, 3), divergence=0.3, train_bytes=TRAIN_BYTES, eval_bytes=10_000)
  ),
  node=c.NodeSettings(
    local_steps=STEPS_PER_ROUND, batch_size=4, learning_rate=8e-3, warmup_steps=20, key_layer_independence=math.inf
  ),
  model=model.PRESETS["nano"](key_layer_share=0.67),
  data=c.DataConfig(sequence_length=64),
  key_layers=c.KeyLayerConfig(candidates="siblings", granularity="layer"),
  evaluation=c.EvaluationConfig(valid_windows=16, test_windows=32),
  checkpoint=c.CheckpointConfig(keep_last=ROUNDS),
  logging=c.LoggingConfig(tensorboard=False),
)
summary = train.run(experiment, "runs/inside", overwrite=True)
for path, node in summary["nodes"].items():
  if "personalised" in node:
    print(f"{path}  {node['personalised']['bits_per_byte']:.2f} bits per byte, "
          f"entropy of the language {node['data']['floor']['bits_per_byte']:.2f}")

# %% [markdown]
# ## Whom key layers attend to
#
# `metrics.jsonl` has a line for every round and node. `attention_down` says, for each key layer, how much of whose
# update was added to the node's own on the way down: of its siblings, its parent, and of residual layers from the other
# family. A row is the node that takes, a column the node that gives; the numbers are means over the key layers.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from worldlm_jax import metrics

rows = metrics.read_jsonl(Path("runs/inside/metrics.jsonl"))
paths = list(summary["nodes"])
leaves = [path for path in paths if "/" in path]


def attention(round_index: int) -> np.ndarray:
  """What each leaf (row) took from each node (column), mean over key layers."""
  weights = np.zeros((len(leaves), len(paths)))
  for row in rows:
    if row["round"] == round_index and row["node"] in leaves:
      for layer in row.get("attention_down", []):
        for source, weight in layer.items():
          place = paths.index(source.removeprefix("residual of "))
          weights[leaves.index(row["node"]), place] += weight / len(row["attention_down"])
  return weights


def draw_attention(axes: plt.Axes, round_index: int, most: float) -> None:
  """A heat map of one round."""
  weights = attention(round_index)
  axes.clear()
  axes.imshow(weights, cmap="Blues", vmin=0, vmax=most)
  axes.set_xticks(range(len(paths)), paths)
  axes.set_yticks(range(len(leaves)), leaves)
  axes.set_xlabel("gives")
  axes.set_ylabel("takes")
  axes.set_title(f"round {round_index + 1}")
  for (i, j), weight in np.ndenumerate(weights):
    if weight:
      axes.text(j, i, f"{weight:.2f}", ha="center", va="center", fontsize=8,
                color="white" if weight > 0.6 * most else "black")


# In the first round there are no updates yet, and nothing is taken.
most = max(attention(index).max() for index in range(ROUNDS)) or 1.0
chosen = sorted({min(1, ROUNDS - 1), ROUNDS - 1})
figure, axes = plt.subplots(1, len(chosen), figsize=(5.4 * len(chosen), 4.2), squeeze=False)
for axis, index in zip(axes[0], chosen, strict=True):
  draw_attention(axis, index, most)
plt.show()

# %% [markdown]
# Early on, updates agree most within a family, and nodes take most from their siblings and less from the other
# family. Later each learns what is peculiar to its own language; updates hardly agree any more, and little is taken.
#
# All rounds, with a slider and buttons (they work wherever the notebook's scripts do, also without running it):

# %%
from IPython.display import HTML
from matplotlib.animation import FuncAnimation

figure, axis = plt.subplots(figsize=(5.4, 4.2), dpi=60)
animation = FuncAnimation(figure, lambda index: draw_attention(axis, index, most), frames=ROUNDS, interval=900)
player = HTML(animation.to_jshtml(default_mode="once"))
plt.close(figure)
player

# %% [markdown]
# ## Which layers travel to the other family
#
# A federation sends up the key layers of members that agree least with the mean of all; the nodes of the other family
# that they fit best receive them. Each line of `residuals_received` says whose layer came, and when it was made.

# %%
counts = np.zeros((len(leaves), len(paths)), int)
for row in rows:
  if row["node"] in leaves:
    for layer in row.get("residuals_received", []):
      counts[leaves.index(row["node"]), paths.index(layer["from"])] += 1
figure, axis = plt.subplots(figsize=(5.4, 3.6))
places = {path: place for place, path in enumerate(leaves)}
for (i, j), count in np.ndenumerate(counts):
  if count and paths[j] in places:
    axis.plot([0, 1], [places[paths[j]], i], color="tab:purple", linewidth=0.35 * count, alpha=0.7)
for side, align in ((0, "right"), (1, "left")):
  for path, place in places.items():
    axis.text(side + (0.03 if side else -0.03), place, path, ha=align, va="center")
axis.set_xlim(-0.2, 1.2)
axis.invert_yaxis()
axis.axis("off")
axis.set_title("whose layer it was  →  who received it")
plt.show()

# %% [markdown]
# ## How far models drift apart
#
# The distance of each leaf's model from its federation's, in norms of the latter, at the end of each round: of the
# backbone, which nodes share until their own text is enough to go by, and of the key layers, which are their own here.
# The checkpoints hold every node's parameters, the nodes of a level stacked on axis 0.

# %%
import warnings

import jax
import orbax.checkpoint as ocp

from worldlm_jax import federation as federation_lib

warnings.filterwarnings("ignore", message="Sharding info not provided")  # one device, then as now
tree = federation_lib.resolve(experiment)
checkpoints = sorted((Path("runs/inside") / "checkpoints").glob("[0-9]*"), key=lambda folder: int(folder.name))


def flat(part: dict) -> np.ndarray:
  """The parameters of the nodes of a level as rows."""
  return np.concatenate([np.asarray(array).reshape(len(array), -1) for array in jax.tree.leaves(part)], axis=1)


drift = {"backbone": [], "key_layers": []}
for folder in checkpoints:
  with ocp.PyTreeCheckpointer() as checkpointer:
    levels = checkpointer.restore(folder.absolute() / "state")
  for part, found in drift.items():
    parents, own = (flat(levels[depth]["params"][part]) for depth in (1, 2))
    handed = parents[tree.parents[2]]
    own = own[: len(handed)]
    found.append(np.linalg.norm(own - handed, axis=1) / np.linalg.norm(handed, axis=1))
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
for axis, (part, found) in zip(axes, drift.items(), strict=True):
  for place, member in enumerate(tree.levels[2]):
    axis.plot(range(1, len(found) + 1), [round_[place] for round_ in found], marker=".", label=member.path,
              color="tab:blue" if member.path.startswith("a") else "tab:orange", linestyle=["-", "--", ":"][place % 3])
  axis.set_title(part.replace("_", " "))
  axis.set_xlabel("round")
axes[0].set_ylabel("distance from the federation's model")
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Every model on every language
#
# The perplexity of each node's model, federations included, on each node's test text. On the diagonal blocks are the
# languages of one family: there models should do better than on those of the other family, and best on their own.

# %%
matrix = summary["matrix"]
values = np.log2(np.array(matrix["perplexity"]))
figure, axis = plt.subplots(figsize=(5.6, 4.8))
axis.imshow(values, cmap="viridis_r")
axis.set_xticks(range(len(matrix["corpora"])), matrix["corpora"])
axis.set_yticks(range(len(matrix["models"])), ["root" if name == "." else name for name in matrix["models"]])
axis.set_xlabel("test text")
axis.set_ylabel("model")
for (i, j), value in np.ndenumerate(values):
  own = matrix["models"][i] == matrix["corpora"][j]
  axis.text(j, i, f"{2**value:.2f}", ha="center", va="center", fontsize=8, fontweight="bold" if own else None,
            color="white" if value > values.mean() else "black")
axis.set_title("perplexity per byte (bold: the model's own language)")
plt.show()

# %% [markdown]
# The same charts, for any run, are in its report: `python -m worldlm_jax.report --workdir=runs/inside`. Try another
# `divergence`: at 0 all six speak the same language, at 1 relatives are no more alike than strangers.
