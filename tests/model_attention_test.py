"""Attention: the TPU kernel against the einsums, which kernel is chosen, and that programs for TPUs and GPUs hold them.

There is no such machine here: JAX lowers programs for them, and Pallas interprets its kernel on the CPU.
"""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldlm_jax import local, model, partition
from worldlm_jax.config import ModelConfig, OptimizerConfig
from worldlm_jax.model import attention

Device = collections.namedtuple("Device", "platform device_kind compute_capability", defaults=("",))
CPU, TPU = Device("cpu", "cpu"), Device("tpu", "TPU v5e")
H200, V100 = Device("gpu", "NVIDIA H200", "9.0"), Device("gpu", "Tesla V100-SXM2-16GB", "7.0")
MI300 = Device("gpu", "AMD Instinct MI300X", "gfx942")
NEW_GPU = Device("gpu", "NVIDIA B200", "10.0")


@pytest.mark.parametrize(("device", "changes", "name"), [
  (CPU, {}, "xla"),
  (TPU, {}, "splash"), (TPU, {"masked": True}, "splash"), (TPU, {"dtype": jnp.float32}, "splash"),
  (TPU, {"length": 200}, "xla"),
  (H200, {}, "cudnn"), (NEW_GPU, {"head_width": 128}, "cudnn"), (H200, {"length": 201}, "cudnn"),
  (H200, {"dtype": jnp.float32}, "xla"), (H200, {"head_width": 20}, "xla"), (H200, {"head_width": 256}, "xla"),
  (H200, {"masked": True}, "xla"),
  (V100, {}, "xla"), (MI300, {}, "xla"),
])
def test_the_kernel_is_that_of_the_machine_where_it_suits(device, changes, name):
  usual = {"dtype": jnp.bfloat16, "length": 256, "head_width": 64, "masked": False}
  assert attention.choose(device, **(usual | changes)) == name


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_a_kernel_that_the_machine_lacks_is_refused(name):
  with pytest.raises(ValueError, match=rf"config.model.attention='{name}': expected a.*, not cpu.*; 'auto' chooses"):
    model.architecture(ModelConfig(attention=name), 257)


@pytest.mark.parametrize(("name", "dtype", "message"), [
  ("splash", jnp.bfloat16, "data.sequence_length a multiple of 128, not 48"),
  ("cudnn", jnp.float32, "model.compute_dtype=bfloat16"),
])
def test_a_kernel_that_does_not_suit_is_refused(name, dtype, message):
  q = jnp.zeros((1, 48, 2, 8), dtype)
  with pytest.raises(ValueError, match=rf"config.model.attention='{name}': expected {message}; 'auto' chooses"):
    attention.attend(name, q, q, q, None)


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("masked", [False, True])
def test_the_tpu_kernel_computes_what_the_einsums_do(masked):
  """With its gradient, four query heads to two key-value heads, for two nodes at a time."""
  length, width = 256, 8
  q, k, v, probe = (draw(i, 2, 1, length, heads, width) for i, heads in enumerate((4, 2, 2, 4)))
  document = np.cumsum(draw(5, 2, 1, length) > 2, axis=-1).astype(np.int32) if masked else None
  assert document is None or document.max() > 2

  def both(attend):
    mixed = lambda q, k, v, d: attend(q, k, v, d)
    gradient = lambda q, k, v, d, p: jax.grad(lambda *qkv: jnp.sum(p * attend(*qkv, d)), argnums=(0, 1, 2))(q, k, v)
    return jax.jit(lambda *a: (jax.vmap(mixed)(*a[:4]), jax.vmap(gradient)(*a)))(q, k, v, document, probe)

  expected = both(attention._einsums)
  found = both(functools.partial(attention._splash, interpret=True))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_in_float32_have_gradients_in_the_dtype_of_the_matrices(dtype):
  a, b, probe = (jnp.asarray(draw(i, *shape)) for i, shape in enumerate([(2, 3, 5), (2, 5, 7), (2, 3, 7)]))
  a, b = a.astype(dtype), b.astype(dtype)
  gradient = jax.grad(lambda a, b: jnp.sum(probe * attention.matmul_float32(a, b)), argnums=(0, 1))
  assert attention.matmul_float32(a, b).dtype == jnp.float32
  wide = probe.astype(dtype).astype(jnp.float32)
  for found, expected in zip(gradient(a, b), (wide @ b.astype(jnp.float32).mT, a.astype(jnp.float32).mT @ wide),
                             strict=True):
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=1e-5 if dtype == jnp.float32 else 1e-2,
                               atol=1e-5 if dtype == jnp.float32 else 1e-2)


def lowered(platform, name, fsdp, tensor, separator=None, **options):
  """The program in which two nodes of each group of devices train, for another platform."""
  config = ModelConfig(num_layers=2, d_model=128, num_heads=4, num_kv_heads=2, d_ff=256, compute_dtype="bfloat16",
                       key_layer_share=0.0, **options)
  arch = dataclasses.replace(model.architecture(config, 257, separator), attention=name)
  optimizer, mesh = OptimizerConfig(), partition.make_mesh(jax.devices()[:4], fsdp, tensor)
  params = model.abstract_params(arch)
  scalar = jax.ShapeDtypeStruct((), jnp.float32)
  count = jax.ShapeDtypeStruct((), jnp.int32)
  work = local.Workload(jax.ShapeDtypeStruct((1, 4, 129), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32), count,
                        count, scalar, scalar, scalar)
  node = params, jax.eval_shape(local.optimizer(optimizer).init, params), work
  stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((8 // math.prod((fsdp, tensor)), *leaf.shape), leaf.dtype),
                         node)
  placed = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                        stacked, partition.shardings(stacked, mesh))
  train = jax.jit(functools.partial(local.train_nodes, arch, optimizer, mesh))
  return train.trace(*placed).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("fsdp", "tensor", "separator", "remat"), [
  (1, 1, None, "none"), (2, 2, 5, "none"), (1, 4, None, "dots"),
])
def test_programs_for_tpus_hold_the_pallas_kernel(fsdp, tensor, separator, remat):
  text = lowered("tpu", "splash", fsdp, tensor, separator, remat=remat)
  for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
    assert kernel in text
  assert ("segmented" in text) == (separator is not None)
  # Two nodes, each device's share of the four windows, and of the heads where they can be shared out.
  heads = 4 // tensor if tensor <= 2 else 4
  assert f"tensor<2x{4 // fsdp}x{heads}x128x32xbf16>" in text


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (2, 2)])
def test_programs_for_nvidia_gpus_hold_the_cudnn_kernel(monkeypatch, fsdp, tensor):
  # JAX asks the machine for the version of cuDNN as it traces.
  monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
  text = lowered("cuda", "cudnn", fsdp, tensor)
  assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
  assert f"tensor<{2 * 4 // fsdp}x128x{4 // tensor}x32xbf16>" in text  # the nodes' windows are one batch
