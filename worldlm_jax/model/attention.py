"""Causal attention over the positions of a window, by the kernel that the machine has.

  cudnn    cuDNN's flash attention, on NVIDIA GPUs
  splash   the Pallas kernel of JAX, on TPUs
  xla      einsums, anywhere; holds all scores `[B, H, T, T]`

A document's positions may be kept from seeing those of others: splash takes the documents' numbers, cuDNN has no such
mask but a bias of all scores, which costs the memory that the kernel is there to save; so einsums do it there.

Shapes: B windows, T positions, H heads, K key-value heads, G = H / K query heads for each of them, C head width;
S positions that are seen.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from worldlm_jax import checks, partition
from worldlm_jax.partition import FSDP, TENSOR

MASKED = -1e30  # added to the score of a position that is not seen

LEAST_COMPUTE_CAPABILITY = 8.0  # of NVIDIA GPUs that have cuDNN's kernel: from Ampere on
WIDEST_CUDNN_HEAD = 128  # newer GPUs allow 256
SPLASH_BLOCKS = (512, 256, 128)  # tiles of the TPU kernel; the largest that divides T is taken


def check(name: str) -> None:
  """Raises `InputError` where the machine does not have the attention of this name."""
  device = jax.local_devices()[0]
  found = f"{device.platform} ({device.device_kind})"
  if name == "cudnn":
    checks.require(_has_cudnn(device), "config.model.attention", name,
                   f"an NVIDIA GPU of compute capability {LEAST_COMPUTE_CAPABILITY} or more, not {found}",
                   "'auto' chooses what the machine has")
  if name == "splash":
    checks.require(device.platform == "tpu", "config.model.attention", name, f"a TPU, not {found}",
                   "'auto' chooses what the machine has")


def choose(device: Any, dtype: jnp.dtype, length: int, head_width: int, masked: bool) -> str:
  """What "auto" stands for on a device: "cudnn", "splash" or "xla".

  Args:
    device: a `jax.Device`.
    dtype: of queries, keys and values.
    length: T.
    head_width: C.
    masked: whether attention stays within documents.
  """
  if device.platform == "tpu" and not unsuited("splash", dtype, length, head_width, masked):
    return "splash"
  if _has_cudnn(device) and not unsuited("cudnn", dtype, length, head_width, masked):
    return "cudnn"
  return "xla"


def unsuited(name: str, dtype: jnp.dtype, length: int, head_width: int, masked: bool) -> str:
  """Why a kernel cannot do this, in terms of the config; "" if it can. Arguments as for `choose`."""
  if name == "cudnn":
    if dtype not in (jnp.bfloat16, jnp.float16):
      return "model.compute_dtype=bfloat16"
    if head_width % 8 or head_width > WIDEST_CUDNN_HEAD:
      return f"heads whose width is a multiple of 8 and at most {WIDEST_CUDNN_HEAD}, not {head_width}"
    if masked:
      return "data.document_mask=False"
  if name == "splash" and length % SPLASH_BLOCKS[-1]:
    return f"data.sequence_length a multiple of {SPLASH_BLOCKS[-1]}, not {length}"
  return ""


def attend(
  name: str, q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array, v_BxTxKxC: jax.Array, document_BxT: jax.Array | None
) -> jax.Array:
  """What each position takes from itself and those before it: `[B, T, H, C]`, in the dtype of the values.

  Args:
    name: "auto", "xla", "cudnn" or "splash".
    q_BxTxHxC: queries, already divided by the square root of C; query head h sees key-value head h // G.
    k_BxTxKxC: keys.
    v_BxTxKxC: values.
    document_BxT: int32, the number of each position's document, which it does not see beyond; None for no bounds.

  Raises:
    checks.InputError: the kernel asked for by name does not suit the shapes or the dtype.
  """
  shape = q_BxTxHxC.dtype, q_BxTxHxC.shape[1], q_BxTxHxC.shape[3], document_BxT is not None
  if name == "auto":
    name = choose(jax.local_devices()[0], *shape)
  needed = unsuited(name, *shape)
  checks.require(not needed, "config.model.attention", name, needed, "'auto' chooses what suits")
  if name == "xla":
    return _einsums(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, document_BxT)
  # Both kernels want to see whole arrays of one device.
  heads = partition.split(TENSOR, q_BxTxHxC.shape[2], k_BxTxKxC.shape[2])
  spec = partition.split(FSDP, q_BxTxHxC.shape[0]), None, heads, None
  kernel = {"cudnn": _cudnn, "splash": _splash}[name]
  documents = () if document_BxT is None else (document_BxT,)
  return partition.per_shard(kernel, (spec, spec, spec, spec[:2])[: 3 + len(documents)], spec)(
    q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, *documents
  )


@jax.custom_vjp
def matmul_float32(a: jax.Array, b: jax.Array) -> jax.Array:
  """`a @ b` for stacks of matrices of one dtype, in float32; its gradient is computed in their own dtype.

  JAX would multiply the float32 gradient with the other matrix in float32, many times slower than bfloat16.
  """
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _matmul_forward(a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return matmul_float32(a, b), (a, b)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  a, b = saved
  gradient = gradient.astype(a.dtype)
  return gradient @ b.mT, a.mT @ gradient


matmul_float32.defvjp(_matmul_forward, _matmul_backward)


def attend_seen(
  q_BxTxHxC: jax.Array, k_BxSxKxC: jax.Array, v_BxSxKxC: jax.Array, seen_BxTxS: jax.Array
) -> jax.Array:
  """What each of T positions takes from those of S others that it sees (bool, B or 1 of them): `[B, T, H, C]`.

  Scores, float32 softmax, mixture. The queries of a key-value head are rows of one matrix, with it and T first.
  """
  batch, length, num_heads, width = q_BxTxHxC.shape
  num_kv_heads = k_BxSxKxC.shape[2]
  group = num_heads // num_kv_heads
  q_BxTxKxGxC = q_BxTxHxC.reshape(batch, length, num_kv_heads, group, width)
  q_BxKxGTxC = q_BxTxKxGxC.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, group * length, width)
  scores_BxKxGTxS = matmul_float32(q_BxKxGTxC, k_BxSxKxC.transpose(0, 2, 3, 1))
  # Added, not selected: the gradient passes through.
  bias_BxTxS = jnp.where(seen_BxTxS, jnp.float32(0), MASKED)
  scores = scores_BxKxGTxS.reshape(batch, num_kv_heads, group, length, -1) + bias_BxTxS[:, None, None]
  weights_BxKxGTxS = jax.nn.softmax(scores, axis=-1).astype(v_BxSxKxC.dtype).reshape(scores_BxKxGTxS.shape)
  mixed = (weights_BxKxGTxS @ v_BxSxKxC.transpose(0, 2, 1, 3)).reshape(batch, num_kv_heads, group, length, width)
  return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, width)


def _einsums(q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array, v_BxTxKxC: jax.Array, document_BxT: Any) -> jax.Array:
  t = jnp.arange(q_BxTxHxC.shape[1])
  seen_BxTxT = (t[:, None] >= t[None, :])[None]
  if document_BxT is not None:
    seen_BxTxT = seen_BxTxT & (document_BxT[:, :, None] == document_BxT[:, None, :])
  return attend_seen(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, seen_BxTxT)


def _cudnn(q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array, v_BxTxKxC: jax.Array) -> jax.Array:
  return jax.nn.dot_product_attention(
    q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, scale=1.0, is_causal=True, implementation="cudnn"
  )


def _splash(
  q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array, v_BxTxKxC: jax.Array, document_BxT: jax.Array | None = None,
  *, interpret: bool = False,
) -> jax.Array:
  """The Pallas kernel, of one window at a time; `interpret` runs it without a TPU, slowly."""
  length, num_heads = q_BxTxHxC.shape[1:3]
  block = next(size for size in SPLASH_BLOCKS if length % size == 0)
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * num_heads)
  blocks = splash_attention_kernel.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
  )
  kernel = splash_attention_kernel.make_splash_mha(
    mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
  )

  def window(q_TxHxC: jax.Array, k_TxKxC: jax.Array, v_TxKxC: jax.Array, document_T: jax.Array | None) -> jax.Array:
    documents = None if document_T is None else splash_attention_kernel.SegmentIds(document_T, document_T)
    mixed = kernel(*(x.swapaxes(0, 1) for x in (q_TxHxC, k_TxKxC, v_TxKxC)), segment_ids=documents)
    return mixed.swapaxes(0, 1)

  return jax.vmap(window)(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, document_BxT)


def _has_cudnn(device: Any) -> bool:
  """Whether a device is an NVIDIA GPU that is new enough."""
  return "NVIDIA" in device.device_kind and float(device.compute_capability) >= LEAST_COMPUTE_CAPABILITY
