"""A decoder-only transformer of the Llama family: pre-norm RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Flax NNX describes one block; the blocks are stacked on a leading layer axis and scanned, so that
compile time does not grow with depth. To everything outside `model/` a model is two pure functions,
`init` and `apply`, over the pytree `{"backbone": ..., "key_layers": ...}`:

  backbone    embedding, the first L - m blocks, final norm and (untied) head: shared by all
  key_layers  the last m blocks, leaves `[m, ...]`; empty where m = 0: personal to each node

Shapes: B windows, T positions, D width, H heads, K key-value heads, C head width, V vocabulary; N is B x T. S places
and m blocks of a stack.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from worldlm_jax import config as config_lib, partition
from worldlm_jax.config import ModelConfig
from worldlm_jax.model import attention
from worldlm_jax.partition import FSDP, TENSOR

Params = dict[str, Any]

CHUNK_LOGITS = 2**24  # how many logits the loss holds at once: 64 MiB of float32


@dataclasses.dataclass(frozen=True)
class Architecture:
  """The frozen, hashable form of `ModelConfig`, with the vocabulary size and `m` filled in."""

  num_layers: int
  num_key_layers: int
  d_model: int
  num_heads: int
  num_kv_heads: int
  d_ff: int
  vocab_size: int
  rope_base: float
  norm_epsilon: float
  tied_head: bool
  compute_dtype: str
  attention: str
  remat: str
  document_separator: int | None  # attention does not reach back beyond this token; None: it reaches everything


def architecture(
  config: ModelConfig, vocab_size: int, document_separator: int | None = None, num_key_layers: int | None = None
) -> Architecture:
  """Freezes a model config; `vocab_size` is the tokenizer's, used where the config says 0.

  `num_key_layers` takes the place of the config's share, for algorithms that have none.

  Raises:
    checks.InputError: the config asks for an attention that this machine does not have.
  """
  attention.check(config.attention)
  fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}
  del fields["key_layer_share"], fields["init_from"]
  fields["vocab_size"] = config.vocab_size or vocab_size
  if num_key_layers is None:
    num_key_layers = config_lib.num_key_layers(config)
  return Architecture(num_key_layers=num_key_layers, document_separator=document_separator, **fields)


def init(arch: Architecture, key: jax.Array) -> Params:
  """Random parameters, float32: matrices N(0, 2 / (5 D)), those that write to the residual stream / sqrt(2 L).

  The spread is 0.02 at D = 1024, as usual, and grows in narrower models, which otherwise spend most of a short run
  on a plateau (T. Q. Nguyen and J. Salazar, arXiv:1910.05895).
  """
  key_embed, key_head, key_blocks = jax.random.split(key, 3)

  def init_block(block_key: jax.Array) -> Any:
    return nnx.to_pure_dict(nnx.state(_Block(arch, rngs=nnx.Rngs(block_key)), nnx.Param))

  blocks = jax.vmap(init_block)(jax.random.split(key_blocks, arch.num_layers))
  split = arch.num_layers - arch.num_key_layers
  backbone = {
    "embedding": _spread(arch) * jax.random.normal(key_embed, (arch.vocab_size, arch.d_model)),
    "blocks": jax.tree.map(lambda leaf: leaf[:split], blocks) if split else {},
    "final_norm": jnp.ones(arch.d_model),
  }
  if not arch.tied_head:
    backbone["head"] = _spread(arch) * jax.random.normal(key_head, (arch.d_model, arch.vocab_size))
  key_layers = jax.tree.map(lambda leaf: leaf[split:], blocks) if arch.num_key_layers else {}
  return {"backbone": backbone, "key_layers": key_layers}


def abstract_params(arch: Architecture) -> Params:
  """The shapes and dtypes of `init`'s result, without computing it."""
  return jax.eval_shape(lambda: init(arch, jax.random.key(0)))


def apply(arch: Architecture, params: Params, tokens_BxT: jax.Array) -> jax.Array:
  """Logits of each next token: int tokens `[B, T]` -> `[B, T, V]` in the compute dtype.

  With `arch.document_separator`, a position sees those before it in its own document alone, from its
  separator on.
  """
  return logits(arch, params, _final_hidden(arch, params, tokens_BxT))


class Cache(NamedTuple):
  """What tokens leave to those that come after them in their windows."""

  keys: tuple[jax.Array, ...]  # of each stack of blocks, [m, B, S, K, C] in the compute dtype; the values likewise
  values: tuple[jax.Array, ...]
  document_BxS: jax.Array  # int32, the number of each token's document


def empty_cache(arch: Architecture, num_windows: int, length: int) -> Cache:
  """A cache for windows of up to `length` tokens."""
  shape = num_windows, length, arch.num_kv_heads, arch.d_model // arch.num_heads
  depths = [depth for depth in (arch.num_layers - arch.num_key_layers, arch.num_key_layers) if depth]
  keys, values = (tuple(jnp.zeros((m, *shape), jnp.dtype(arch.compute_dtype)) for m in depths) for _ in range(2))
  return Cache(keys, values, jnp.zeros((num_windows, length), jnp.int32))


def extend(
  arch: Architecture, params: Params, tokens_BxT: jax.Array, cache: Cache, start_B: jax.Array
) -> tuple[jax.Array, Cache]:
  """Continues windows: the final hidden states of more tokens, `[B, T, D]` as `apply` has them, and the new cache.

  Args:
    arch: the architecture.
    params: `{"backbone", "key_layers"}`.
    tokens_BxT: int. A window may end in tokens that are not meant, as long as whatever continues it begins at their
      places.
    cache: of the tokens before them.
    start_B: int32, how many tokens of each window come before; `start + T` is at most the cache's length.
  """
  put = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))
  places_BxT = start_B[:, None] + jnp.arange(tokens_BxT.shape[1])[None, :]
  places_S = jnp.arange(cache.document_BxS.shape[1])
  seen_BxTxS = places_BxT[:, :, None] >= places_S[None, None, :]
  document_BxS = cache.document_BxS
  if arch.document_separator is not None:
    last_B = jnp.take_along_axis(document_BxS, jnp.maximum(start_B - 1, 0)[:, None], axis=1)
    new_BxT = jnp.cumsum(tokens_BxT == arch.document_separator, axis=1, dtype=jnp.int32)
    new_BxT += jnp.where(start_B[:, None] > 0, last_B, 0)
    document_BxS = put(document_BxS, new_BxT, start_B, 0)
    seen_BxTxS &= new_BxT[:, :, None] == document_BxS[:, None, :]

  def body(x_BxTxD: jax.Array, layer: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    block, (keys, values) = _block(arch, layer[0]), layer[1:]
    q_BxTxHxC, k_BxTxKxC, v_BxTxKxC = block.attention_inputs(x_BxTxD, start_B)
    keys, values = put(keys, k_BxTxKxC, start_B, 0), put(values, v_BxTxKxC, start_B, 0)
    return block.rest(x_BxTxD, attention.attend_seen(q_BxTxHxC, keys, values, seen_BxTxS)), (keys, values)

  x_BxTxD, found = params["backbone"]["embedding"][tokens_BxT].astype(jnp.dtype(arch.compute_dtype)), []
  stacks = filter(None, (params["backbone"]["blocks"], params["key_layers"]))
  for stack in zip(stacks, cache.keys, cache.values, strict=True):
    x_BxTxD, after = jax.lax.scan(body, x_BxTxD, stack)
    found.append(after)
  keys, values = zip(*found, strict=True)
  return _rms_norm(x_BxTxD, params["backbone"]["final_norm"], arch.norm_epsilon), Cache(keys, values, document_BxS)


def logits(arch: Architecture, params: Params, hidden: jax.Array) -> jax.Array:
  """Logits of what follows final hidden states: `[..., D]` -> `[..., V]` in the compute dtype."""
  return hidden @ _head(arch, params)


def _head(arch: Architecture, params: Params) -> jax.Array:
  """The matrix `[D, V]` that makes logits of the last hidden states, in the compute dtype."""
  backbone = params["backbone"]
  return (backbone["embedding"].T if arch.tied_head else backbone["head"]).astype(jnp.dtype(arch.compute_dtype))


def _final_hidden(arch: Architecture, params: Params, tokens_BxT: jax.Array) -> jax.Array:
  """What the head sees: `[B, T, D]` after the final norm, in the compute dtype."""
  dtype = jnp.dtype(arch.compute_dtype)
  backbone = params["backbone"]
  document_BxT = None
  if arch.document_separator is not None:
    document_BxT = jnp.cumsum(tokens_BxT == arch.document_separator, axis=1, dtype=jnp.int32)
  embedding_VxD = partition.constrain(backbone["embedding"].astype(dtype), None, None)  # whole, on every device
  x_BxTxD = embedding_VxD[partition.constrain(tokens_BxT, FSDP, None)]
  x_BxTxD = partition.constrain(x_BxTxD, FSDP, None, None)
  if arch.num_key_layers < arch.num_layers:
    x_BxTxD = _apply_blocks(arch, backbone["blocks"], x_BxTxD, document_BxT)
  if arch.num_key_layers:
    x_BxTxD = _apply_blocks(arch, params["key_layers"], x_BxTxD, document_BxT)
  return _rms_norm(x_BxTxD, backbone["final_norm"], arch.norm_epsilon)


def loss_sum(arch: Architecture, params: Params, windows_BxW: jax.Array, rows_B: jax.Array) -> jax.Array:
  """Summed next-token cross-entropy in nats, float32 scalar.

  The logits of all positions are never held at once: `CHUNK_LOGITS` of them are made at a time.

  Args:
    arch: the architecture.
    params: `{"backbone", "key_layers"}`.
    windows_BxW: int windows of W = T + 1 tokens; the first T are the input, the last T the targets. A window
      may end in negative tokens, which are padding: they are not predicted.
    rows_B: bool, which windows count; the others add nothing to the loss or its gradient.
  """
  hidden_NxD = _final_hidden(arch, params, jnp.maximum(windows_BxW[:, :-1], 0)).reshape(-1, arch.d_model)
  hidden_NxD = partition.constrain(hidden_NxD, (FSDP, TENSOR), None)
  targets_N = jnp.where(rows_B[:, None], windows_BxW[:, 1:], -1).ravel()  # negative: does not count
  targets_N = partition.constrain(targets_N, (FSDP, TENSOR))
  head_DxV = partition.constrain(_head(arch, params), None, None)

  return _cross_entropy(hidden_NxD, head_DxV, targets_N)


@jax.custom_vjp
def _cross_entropy(hidden_NxD: jax.Array, head_DxV: jax.Array, targets_N: jax.Array) -> jax.Array:
  """Summed cross-entropy of the targets that are not negative, in nats, float32 scalar.

  Computed with its gradient, a chunk of tokens at a time, so that no logits are kept or made twice. The logits are
  float32, the products bfloat16 where the hidden states are.
  """

  def add(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    return total + _chunk_loss(chunk[0], head_DxV, chunk[1])[0], None

  return jax.lax.scan(add, jnp.float32(0), _chunks(hidden_NxD, targets_N, head_DxV.shape[1]))[0]


def _cross_entropy_forward(hidden_NxD: jax.Array, head_DxV: jax.Array, targets_N: jax.Array) -> tuple:
  """The loss, and its gradients by the hidden states and the head in their dtypes, the head's summed in float32."""

  def add(total: tuple, chunk: tuple[jax.Array, jax.Array]) -> tuple[tuple, jax.Array]:
    hidden_CxD, targets_C = chunk
    loss, slope_CxV = _chunk_loss(hidden_CxD, head_DxV, targets_C)
    slope_CxV = slope_CxV.astype(head_DxV.dtype)
    by_head_DxV = jnp.matmul(hidden_CxD.T, slope_CxV, preferred_element_type=jnp.float32)
    return (total[0] + loss, total[1] + by_head_DxV), slope_CxV @ head_DxV.T

  start = jnp.float32(0), jnp.zeros(head_DxV.shape, jnp.float32)
  (loss, by_head_DxV), by_hidden = jax.lax.scan(add, start, _chunks(hidden_NxD, targets_N, head_DxV.shape[1]))
  by_hidden_NxD = by_hidden.reshape(-1, hidden_NxD.shape[1])[: hidden_NxD.shape[0]]
  return loss, (by_hidden_NxD, by_head_DxV.astype(head_DxV.dtype))


def _cross_entropy_backward(gradients: tuple[jax.Array, jax.Array], by_loss: jax.Array) -> tuple:
  return *(by_loss.astype(g.dtype) * g for g in gradients), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _chunks(hidden_NxD: jax.Array, targets_N: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
  """Both with a leading axis of chunks of at most `CHUNK_LOGITS` logits, the last filled up with negative targets."""
  num_chunks = max(1, min(targets_N.size, -(-targets_N.size * vocab_size // CHUNK_LOGITS)))
  missing = -targets_N.size % num_chunks
  hidden = jnp.pad(hidden_NxD, ((0, missing), (0, 0))).reshape(num_chunks, -1, hidden_NxD.shape[1])
  return hidden, jnp.pad(targets_N, (0, missing), constant_values=-1).reshape(num_chunks, -1)


def _chunk_loss(hidden_CxD: jax.Array, head_DxV: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A chunk's loss and its slope by each logit `[C, V]`, float32."""
  logits_CxV = jnp.matmul(hidden_CxD, head_DxV, preferred_element_type=jnp.float32)
  counted_C = targets_C >= 0
  norm_C = jax.nn.logsumexp(logits_CxV, axis=-1)
  picked_C = jnp.take_along_axis(logits_CxV, jnp.maximum(targets_C, 0)[:, None], axis=-1)[:, 0]
  is_target_CxV = targets_C[:, None] == jnp.arange(head_DxV.shape[1])[None, :]
  slope_CxV = jnp.where(counted_C[:, None], jnp.exp(logits_CxV - norm_C[:, None]) - is_target_CxV, 0)
  return jnp.sum(norm_C - picked_C, where=counted_C), slope_CxV


def num_targets(windows_BxW: jax.Array, rows_B: jax.Array) -> jax.Array:
  """How many tokens `loss_sum` sums over: int32 scalar."""
  return jnp.sum(windows_BxW[:, 1:] >= 0, where=rows_B[:, None])


def token_scores(arch: Architecture, params: Params, windows_BxW: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What the model makes of each token after the first, T = W - 1 of them.

  Returns its log-probability in nats, float32 `[B, T]`, and whether it is the likeliest, bool `[B, T]`. Negative tokens
  are padding at the end of a window: 0 and True. As in `loss_sum`, the logits of all are never held at once.
  """
  hidden_NxD = _final_hidden(arch, params, jnp.maximum(windows_BxW[:, :-1], 0)).reshape(-1, arch.d_model)
  targets_BxT, head_DxV = windows_BxW[:, 1:], _head(arch, params)

  def score(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    hidden_CxD, targets_C = chunk
    logits_CxV = jnp.matmul(hidden_CxD, head_DxV, preferred_element_type=jnp.float32)
    picked_C = jnp.take_along_axis(logits_CxV, jnp.maximum(targets_C, 0)[:, None], axis=-1)[:, 0]
    likeliest_C = jnp.argmax(logits_CxV, axis=-1) == targets_C
    scores_C = picked_C - jax.nn.logsumexp(logits_CxV, axis=-1)
    return jnp.where(targets_C < 0, 0, scores_C), likeliest_C | (targets_C < 0)

  scores, likeliest = jax.lax.map(score, _chunks(hidden_NxD, targets_BxT.ravel(), arch.vocab_size))
  size, shape = targets_BxT.size, targets_BxT.shape
  return scores.ravel()[:size].reshape(shape), likeliest.ravel()[:size].reshape(shape)


def _spread(arch: Architecture) -> float:
  """The standard deviation of initial matrices."""
  return math.sqrt(2 / (5 * arch.d_model))


class _Block(nnx.Module):
  """One pre-norm transformer block."""

  def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
    self.arch = arch
    d_head = arch.d_model // arch.num_heads
    residual_scale = (2 * arch.num_layers) ** -0.5

    def linear(d_in: int, d_out: int, scale: float = 1.0) -> nnx.Linear:
      return nnx.Linear(d_in, d_out, use_bias=False, dtype=jnp.dtype(arch.compute_dtype), param_dtype=jnp.float32,
                        kernel_init=nnx.initializers.normal(_spread(arch) * scale), rngs=rngs)

    self.attention_norm = nnx.Param(jnp.ones(arch.d_model))
    self.query = linear(arch.d_model, arch.d_model)
    self.key = linear(arch.d_model, arch.num_kv_heads * d_head)
    self.value = linear(arch.d_model, arch.num_kv_heads * d_head)
    self.attention_out = linear(arch.d_model, arch.d_model, residual_scale)
    self.mlp_norm = nnx.Param(jnp.ones(arch.d_model))
    self.gate = linear(arch.d_model, arch.d_ff)
    self.up = linear(arch.d_model, arch.d_ff)
    self.down = linear(arch.d_ff, arch.d_model, residual_scale)

  def __call__(self, x_BxTxD: jax.Array, document_BxT: jax.Array | None) -> jax.Array:
    q_BxTxHxC, k_BxTxKxC, v_BxTxKxC = self.attention_inputs(x_BxTxD)
    return self.rest(x_BxTxD, attention.attend(self.arch.attention, q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, document_BxT))

  def attention_inputs(
    self, x_BxTxD: jax.Array, start_B: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, divided by the square root of C, keys and values, of tokens that stand at `start` (0) and after."""
    arch, (batch, length, width) = self.arch, x_BxTxD.shape
    d_head = width // arch.num_heads
    # Matrix products are of `[N, D]`: over a single axis of tokens, that of a weight's gradient copies nothing.
    h_NxD = _rms_norm(x_BxTxD, self.attention_norm[...], arch.norm_epsilon).reshape(-1, width)
    q_BxTxHxC = self.query(h_NxD).reshape(batch, length, arch.num_heads, d_head)
    k_BxTxKxC = self.key(h_NxD).reshape(batch, length, arch.num_kv_heads, d_head)
    v_BxTxKxC = self.value(h_NxD).reshape(batch, length, arch.num_kv_heads, d_head)
    rotated = functools.partial(_rotate, base=arch.rope_base, start_B=start_B)
    return rotated(q_BxTxHxC, scale=d_head**-0.5), rotated(k_BxTxKxC), v_BxTxKxC

  def rest(self, x_BxTxD: jax.Array, mixed_BxTxHxC: jax.Array) -> jax.Array:
    """What attention found goes into the residual stream, then the perceptron's part."""
    width = x_BxTxD.shape[-1]
    x_BxTxD = x_BxTxD + self.attention_out(mixed_BxTxHxC.reshape(-1, width)).reshape(x_BxTxD.shape)
    h_NxD = _rms_norm(x_BxTxD, self.mlp_norm[...], self.arch.norm_epsilon).reshape(-1, width)
    return x_BxTxD + self.down(jax.nn.silu(self.gate(h_NxD)) * self.up(h_NxD)).reshape(x_BxTxD.shape)


@functools.cache
def _block_graph(arch: Architecture) -> Any:
  """The static half of a block, which `nnx.merge` joins with one layer's parameters."""
  return nnx.split(nnx.eval_shape(lambda: _Block(arch, rngs=nnx.Rngs(0))), nnx.Param, ...)


def _block(arch: Architecture, layer: Params) -> _Block:
  """A block of one layer's parameters."""
  graph, abstract_state, rest = _block_graph(arch)
  state = jax.tree.map(lambda leaf: leaf, abstract_state)
  nnx.replace_by_pure_dict(state, layer)
  return nnx.merge(graph, state, rest)


def _apply_blocks(
  arch: Architecture, blocks: Any, x_BxTxD: jax.Array, document_BxT: jax.Array | None
) -> jax.Array:
  """Runs stacked blocks, leaves `[layers, ...]`, one after the other."""

  def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
    return _block(arch, layer)(x, document_BxT), None

  policies = {"blocks": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
  recomputed = jax.checkpoint(body, policy=policies[arch.remat]) if arch.remat in policies else body
  return jax.lax.scan(recomputed, x_BxTxD, blocks)[0]


def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """Root-mean-square norm over the last axis of `[B, T, D]`, in float32 whatever the compute dtype."""
  x32 = x.astype(jnp.float32)
  normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
  return (normed * scale[None, None, :]).astype(x.dtype)


def _rotate(x_BxTxHxC: jax.Array, base: float, scale: float = 1.0, start_B: jax.Array | None = None) -> jax.Array:
  """Rotary positions (Su et al., arXiv:2104.09864), first half of the head paired with the second, times `scale`.

  The first of the T stands at `start` of its window, 0 if None.
  """
  half = x_BxTxHxC.shape[-1] // 2
  frequencies_C = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  place_BxT = jnp.arange(x_BxTxHxC.shape[1], dtype=jnp.float32)[None, :]
  if start_B is not None:
    place_BxT = start_B[:, None] + place_BxT
  angles_BxTxC = place_BxT[:, :, None] * frequencies_C[None, None, :]
  cos, sin = (scale * f(angles_BxTxC)[:, :, None, :] for f in (jnp.cos, jnp.sin))
  a, b = jnp.split(x_BxTxHxC.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxHxC.dtype)
