# %% [markdown]
# # A federation of federations, in a few minutes
#
# Six organisations in a tree of eight nodes each train a language model of their own. None of them shows its text to
# another; what travels between them is what their models have learnt. The texts are Python's own documentation and
# source code, so there is nothing to download.

# %% [markdown]
# ## The federation
#
# ```text
# library
# ├── prose          merges what the two below it learn; has no text of its own
# │   ├── reference      the language reference
# │   └── docstrings     docstrings of the standard library
# └── code           has text of its own, and members
#     ├── network        protocols, clients and servers
#     ├── data           formats and containers
#     └── tools          testing, logging, debugging
# ```
#
# More rounds give better models; with the numbers below the run takes a few minutes on two CPU cores, and much less on
# a GPU.

# %%
ROUNDS = 6  # @param {type: "integer"}
STEPS_PER_ROUND = 25  # @param {type: "integer"}
TEST_WINDOWS = 64

# %%
from worldlm_jax import config as c, model, progress, train

prose = c.Node("prose", None, [
  c.Node("reference", c.StandardLibrary("prose/reference")),
  c.Node("docstrings", c.StandardLibrary("prose/docstrings")),
])
code = c.Node("code", c.StandardLibrary("code"), [
  c.Node("network", c.StandardLibrary("code/network")),
  c.Node("data", c.StandardLibrary("code/data")),
  c.Node("tools", c.StandardLibrary("code/tools")),
])
experiment = c.Config(
  rounds=ROUNDS,
  federation=c.FederationConfig(root=c.Node("library", None, [prose, code])),
  node=c.NodeSettings(local_steps=STEPS_PER_ROUND, batch_size=8, learning_rate=3e-3, warmup_steps=20),
  model=model.PRESETS["tiny"](),
  evaluation=c.EvaluationConfig(valid_windows=16, test_windows=TEST_WINDOWS),
)

# %% [markdown]
# ## Training
#
# A round goes down the tree, handing models to the members; every node with text trains; and it goes up again, merging
# what they learnt. *Received* is the perplexity of the model that a node got from above, *personalised* the one after
# its own training: how many bytes the model hesitates between, on average, before the next one. Lower is better.
# Text of a federation itself, such as that of `code`, counts as one more member of it.
#
# The minutes below are of two CPU cores that were busy with much else; by themselves they need few for all of it.

# %%
summary = train.run(experiment, "runs/quickstart", overwrite=True, reporter=progress.PlainLines())

# %% [markdown]
# ## What came out
#
# On the test split, after the last round. Bits per byte compare with compressors: `xz`, which may look at the training
# text too, needs the number in the last column.

# %%
from IPython.display import HTML, Image, Markdown, display

lines = ["| node | perplexity | bits per byte | `xz`, bits per byte |", "|---|--:|--:|--:|"]
for path, node in summary["nodes"].items():
  if "personalised" in node:
    scores, compressor = node["personalised"], node["data"]["compressor"]
    lines.append(f"| {path} | {scores['perplexity']:.2f} | {scores['bits_per_byte']:.2f} "
                 f"| {compressor['bits_per_byte']:.2f} |")
mean = summary["tree"]["personalised"]["mean"]
lines.append(f"| **mean** | **{mean['perplexity']:.2f}** | **{mean['bits_per_byte']:.2f}** | |")
display(Markdown("\n".join(lines)))

sent = (summary["bytes_down"] + summary["bytes_up"]) / 1e6
fedavg = summary["bytes_of_others"]["fedavg"]["bytes"] / 1e6
everything = summary["bytes_of_others"]["data_parallel"]["bytes"] / 1e6
print(f"{sent:.0f} MB crossed the edges of the tree; FedAvg would have sent {fedavg:.0f} MB, and synchronous "
      f"data-parallel training {everything:,.0f} MB")

# %% [markdown]
# ## The report
#
# `python -m worldlm_jax.report --workdir=runs/quickstart` makes a page with everything about the run, a file that can
# be mailed, and its charts as pictures. From Python:

# %%
from worldlm_jax import report

page = report.report("runs/quickstart")
for chart in ("tree", "matrix"):
  display(Image(page.parent / "report" / f"{chart}.png", width=640))

# %% [markdown]
# And the whole page, here in the notebook:

# %%
from html import escape

frame = '<iframe srcdoc="{}" width="100%" height="720" style="border: 1px solid #8888"></iframe>'
HTML(f"<div>{frame.format(escape(page.read_text(encoding='utf-8')))}</div>")

# %% [markdown]
# ## On from here
#
# - [Your own texts](your_own_text.ipynb): would you be better off alone?
# - [Inside the federation](inside_the_federation.ipynb): who learnt what from whom.
# - [TPUs and GPUs](tpu.ipynb): how nodes are spread over devices.
