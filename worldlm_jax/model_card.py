"""The README.md of an exported model: what it is, where it comes from, and how good it is, from the run's records."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from worldlm_jax import __version__, trees
from worldlm_jax.released import Released
from worldlm_jax.reporting import words

INDENT = "  "


def make(model: Released) -> str:
  """The card, as Markdown with the front matter that the Hugging Face hub reads."""
  tree = model.run.tree
  front = {"library_name": "transformers", "pipeline_tag": "text-generation",
           "tags": ["federated-learning", *dict.fromkeys(["worldlm", model.run.algorithm])]}
  parts = [
    "---\n" + "".join(f"{name}: {json.dumps(value)}\n" for name, value in front.items()) + "---",
    f"# {_name(model, model.path)}",
    f"The language model of one node of a federation of {words.counted(len(tree.paths), 'node')}, trained with "
    f"worldlm_jax {__version__} by the algorithm `{model.run.algorithm}`. {_state(model)}",
    _section("Use", [*_use(model)]),
    _section("Architecture", [*_architecture(model)]),
    _section("Lineage", [*_lineage(model)]),
    _section("What it shared, and with whom", [*_shared(model)]),
    _section("Privacy", [*_privacy(model)]),
    _section("Test scores", [*_scores(model)]),
  ]
  return "\n\n".join(parts) + "\n"


def _section(title: str, paragraphs: list[str]) -> str:
  return "\n\n".join([f"## {title}", *paragraphs])


def _name(model: Released, path: str) -> str:
  return words.clean(model.run.tree.title(path)).replace("|", "\\|")


def _state(model: Released) -> str:
  if model.is_final:
    return f"The run was finished, after {words.counted(model.round, 'round')}."
  step = f" and {words.counted(model.step, 'phase')} of the next" if model.step else ""
  return f"**The run was not finished**: this is the model after {words.counted(model.round, 'round')}{step}."


def _use(model: Released) -> Iterator[str]:
  yield ("```python\n"
         "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
         'tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")\n'
         'inputs = tokenizer(tokenizer.bos_token + "Once", return_tensors="pt")\n'
         "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n"
         "```")
  yield (f"Texts began with the separator, token {model.tokenizer.separator_id}, in training; the tokenizer does not "
         f"put it there by itself. Windows had {model.config.data.sequence_length:,} tokens: positions beyond are new "
         "to the model.")
  if model.arch.document_separator is not None:
    yield ("Attention stayed within documents in training. `transformers` does not do so by itself: give it one "
           "document at a time.")


def _architecture(model: Released) -> Iterator[str]:
  arch = model.arch
  parameters = trees.num_parameters(jax.tree.map(np.asarray, model.params))
  layers = f"{arch.num_layers} blocks"
  if arch.num_key_layers:
    layers += f", the last {arch.num_key_layers} of them key layers, which are the node's own"
  yield (f"`LlamaForCausalLM`: {parameters:,} parameters, {layers}; width {arch.d_model}, {arch.num_heads} heads on "
         f"{words.counted(arch.num_kv_heads, 'key-value head')}, feed-forward width {arch.d_ff}, vocabulary "
         f"{arch.vocab_size:,} (tokenizer: {model.tokenizer.name}), {'tied' if arch.tied_head else 'untied'} head, "
         f"rotary base {arch.rope_base:g}.")
  if start := model.config.model.init_from:
    yield f"Training started from the parameters of `{start}`; its licence may bind this model too."


def _lineage(model: Released) -> Iterator[str]:
  run, tokens = model.run, model.tokens_by_node
  lines = []
  for path in run.tree.paths:
    facts = [f"{words.count(tokens[path])} tokens trained on"] if tokens.get(path) else []
    facts += [] if run.record["nodes"][path]["data"] is None else ["has text"]
    here = "**" if path == model.path else ""
    lines.append(f"{INDENT * run.tree.depth(path)}- {here}{_name(model, path)}{here}"
                 + (f" ({', '.join(facts)})" if facts else ""))
  yield "\n".join(lines)
  versions = run.record["versions"]
  yield (f"Run of commit {run.record.get('commit') or 'unknown'}, with JAX {versions.get('jax', 'unknown')}, seed "
         f"{run.record['config']['seed']}.")


def _shared(model: Released) -> Iterator[str]:
  tree, rows = model.run.tree, [row for row in model.run.rows_of(model.path) if row["round"] < model.round]
  parent, children = tree.parents[model.path], tree.children[model.path]
  if parent is not None:
    up, down = (sum(row[way] for row in rows) for way in ("bytes_up", "bytes_down"))
    yield (f"With its federation, {_name(model, parent)}: {words.size(up)} sent, {words.size(down)} received, in "
           "parameters and their changes. Text was not exchanged.")
  if children:
    yield f"It merges the models of {words.sentence_list([_name(model, child) for child in children])}."
  took = _taken(rows)
  if took:
    shares = [f"{_name(model, path)} {100 * share:.0f} %" for path, share in took.items()]
    yield f"In its last exchange of key layers, its attention went to: {', '.join(shares)}."
  origins = {entry["from"] for row in rows for entry in row.get("residuals_received") or ()}
  if origins:
    names = [_name(model, path) for path in tree.paths if path in origins]
    yield f"It was sent residual layers of {words.sentence_list(names)}."
  if model.trust != 1:
    yield (f"The model lies {100 * model.trust:.0f} % of the way from its federation's to what its own training made, "
           "where the loss on its validation text is least.")
  if parent is None and not children:
    yield "Nothing: it has no others."


def _taken(rows: list[Mapping[str, Any]]) -> dict[str, float]:
  """From whom the key layers took in the last row that says so, the largest share first; over all layers."""
  said = [layers for row in rows for layers in (row.get("attention_up") or row.get("attention_down"),) if layers]
  total: dict[str, float] = {}
  for layer in said[-1] if said else ():
    for name, weight in layer.items():
      name = name.removeprefix("residual of ")
      if name != "self" and weight > 0:
        total[name] = total.get(name, 0.0) + weight
  whole = sum(total.values())
  return {name: weight / whole for name, weight in sorted(total.items(), key=lambda item: -item[1])}


def _privacy(model: Released) -> Iterator[str]:
  found = (model.run.summary or {}).get("privacy") or {}
  claims = found.get("nodes", {}).get(model.path, {})
  for claim in claims.values():
    bound = "no bound, since there was no noise" if claim["epsilon"] is None else f"epsilon {claim['epsilon']:.4g}"
    yield f"{bound[0].upper()}{bound[1:]} at delta {claim['delta']:g}, per {claim['unit']} ({claim['relation']})."
  if not claims:
    yield ("No differential privacy is claimed of this node's training. A model can give parts of its training text "
           "away: treat it as confidential as the text of its subtree, or as that of the whole federation.")
  others = [path for path in found.get("not_protected", ()) if path != model.path]
  if claims and others:
    yield f"Not protected: {words.sentence_list([_name(model, path) for path in others])}."


def _scores(model: Released) -> Iterator[str]:
  summary = model.run.summary
  if not model.is_final or summary is None:
    yield "None: the run was not finished. `python -m worldlm_jax.evaluate` scores the model on texts."
    return
  matrix = summary.get("matrix")
  if matrix and model.path in matrix["models"]:
    row = matrix["perplexity"][matrix["models"].index(model.path)]
    table = [f"| {_name(model, corpus)} | {words.perplexity(value)} |"
             for corpus, value in zip(matrix["corpora"], row, strict=True)]
    yield (f"Perplexity per token of exactly this model, on up to "
           f"{model.run.record['config']['evaluation']['matrix_windows']} windows of the nodes' test texts:")
    yield "\n".join(["| test text of | perplexity |", "|---|---|", *table])
  own = summary["nodes"].get(model.path, {}).get("personalised")
  if own:
    yield (f"After its last training, on its own test split: perplexity {words.perplexity(own['perplexity'])}, "
           f"{words.bits(own['bits_per_byte'])} bits per byte. If the node merged others afterwards, or relies on its "
           "federation's model, what is here is a little different.")
  if any(model.path in (found["node"], found["also_in_node"]) for found in summary.get("duplicates", ())):
    yield "Some test documents are also in training texts; the run's summary.json lists them."
