"""Models as Hugging Face has them: transformers computes the same logits, and what was written is read back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from worldlm_jax import checks, config as config_lib, model
from worldlm_jax.model import llama

V = 37
# Grouped queries, an untied head, another rotary base and epsilon, blocks in both parts; and the plainest there is.
ARCHITECTURES = {
  "grouped": {"num_kv_heads": 2, "tied_head": False, "rope_base": 500.0, "norm_epsilon": 1e-2, "key_layer_share": 0.4},
  "plain": {"num_kv_heads": 4, "tied_head": True, "key_layer_share": 0.0},
  "all key layers": {"num_kv_heads": 1, "key_layer_share": 1.0},
}


def _architecture(**changes: Any) -> model.Architecture:
  config = config_lib.ModelConfig(num_layers=3, d_model=32, num_heads=4, d_ff=23)
  return model.architecture(dataclasses.replace(config, **changes), V)


def _params(arch: model.Architecture) -> model.Params:
  """Far from what init gives: every norm and matrix matters."""
  draw = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: draw.normal(0.5, 0.3, leaf.shape).astype(np.float32), model.abstract_params(arch))


def _written(folder: Path, arch: model.Architecture, shard_bytes: int = 10**9, **config: Any) -> model.Params:
  folder.mkdir(exist_ok=True)
  params = _params(arch)
  llama.write(folder, arch, params, shard_bytes, config)
  return params


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_computes_the_same_logits(tmp_path: Path, name: str) -> None:
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  arch = _architecture(**ARCHITECTURES[name])
  params = _written(tmp_path, arch, 4000 if name == "grouped" else 10**9, max_position_embeddings=64)
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
  assert isinstance(theirs, transformers.LlamaForCausalLM) and not report["missing_keys"], report
  tokens = np.random.default_rng(1).integers(0, V, (2, 41))
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens)).logits.numpy()
  found = np.asarray(model.apply(arch, params, jnp.asarray(tokens)))
  assert expected.std() > 0.3
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_was_written_is_read_back(tmp_path: Path, name: str, shard_bytes: int) -> None:
  arch = _architecture(**ARCHITECTURES[name])
  params = _written(tmp_path, arch, shard_bytes)
  files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  if shard_bytes == 4000:
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert max((tmp_path / file).stat().st_size for file in files) < max(4000, 4 * V * 32) + 2000  # and a header
    index = json.loads((tmp_path / llama.INDEX).read_text())
    assert index["metadata"]["total_size"] == llama.total_bytes(arch) and set(index["weight_map"].values()) == {*files}
  else:
    assert files == [llama.WEIGHTS] and not (tmp_path / llama.INDEX).exists()
  jax.tree.map(np.testing.assert_array_equal, llama.read(tmp_path, arch), params)


def test_a_config_takes_over_what_the_model_has_and_must_not_say_otherwise(tmp_path: Path) -> None:
  arch = _architecture(**ARCHITECTURES["grouped"])
  _written(tmp_path, arch)
  config = llama.adopted(config_lib.ModelConfig(init_from=str(tmp_path), key_layer_share=0.4))
  assert model.architecture(config, V) == arch
  assert llama.adopted(config) == config
  assert llama.adopted(config_lib.ModelConfig()) == config_lib.ModelConfig()
  with pytest.raises(checks.InputError, match=r"config.model.d_ff=24: expected 23, as .*config.json has it; leave"):
    llama.adopted(dataclasses.replace(config, d_ff=24))


REFUSED = {
  "model_type": "gpt2", "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "sliding_window": 512,
  "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": {"rope_type": "yarn"}, "head_dim": 16,
  "quantization_config": {"bits": 4}, "hidden_size": None, "partial_rotary_factor": 0.5,
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_our_models_do_not_have_is_refused(tmp_path: Path, field: str) -> None:
  content = llama.llama_config(_architecture()) | {field: REFUSED[field]}
  (tmp_path / llama.CONFIG).write_text(json.dumps(content))
  with pytest.raises(checks.InputError, match=f"config.json: {field}="):
    llama.model_config(tmp_path)


def test_configs_of_earlier_versions_mean_what_they_meant(tmp_path: Path) -> None:
  """Without the fields that came later, and with the defaults of LlamaConfig."""
  old = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 23, "num_hidden_layers": 3,
         "num_attention_heads": 4, "vocab_size": V, "rope_theta": 77.0, "hidden_act": "silu", "rope_scaling": None}
  (tmp_path / llama.CONFIG).write_text(json.dumps(old))
  found = llama.model_config(tmp_path)
  expected = {"num_kv_heads": 4, "rope_base": 77.0, "norm_epsilon": 1e-6, "tied_head": False}
  assert {name: found[name] for name in expected} == expected
  del old["rope_theta"]
  (tmp_path / llama.CONFIG).write_text(json.dumps(old))
  assert llama.model_config(tmp_path)["rope_base"] == 10_000.0


def test_files_of_other_kinds_and_shapes(tmp_path: Path) -> None:
  import safetensors.numpy

  arch = _architecture(**ARCHITECTURES["plain"])
  params = _written(tmp_path, arch)
  weights = safetensors.numpy.load_file(tmp_path / llama.WEIGHTS)

  def read(**changes: np.ndarray | None) -> model.Params:
    changed = {name.replace("__", "."): weight for name, weight in changes.items()}
    content = {name: weight for name, weight in (weights | changed).items() if weight is not None}
    safetensors.numpy.save_file(content, tmp_path / llama.WEIGHTS)
    return llama.read(tmp_path, arch)

  halves = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in weights.items()}
  rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), params)
  jax.tree.map(np.testing.assert_array_equal, read(**halves), rounded)
  extra = {"lm_head.weight": weights[llama.EMBEDDING], "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}
  jax.tree.map(np.testing.assert_array_equal, read(**extra), params)  # what some files repeat
  norm = llama.FINAL_NORM
  with pytest.raises(checks.InputError, match=r"weights=\['model.layers.0.self_attn.q_proj.bias'\]"):
    read(**{"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)})
  with pytest.raises(checks.InputError, match=r"weights=\['model.norm.weight'\].*lacks"):
    read(**{norm: None})
  with pytest.raises(checks.InputError, match=r"model.norm.weight=\(31,\): expected the shape \(32,\)"):
    read(**{norm: np.ones(31, np.float32)})
  with pytest.raises(checks.InputError, match=r"model.norm.weight='I8': expected one of F32"):
    read(**{norm: np.ones(32, np.int8)})
  (tmp_path / llama.WEIGHTS).write_bytes(b"nothing")
  with pytest.raises(checks.InputError, match=r"expected a file of safetensors"):
    llama.read(tmp_path, arch)
