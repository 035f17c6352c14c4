# %% [markdown]
# # Your own texts: alone or together?
#
# Give each organisation a folder of text. This notebook trains every one of them three times over: alone, with FedAvg,
# and in a federation of federations; on the same windows, from the same start, with three seeds. Then it says, for each
# organisation, what joining brings, and whether that is more than chance.

# %% [markdown]
# ## The texts
#
# A folder is a node of the tree, and its sub-folders are its members. One that holds `.txt`, `.jsonl` or `.parquet`
# files has text of its own, of which 5 % each are kept apart to validate and to test. On Colab, tick `UPLOAD` and
# choose a `.zip` of such a folder. Without it, the notebook makes one: four organisations with 20 to 60 kB each, taken
# from the documentation and the code of Python itself.

# %%
UPLOAD = False  # @param {type: "boolean"}
ROUNDS = 10  # @param {type: "integer"}
STEPS_PER_ROUND = 20  # @param {type: "integer"}
SEEDS = (0, 1, 2)
SIZE = 20_000  # bytes of the smallest of the texts that are made here

# %%
import importlib.util
import json
import sysconfig
import zipfile
from pathlib import Path

from worldlm_jax.data import stdlib

texts = Path("texts")
if UPLOAD and importlib.util.find_spec("google.colab"):
  from google.colab import files

  for name in files.upload():
    zipfile.ZipFile(name).extractall(texts)
else:
  for place, family in enumerate(("prose/reference", "prose/docstrings", "code/network", "code/tools")):
    documents = iter(stdlib.files(family, Path(sysconfig.get_path("stdlib"))).values())
    folder, size = texts / family, 0
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
      while size < (1 + place % 3) * SIZE:
        document = next(documents)[:4000]
        size += len(document.encode())
        file.write(json.dumps({"text": document}) + "\n")

for file in sorted(texts.rglob("*")):
  if file.is_file():
    print(f"{file.stat().st_size / 1e3:7.0f} kB  {file}")

# %% [markdown]
# Did the zip hold one folder with everything in it? Then that folder is one level of the tree more, which does no harm.
#
# ## The comparison
#
# The model is small, 45 thousand parameters, so that nine runs take minutes on two CPU cores. What they show about
# texts so small carries over in kind, not in numbers: who shares a language with whom, and who has too little text to
# go by. For large texts take a larger model (`model.PRESETS`) and more steps.

# %%
from worldlm_jax import comparison, compiled, config as c, model

compiled.keep()  # so that runs of one algorithm compile it once
base = c.Config(
  rounds=ROUNDS,
  federation=c.FederationConfig(folder=str(texts)),
  node=c.NodeSettings(local_steps=STEPS_PER_ROUND, batch_size=4, learning_rate=8e-3, warmup_steps=20),
  model=model.PRESETS["nano"](),
  data=c.DataConfig(sequence_length=64),
  evaluation=c.EvaluationConfig(valid_windows=16, test_windows=128, acceptance_windows=16, personalised="best"),
  checkpoint=c.CheckpointConfig(every_rounds=ROUNDS, keep_last=1, keep_best=0),
  logging=c.LoggingConfig(tensorboard=False),
)
entries = [c.Entry(name, {"algorithm": name}) for name in ("local", "fedavg", "worldlm")]
results = comparison.run(c.Comparison(base, entries, seeds=SEEDS), "runs/own", overwrite=True)

# %% [markdown]
# ## The verdict
#
# *Personalised* is the model after a node's own training, which FedAvg's gets too. A gain of +10 % over alone means
# that the model trained alone has a perplexity 10 % higher.

# %%
from IPython.display import HTML, Markdown, display

display(Markdown((Path("runs/own") / "comparison.md").read_text(encoding="utf-8").replace("\n#", "\n##")))

# %%
for verdict in results["verdicts"]:
  gain, beyond = verdict["own_gain_percent"], verdict["own_exceeds_noise"]
  if gain["mean"] is None:
    answer = "no verdict: a run diverged"
  elif beyond:
    answer = "better off together" if gain["mean"] > 0 else "better off alone"
  else:
    answer = "no difference beyond the noise"
  value = "" if gain["mean"] is None else f"{gain['mean']:+6.1f} %"
  print(f"{verdict['node']:20} {value:>9}  {answer}")

# %% [markdown]
# ## The page
#
# The same with charts, one file to mail to everybody concerned:

# %%
from html import escape

from worldlm_jax import report

page = report.report("runs/own")
frame = '<iframe srcdoc="{}" width="100%" height="720" style="border: 1px solid #8888"></iframe>'
HTML(f"<div>{frame.format(escape(page.read_text(encoding='utf-8')))}</div>")

# %% [markdown]
# On Colab, `files.download("runs/own/report.html")` takes it home. On your own machine the same comparison is
#
# ```bash
# python -m worldlm_jax.compare --config=configs/compare_folder.py --config.base.federation.folder=texts \
#   --workdir=runs/own --only=local,fedavg,worldlm
# ```
