"""Our models as Hugging Face's `LlamaForCausalLM`, and those as ours: names, layouts and configurations.

Both rotate the first half of a head with the second, so that nothing is permuted; their matrices are ours transposed.
Weights are read and written as safetensors, in one file or several with an index.
"""

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from worldlm_jax import checks
from worldlm_jax.config import ModelConfig
from worldlm_jax.model.transformer import Architecture, Params, abstract_params

MATRICES = {
  "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
  "attention_out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_LAYERS = 10_000
DTYPES = ("F32", "BF16", "F16")  # of weights that can be read


class Place(NamedTuple):
  """Where a weight of theirs is in our parameters."""

  keys: tuple[str, ...]
  layer: int | None  # of a stack
  is_transposed: bool

  def shape(self, abstract: Params) -> tuple[int, ...]:
    """That theirs has; parameters may be abstract."""
    found = self._leaf(abstract).shape[0 if self.layer is None else 1 :]
    return found[::-1] if self.is_transposed else found

  def weight(self, params: Params) -> np.ndarray:
    """The weight as they have it."""
    found = np.asarray(self._leaf(params) if self.layer is None else self._leaf(params)[self.layer])
    return np.ascontiguousarray(found.T) if self.is_transposed else found

  def _leaf(self, params: Params) -> Any:
    return functools.reduce(lambda tree, key: tree[key], self.keys, params)


def places(arch: Architecture) -> dict[str, Place]:
  """By the name of every weight of theirs, where it is in ours; in the order of the layers."""
  found, split = {EMBEDDING: Place(("backbone", "embedding"), None, False)}, arch.num_layers - arch.num_key_layers
  for number in range(arch.num_layers):
    stack, layer = (("backbone", "blocks"), number) if number < split else (("key_layers",), number - split)
    for ours, theirs in NORMS.items():
      found[f"model.layers.{number}.{theirs}.weight"] = Place((*stack, ours), layer, False)
    for ours, theirs in MATRICES.items():
      found[f"model.layers.{number}.{theirs}.weight"] = Place((*stack, ours, "kernel"), layer, True)
  found[FINAL_NORM] = Place(("backbone", "final_norm"), None, False)
  if not arch.tied_head:
    found[HEAD] = Place(("backbone", "head"), None, True)
  return found


def params_of(arch: Architecture, read: Callable[[str], np.ndarray]) -> Params:
  """The parameters that `read` gives by name, as ours: numpy, float32."""
  split = arch.num_layers - arch.num_key_layers

  def stacked(numbers: range) -> dict[str, Any]:
    def weights(theirs: str) -> list[np.ndarray]:
      return [read(f"model.layers.{number}.{theirs}.weight") for number in numbers]

    norms: dict[str, Any] = {ours: np.stack(weights(theirs)) for ours, theirs in NORMS.items()}
    return norms | {ours: {"kernel": np.stack([w.T for w in weights(theirs)])} for ours, theirs in MATRICES.items()}

  backbone = {
    "embedding": read(EMBEDDING), "blocks": stacked(range(split)) if split else {}, "final_norm": read(FINAL_NORM)
  }
  if not arch.tied_head:
    backbone["head"] = np.ascontiguousarray(read(HEAD).T)
  return {"backbone": backbone, "key_layers": stacked(range(split, arch.num_layers)) if arch.num_key_layers else {}}


def write(folder: Path, arch: Architecture, params: Params, max_shard_bytes: int, config: Mapping[str, Any]) -> None:
  """Writes weights and config.json into a folder that exists.

  Args:
    folder: gets `model.safetensors`, or shards of at most `max_shard_bytes` (a single weight may be larger) and
      their index.
    arch: the model.
    params: its parameters.
    max_shard_bytes: of a file.
    config: what config.json says besides the architecture.
  """
  library, where = _safetensors(), places(arch)
  shards: list[list[str]] = [[]]
  sizes, room = {name: 4 * math.prod(shape) for name, shape in _shapes(arch).items()}, max_shard_bytes
  for name, size in sizes.items():
    if size > room and shards[-1]:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(name)
    room -= size
  files = [WEIGHTS] if len(shards) == 1 else [
    f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
  ]
  for file, shard in zip(files, shards, strict=True):
    weights = {name: where[name].weight(params) for name in shard}
    library.numpy.save_file(weights, folder / file, metadata={"format": "pt"})  # whose layout it is, for transformers
  if len(shards) > 1:
    index = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index})
  _write_json(folder / CONFIG, llama_config(arch) | dict(config))


def total_bytes(arch: Architecture) -> int:
  """The size of all weights in float32."""
  return sum(4 * math.prod(shape) for shape in _shapes(arch).values())


def llama_config(arch: Architecture) -> dict[str, Any]:
  """What config.json says of an architecture, for versions 4 and 5 of transformers."""
  return {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": arch.vocab_size,
    "hidden_size": arch.d_model, "intermediate_size": arch.d_ff, "num_hidden_layers": arch.num_layers,
    "num_attention_heads": arch.num_heads, "num_key_value_heads": arch.num_kv_heads,
    "head_dim": arch.d_model // arch.num_heads, "hidden_act": "silu", "rms_norm_eps": arch.norm_epsilon,
    "rope_theta": arch.rope_base, "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": arch.rope_base},
    "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": arch.tied_head,
    "use_cache": True, "torch_dtype": "float32", "dtype": "float32",
  }


def model_config(folder: Path) -> dict[str, Any]:
  """The fields of `ModelConfig` that a folder's config.json determines.

  Raises:
    checks.InputError: there is none, or it asks for what our models do not have; names the field.
  """
  where = folder / CONFIG
  try:
    found = checks.read_json(where)
  except (OSError, ValueError) as error:
    checks.fail("config.model.init_from", str(folder), f"a folder of a Hugging Face model, with {CONFIG}", str(error))

  checks.require(isinstance(found, dict), str(where), type(found).__name__, "a JSON object")

  def refuse_unless(ok: bool, field: str, expected: str) -> None:
    checks.require(ok, f"{where}: {field}", found.get(field), expected, "models of other kinds cannot be continued")

  refuse_unless(found.get("model_type") == "llama", "model_type", "'llama'")
  refuse_unless(found.get("hidden_act", "silu") in ("silu", "swish"), "hidden_act", "'silu'")
  for field in ("attention_bias", "mlp_bias", "sliding_window", "quantization_config", "num_experts"):
    refuse_unless(not found.get(field), field, "none")
  for field in ("rope_parameters", "rope_scaling"):
    refuse_unless(isinstance(found.get(field) or {}, dict), field, "a JSON object")
  rope = (found.get("rope_parameters") or {}) | (found.get("rope_scaling") or {})
  kind = rope.get("rope_type", rope.get("type", "default"))
  scaled = "rope_scaling" if found.get("rope_scaling") else "rope_parameters"
  refuse_unless(kind == "default" and rope.get("partial_rotary_factor", 1) == 1, scaled, "rotary positions as they are")
  refuse_unless(found.get("partial_rotary_factor", 1) == 1, "partial_rotary_factor", "1")
  needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
  for field in (*needed, *(field for field in ("num_key_value_heads", "head_dim") if found.get(field))):
    value = found.get(field)
    most = MAX_LAYERS if field == "num_hidden_layers" else 2**31 - 1
    ok = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
    refuse_unless(ok, field, f"a whole number from 1 to {most}")
  heads, width = found["num_attention_heads"], found["hidden_size"]
  refuse_unless((found.get("head_dim") or width // heads) * heads == width, "head_dim", f"{width} / {heads}")
  theta = rope.get("rope_theta", found.get("rope_theta")) or 10_000.0  # the defaults are those of LlamaConfig
  epsilon = found.get("rms_norm_eps", 1e-6)
  for field, number in (("rope_theta", theta), ("rms_norm_eps", epsilon)):
    ok = isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < 2**127
    checks.require(ok, f"{where}: {field}", number, "a positive number")
  return {
    "num_layers": found["num_hidden_layers"], "d_model": width, "num_heads": heads,
    "num_kv_heads": found.get("num_key_value_heads") or heads, "d_ff": found["intermediate_size"],
    "vocab_size": found["vocab_size"], "rope_base": float(theta),
    "norm_epsilon": float(epsilon), "tied_head": bool(found.get("tie_word_embeddings", False)),
  }


def adopted(config: ModelConfig) -> ModelConfig:
  """The config with what `init_from` determines; fields that are not at their defaults have to say the same.

  Raises:
    checks.InputError: one does not; names it.
  """
  if not config.init_from:
    return config
  checks.require(isinstance(config.init_from, str), "config.model.init_from", config.init_from, "a folder's path")
  folder, defaults = Path(config.init_from).expanduser(), ModelConfig()
  values = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
  for name, theirs in model_config(folder).items():
    if values[name] != theirs:
      checks.require(values[name] == getattr(defaults, name), f"config.model.{name}", values[name],
                     f"{theirs!r}, as {folder / CONFIG} has it", "leave the field out: the model's own is taken")
    values[name] = theirs
  return ModelConfig(**values)


def read(folder: Path, arch: Architecture) -> Params:
  """The parameters of a folder: numpy, float32, whatever of `DTYPES` the files have.

  Raises:
    checks.InputError: files or weights are missing, there are others than a Llama has, or their shapes are not those
      of `arch`.
  """
  library, files, handles = _safetensors(), _files(folder), {}
  shapes = _shapes(arch)
  ignored = ("rotary_emb.inv_freq",) if not arch.tied_head else ("rotary_emb.inv_freq", HEAD)
  foreign = [name for name in files if name not in shapes and not name.endswith(ignored)]
  checks.require(not foreign, f"{folder}: weights", foreign[:3], "those of a Llama without biases alone",
                 "models of other kinds cannot be continued")
  missing = [name for name in shapes if name not in files]
  checks.require(not missing, f"{folder}: weights", missing[:3], "all weights of its config.json, but it lacks these",
                 "fetch all files of the model")

  def weight(name: str) -> np.ndarray:
    file = files[name]
    with _explained(file):
      if file not in handles:
        handles[file] = library.safe_open(file, framework="numpy")
      found = handles[file].get_slice(name)
      kind, shape = found.get_dtype(), tuple(found.get_shape())
    checks.require(kind in DTYPES, f"{file}: {name}", kind, f"one of {', '.join(DTYPES)}",
                   "quantised weights cannot be read")
    checks.require(shape == shapes[name], f"{file}: {name}", shape, f"the shape {shapes[name]} of its config.json")
    with _explained(file):
      tensor = handles[file].get_tensor(name)
    return np.asarray(tensor, np.float32)

  return params_of(arch, weight)


def _files(folder: Path) -> dict[str, Path]:
  """By name of a weight, the file that it is in."""
  library, index = _safetensors(), folder / INDEX
  if index.exists():
    where = checks.read_object(index, "weight_map")["weight_map"]
    ok = isinstance(where, dict) and all(isinstance(file, str) and Path(file).name == file for file in where.values())
    checks.require(ok, f"{index}: weight_map", type(where).__name__, "names of files in the folder, by weight")
    lost = sorted({file for file in where.values() if not os.path.isfile(folder / file)})
    checks.require(not lost, str(index), lost[:3], "files that are there", "fetch all files of the model")
    return {name: folder / file for name, file in where.items()}
  single = folder / WEIGHTS
  checks.require(single.is_file(), "config.model.init_from", str(folder), f"a folder with {WEIGHTS} or {INDEX}",
                 "convert other files with save_pretrained of transformers")
  with _explained(single), library.safe_open(single, framework="numpy") as file:
    names = list(file.keys())
  return dict.fromkeys(names, single)


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # the library has errors of its own, and those of the file system
    checks.fail("config.model.init_from", str(file), f"a file of safetensors ({error})", "fetch it again")


def _shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
  """By name, the shape of every weight as they have it."""
  abstract = abstract_params(arch)
  return {name: place.shape(abstract) for name, place in places(arch).items()}


def _safetensors() -> Any:
  try:
    import safetensors.numpy
  except ModuleNotFoundError as error:
    raise checks.InputError("safetensors is not installed, with which weights are read and written: "
                            "pip install 'worldlm_jax[export]'") from error
  return safetensors


def _write_json(path: Path, content: Any) -> None:
  path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
