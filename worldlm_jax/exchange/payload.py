"""Payloads: what crosses an edge of the tree, in 32, 16, 8 or 4 bits per value, with error feedback.

  arrived  = decode(encode(update + error))
  error   <- update + error - arrived

What rounding takes away is sent along next time (Seide et al., 2014, 1-bit SGD; Karimireddy et al., arXiv:1901.09847),
so that over T rounds the mean of what arrives differs from the mean of the updates by error / T.

`int8` and `int4` cut the last axis of each leaf into blocks of `BLOCK` values, the last of them as short as what is
left, and send for each block

  scale = bfloat16(max |x| / levels),   q = round(x / scale) in -levels .. levels,   levels: 127 or 7

with ties to even; two values of four bits share a byte, and an odd last axis wastes half a byte per row. As blocks lie
within the last axis, a leaf that is spread over others, or in whole blocks over the last, is rounded where it lies.

Why bfloat16: it takes half the bytes of float32, changes a step by 1 / 256 at most, and makes q times scale, which has
15 bits, exact in float32. Whoever decodes a payload, on whatever machine, has bit by bit what its sender took for
arrived. A scale that was rounded down lets |x| / scale exceed the levels by 1 / 256 of them at most, which still rounds
to the levels, so nothing is ever clipped.

Guarantees, for leaves in float32:
  |arrived - x| <= scale / 2, to the rounding of x / scale (bfloat16: |x| / 256). Zeros arrive as zeros.
  A block whose scale would be subnormal (|x| below 1.5e-36; in int4, 8.2e-38) arrives as zero and stays in the error.
  A block with a value that is not finite arrives as NaN, all of it (in bfloat16 that value alone, as it is), and leaves
  no error behind. Finite values must be below 2^127, about 1.7e38.

Shapes: trees are those of one node; map over nodes with `jax.vmap`. A block is along X, the last axis of a leaf; K
blocks of C values.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from worldlm_jax import checks, trees

KINDS = ("float32", "bfloat16", "int8", "int4")
BLOCK = 64  # values per scale

_LEVELS = {"int8": 127, "int4": 7}
_SMALLEST_SCALE = 2.0**-126  # the smallest normal number; devices differ in what they do with smaller ones


class Payload(NamedTuple):
  """What is sent: its leaves are the very bytes."""

  values: trees.PyTree  # leaves [..., X] in float32, bfloat16 or int8; uint8 [..., ceil(X / 2)] for int4
  scales: trees.PyTree  # leaves bfloat16 [..., ceil(X / BLOCK)]; None where values have none


def num_bytes(tree: trees.PyTree, kind: str) -> int:
  """The bytes of one node's payload: what the arrays of `encode(tree, kind)` take, known from shapes alone.

  Args:
    tree: the update of one node, without a node axis; leaves may be abstract.
    kind: one of `KINDS`.

  Raises:
    checks.InputError: there is no such kind.
  """
  checks.one_of("kind", kind, KINDS)
  total = 0
  for leaf in jax.tree.leaves(tree):
    *rows, width = leaf.shape or (1,)
    scales = 2 * -(-width // BLOCK)
    per_row = {"float32": 4 * width, "bfloat16": 2 * width, "int8": width + scales, "int4": -(-width // 2) + scales}
    total += math.prod(rows) * per_row[kind]
  return total


def encode(tree: trees.PyTree, kind: str) -> Payload:
  """What is sent for `tree`.

  Args:
    tree: float32 leaves `[..., X]`, or scalars, which are sent as X = 1.
    kind: one of `KINDS`.

  Raises:
    checks.InputError: there is no such kind.
  """
  checks.one_of("kind", kind, KINDS)
  if kind == "float32":
    return Payload(tree, None)
  if kind == "bfloat16":
    return Payload(jax.tree.map(lambda leaf: _to_bfloat16(leaf).astype(jnp.bfloat16), tree), None)
  leaves, structure = jax.tree.flatten(tree)
  values, scales = [], []
  for leaf in leaves:
    x = jnp.atleast_1d(leaf)
    q_KxC, scale_Kx1 = _quantise(x, _LEVELS[kind])
    q = _joined(q_KxC, x.shape[-1])
    values.append(_packed(q) if kind == "int4" else q)
    scales.append(scale_Kx1[..., 0].astype(jnp.bfloat16))
  return Payload(jax.tree.unflatten(structure, values), jax.tree.unflatten(structure, scales))


def decode(payload: Payload, like: trees.PyTree) -> trees.PyTree:
  """What arrives: float32 leaves of the shapes of `like`, which may be abstract. The kind shows in the dtypes."""
  if payload.scales is None:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), payload.values)

  def decode_leaf(like: Any, values: jax.Array, scales: jax.Array) -> jax.Array:
    width = like.shape[-1] if like.shape else 1
    q = _unpacked(values, width) if values.dtype == jnp.uint8 else values
    return _joined(_dequantise(_blocks(q), scales[..., None].astype(jnp.float32)), width).reshape(like.shape)

  return jax.tree.map(decode_leaf, like, payload.values, payload.scales)


def transmit(update: trees.PyTree, error: trees.PyTree, kind: str) -> tuple[trees.PyTree, trees.PyTree]:
  """What arrives of `update + error`, and what does not: bit by bit `decode(encode(update + error))`, without packing.

  `float32` sends the update as it is and does not look at the error, which stays as it is and may as well be None.

  Args:
    update: float32 leaves `[..., X]`, of one node.
    error: what has not arrived yet, of the same shapes; zeros to begin with.
    kind: one of `KINDS`.

  Returns:
    What arrives, and the error to add next time.

  Raises:
    checks.InputError: there is no such kind.
  """
  checks.one_of("kind", kind, KINDS)
  if kind == "float32":
    return update, error
  wanted = trees.add(update, error)
  arrived = jax.tree.map(_to_bfloat16 if kind == "bfloat16" else functools.partial(_rounded, kind=kind), wanted)
  # Lest one bad round spoil all that follow, what is not finite is not sent again.
  return arrived, jax.tree.map(lambda w, a: jnp.where(jnp.isfinite(a), w - a, 0.0), wanted, arrived)


def _rounded(leaf: jax.Array, kind: str) -> jax.Array:
  x = jnp.atleast_1d(leaf)
  return _joined(_dequantise(*_quantise(x, _LEVELS[kind])), x.shape[-1]).reshape(leaf.shape)


def _to_bfloat16(x: jax.Array) -> jax.Array:
  """Rounded, but still float32. The compiler may skip a conversion there and back; this it may not."""
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _quantise(x: jax.Array, levels: int) -> tuple[jax.Array, jax.Array]:
  """`[..., X]` -> q, int8 `[..., K, C]`, and scales, float32 `[..., K, 1]`."""
  x_KxC = _blocks(x)
  scale_Kx1 = _to_bfloat16(jnp.max(jnp.abs(x_KxC), axis=-1, keepdims=True) / levels)
  scale_Kx1 = jnp.where(scale_Kx1 < _SMALLEST_SCALE, 0.0, scale_Kx1)
  counts = (scale_Kx1 > 0) & jnp.isfinite(scale_Kx1)  # elsewhere q is 0, and 0 times inf or NaN is NaN
  ratio_KxC = jnp.where(counts, x_KxC, 0.0) / jnp.where(counts, scale_Kx1, 1.0)
  return jnp.round(ratio_KxC).astype(jnp.int8), scale_Kx1


def _dequantise(q_KxC: jax.Array, scale_Kx1: jax.Array) -> jax.Array:
  return q_KxC.astype(jnp.float32) * scale_Kx1


def _blocks(x: jax.Array) -> jax.Array:
  """`[..., X]` -> `[..., K, C]`, filled up with zeros; K is 1 where X is no more than a block."""
  width = x.shape[-1]
  size = min(BLOCK, max(1, width))
  if width % size:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % size)])
  return x.reshape(*x.shape[:-1], -(-width // size), size)


def _joined(x_KxC: jax.Array, width: int) -> jax.Array:
  """The inverse of `_blocks`: `[..., width]`."""
  *rows, blocks, size = x_KxC.shape
  return x_KxC.reshape(*rows, blocks * size)[..., :width]


def _packed(q: jax.Array) -> jax.Array:
  """Four-bit integers, int8 `[..., X]` -> uint8 `[..., ceil(X / 2)]`, the first of a pair in the lower half."""
  q = jnp.pad(q, [(0, 0)] * (q.ndim - 1) + [(0, q.shape[-1] % 2)])
  nibbles = q.astype(jnp.uint8) & 0xF  # two's complement
  return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def _unpacked(packed: jax.Array, width: int) -> jax.Array:
  """The inverse of `_packed`: int8 `[..., width]`."""
  nibbles = _joined(jnp.stack([packed & 0xF, packed >> 4], axis=-1), width)
  return (nibbles ^ 8).astype(jnp.int8) - 8
