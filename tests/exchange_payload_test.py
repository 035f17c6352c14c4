"""Laws of payloads: what arrives, what stays behind, and how many bytes it takes.

Shapes: N = 3 nodes; X, the last axis of a leaf, K blocks of it.
"""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from worldlm_jax import checks, partition, trees
from worldlm_jax.exchange import payload

N = 3
LOSSY = payload.KINDS[1:]
BLOCKED = {"int8": 127, "int4": 7}
SHAPES = {"matrices": (2, 3, 131), "whole blocks": (3, 128), "less than a block": (5, 7), "vector": (97,), "scalar": ()}

laws = hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def draw(seed, *leading):
  """Updates of very different sizes, a tenth of them zero, and some blocks too."""
  rng = np.random.default_rng(seed)

  def leaf(shape):
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-9, 9, shape[:-1] + (1,) * bool(shape))
    x = np.where(rng.random(shape) < 0.1, 0, x)
    return np.asarray(x * (rng.random(shape[:-1] + (1,) * bool(shape)) < 0.9), np.float32)

  return {name: leaf((*leading, *shape)) for name, shape in SHAPES.items()}


def zeros(*leading):
  return {name: np.zeros((*leading, *shape), np.float32) for name, shape in SHAPES.items()}


@functools.cache
def transmit(kind):
  return jax.jit(functools.partial(payload.transmit, kind=kind))


@functools.cache
def encode(kind):
  return jax.jit(functools.partial(payload.encode, kind=kind))


@jax.jit
def decode(packed):
  return payload.decode(packed, jax.eval_shape(zeros))


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_same_bits(actual, expected):
  assert_same(*(jax.tree.map(lambda leaf: np.asarray(leaf).view(np.uint32), tree) for tree in (actual, expected)))


def in_blocks(x):
  """`[..., X]` -> `[..., K, BLOCK]`, by a loop."""
  x = np.atleast_1d(x)
  blocks = [x[..., i : i + payload.BLOCK] for i in range(0, x.shape[-1], payload.BLOCK)]
  return np.stack([np.pad(b, [(0, 0)] * (x.ndim - 1) + [(0, payload.BLOCK - b.shape[-1])]) for b in blocks], axis=-2)


# What arrives.


def test_float32_is_the_identity():
  update = draw(0) | {"odd": np.float32([-0.0, np.nan, np.inf, 1e-45])}
  arrived, error = payload.transmit(update, None, "float32")
  assert_same_bits(arrived, update)
  assert error is None
  assert_same_bits(payload.transmit(update, update, "float32"), (update, update))
  assert_same_bits(payload.decode(payload.encode(update, "float32"), update), update)


@pytest.mark.parametrize("kind", LOSSY)
@laws
@hypothesis.given(seeds)
def test_transmit_is_bit_by_bit_what_is_decoded_from_what_is_sent(kind, seed):
  update, error = draw(seed), jax.tree.map(lambda leaf: leaf / 16, draw(seed + 1))
  arrived, new_error = transmit(kind)(update, error)
  wanted = trees.add(update, error)
  assert_same_bits(arrived, decode(encode(kind)(wanted)))
  assert_same_bits(new_error, trees.subtract(wanted, arrived))


@pytest.mark.parametrize("kind", BLOCKED)
@laws
@hypothesis.given(seeds)
def test_the_error_is_at_most_half_a_scale(kind, seed):
  x = draw(seed)
  scales = encode(kind)(x).scales
  for name, arrived in transmit(kind)(x, zeros())[0].items():
    scale_Kx1 = np.asarray(scales[name], np.float32)[..., None]
    largest = np.abs(in_blocks(x[name])).max(-1, keepdims=True)
    np.testing.assert_allclose(scale_Kx1, largest / BLOCKED[kind], rtol=2**-8)
    assert np.all(np.abs(in_blocks(arrived) - in_blocks(x[name])) <= scale_Kx1 * (0.5 + 1e-5))


@laws
@hypothesis.given(seeds)
def test_bfloat16_is_rounded_to_the_nearest(seed):
  x = draw(seed)
  expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), x)
  assert_same(transmit("bfloat16")(x, zeros())[0], expected)


@pytest.mark.parametrize("kind", BLOCKED)
def test_ties_go_to_the_even_neighbour(kind):
  levels = BLOCKED[kind]
  x = np.float32([levels, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.75])
  arrived, error = payload.transmit(x, 0 * x, kind)
  np.testing.assert_array_equal(arrived, [levels, 0, 2, 2, 0, -2, -2, 1])
  np.testing.assert_array_equal(error, [0, 0.5, -0.5, 0.5, -0.5, 0.5, -0.5, -0.25])


@pytest.mark.parametrize("kind", BLOCKED)
def test_the_largest_values_are_not_clipped_whatever_the_rounding_of_the_scale(kind):
  largest = np.float32(1 + np.arange(4096) / 4096)  # many between every two scales
  q = np.asarray(payload.encode(np.stack([largest, -largest], axis=1), kind).values)
  expected = {"int8": [127, -127], "int4": [0x97]}[kind]  # 7 and, in the upper half, 16 - 7
  np.testing.assert_array_equal(q, np.broadcast_to(np.array(expected, q.dtype), q.shape))


@pytest.mark.parametrize("kind", LOSSY)
@laws
@hypothesis.given(seeds, st.integers(-40, 40))
def test_powers_of_two_and_signs_pass_through(kind, seed, power):
  x = draw(seed)
  factor = np.float32(-(2.0**power))
  times = lambda tree: jax.tree.map(lambda leaf: factor * leaf, tree)
  assert_same(transmit(kind)(times(x), zeros()), times(transmit(kind)(x, zeros())))


@pytest.mark.parametrize("kind", LOSSY)
@laws
@hypothesis.given(seeds)
def test_what_has_arrived_can_be_handed_on_without_loss(kind, seed):
  arrived, _ = transmit(kind)(draw(seed), zeros())
  assert_same(transmit(kind)(arrived, zeros()), (arrived, zeros()))


@pytest.mark.parametrize("kind", LOSSY)
def test_zeros_arrive_as_zeros_and_take_no_scale(kind):
  x = draw(5)
  x["matrices"][1, 0, :64] = 0
  x["whole blocks"][:] = 0
  arrived, _ = transmit(kind)(x, zeros())
  jax.tree.map(lambda a, x: np.testing.assert_array_equal(a[x == 0], 0), jax.tree.map(np.asarray, arrived), x)
  assert_same(transmit(kind)(zeros(), zeros()), (zeros(), zeros()))
  if kind in BLOCKED:
    assert not np.any(encode(kind)(x).scales["whole blocks"])


@pytest.mark.parametrize("kind", BLOCKED)
def test_values_too_small_for_a_scale_wait_in_the_error(kind):
  levels = BLOCKED[kind]
  least = np.float32(levels * 2.0**-126)  # of the smallest normal scale
  x = np.stack([np.full(64, least), np.full(64, np.nextafter(least, np.float32(0)) / 2)])
  arrived, error = jax.jit(functools.partial(payload.transmit, kind=kind))(x, 0 * x)
  np.testing.assert_array_equal(arrived, [x[0], 0 * x[1]])
  np.testing.assert_array_equal(error, [0 * x[0], x[1]])


@pytest.mark.parametrize("kind", LOSSY)
def test_large_values_stay_finite(kind):
  x = np.float32([np.nextafter(np.float32(2.0**127), np.float32(0)), -1.7e38, 1.0])
  assert np.all(np.isfinite(transmit(kind)(x, 0 * x)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", BLOCKED)
def test_a_block_with_a_value_that_is_not_finite_arrives_as_nan(kind, value):
  x, clean = draw(7), transmit(kind)(draw(7), zeros())
  x["matrices"][1, 2, 70] = value  # in the second of three blocks
  x["scalar"] = np.float32(value)
  arrived, error = map(jax.device_get, transmit(kind)(x, zeros()))
  expected, expected_error = map(jax.device_get, clean)
  spoiled = {"matrices": np.s_[1, 2, 64:128], "scalar": ()}
  for name, where in spoiled.items():
    for tree, instead in ((expected, np.nan), (expected_error, 0)):
      tree[name] = np.array(tree[name])
      tree[name][where] = instead
  assert_same((arrived, error), (expected, expected_error))
  packed = encode(kind)(x)
  assert_same(decode(packed), expected)
  assert not packed.values["matrices"][1, 2, slice(32, 64) if kind == "int4" else slice(64, 128)].any()


def test_in_bfloat16_what_is_not_finite_arrives_as_it_is():
  x = np.float32([1, np.nan, np.inf, -np.inf, 2])
  arrived, error = transmit("bfloat16")(x, np.zeros(5, np.float32))
  np.testing.assert_array_equal(arrived, x)
  np.testing.assert_array_equal(error, np.zeros(5))


# What stays behind.


@pytest.mark.parametrize("kind", payload.KINDS)
@hypothesis.settings(laws, max_examples=5)
@hypothesis.given(seeds, st.integers(1, 23))
def test_what_has_arrived_and_the_error_add_up_to_the_updates(kind, seed, rounds):
  error, balance = zeros(), zeros()
  for t in range(rounds):
    update = draw(seed + t)
    arrived, error = transmit(kind)(update, error)
    balance = jax.tree.map(lambda b, u, a: b + np.float64(u) - np.float64(a), balance, update, arrived)
  # The sum of update and error rounds, to 24 bits of at most some 2^11; nothing else does.
  jax.tree.map(lambda b, e: np.testing.assert_allclose(b, e, atol=rounds * 2**-13, rtol=0), balance, error)


@pytest.mark.parametrize("kind", BLOCKED)
def test_the_mean_error_falls_like_one_over_the_rounds(kind):
  update, error, total = draw(11), zeros(), zeros()
  for t in range(1, 65):
    arrived, error = transmit(kind)(update, error)
    total = trees.add(total, arrived)
    if t in (1, 8, 64):
      for name, leaf in update.items():
        largest = np.abs(in_blocks(leaf)).max(-1, keepdims=True)
        bound = largest / BLOCKED[kind] / 2 * (1 + 1 / BLOCKED[kind])  # an error on top of an update
        off = np.abs(in_blocks(np.asarray(total[name]) / t - leaf))
        assert np.all(off <= bound * 1.01 / t + 1e-5 * largest), (name, t)


@pytest.mark.parametrize("kind", payload.KINDS)
def test_nodes_side_by_side_transmit_as_each_alone(kind):
  update, error = draw(13, N), jax.tree.map(lambda leaf: leaf / 8, draw(14, N))
  together = jax.jit(jax.vmap(functools.partial(payload.transmit, kind=kind)))(update, error)
  packed = jax.jit(jax.vmap(functools.partial(payload.encode, kind=kind)))(update)
  unpacked = jax.jit(jax.vmap(decode))(packed)
  for n in range(N):
    assert_same_bits(trees.take(together, n), transmit(kind)(trees.take(update, n), trees.take(error, n)))
    alone = encode(kind)(trees.take(update, n))
    assert_same(trees.take(packed, n), alone)
    assert_same_bits(trees.take(unpacked, n), decode(alone))


# What is sent.


@pytest.mark.parametrize("kind", payload.KINDS)
def test_bytes_are_those_of_the_arrays_that_are_sent(kind):
  tree = draw(17)
  arrays = jax.tree.leaves(encode(kind)(tree))
  assert sum(array.nbytes for array in arrays) == payload.num_bytes(tree, kind)
  assert payload.num_bytes(jax.eval_shape(lambda: tree), kind) == payload.num_bytes(tree, kind)


@laws
@hypothesis.given(st.lists(st.lists(st.integers(0, 5), max_size=2), max_size=3), st.integers(0, 200))
def test_bytes_of_any_shapes(rows, width):
  tree = [jax.ShapeDtypeStruct((*shape, width), jnp.float32) for shape in rows]
  for kind in payload.KINDS:
    packed = jax.eval_shape(functools.partial(payload.encode, kind=kind), tree)
    assert trees.num_bytes(packed) == payload.num_bytes(tree, kind)
    arrived = jax.eval_shape(functools.partial(payload.decode, like=tree), packed)
    assert [(leaf.shape, leaf.dtype) for leaf in arrived] == [(leaf.shape, leaf.dtype) for leaf in tree]


def test_bytes_by_hand():
  tree = {"rows": np.zeros((3, 65), np.float32), "scalar": np.float32(0)}
  expected = {"float32": 196 * 4, "bfloat16": 196 * 2, "int8": 3 * (65 + 2 * 2) + 3, "int4": 3 * (33 + 2 * 2) + 3}
  assert {kind: payload.num_bytes(tree, kind) for kind in payload.KINDS} == expected


@pytest.mark.parametrize("width", [1, 2, 64, 131])
def test_integers_up_to_the_levels_are_sent_as_they_are(width):
  for kind, levels in BLOCKED.items():
    q = np.random.default_rng(width).integers(-levels, levels + 1, (5, width))
    q[:, ::payload.BLOCK] = levels  # of a scale of 1
    packed = payload.encode(q.astype(np.float32), kind)
    np.testing.assert_array_equal(packed.scales, np.ones((5, math.ceil(width / payload.BLOCK))))
    if kind == "int8":
      np.testing.assert_array_equal(packed.values, q)
    else:
      padded = np.pad(q, [(0, 0), (0, width % 2)]) % 16
      np.testing.assert_array_equal(packed.values, padded[:, ::2] + 16 * padded[:, 1::2])
    np.testing.assert_array_equal(payload.decode(packed, q), q)


@pytest.mark.parametrize("function", [lambda kind: payload.num_bytes({}, kind), lambda kind: payload.encode({}, kind),
                                      lambda kind: payload.transmit({}, {}, kind)])
def test_an_unknown_kind_is_named(function):
  with pytest.raises(checks.InputError, match=r"kind='int16'.*'int8'"):
    function("int16")


# Where it happens.


@pytest.mark.parametrize("kind", LOSSY)
def test_what_is_spread_over_devices_is_rounded_where_it_lies(kind):
  mesh = partition.make_mesh(jax.devices()[:8], fsdp=2, tensor=2)
  shapes = {"query": (2, 3, 6, 256), "attention_out": (2, 3, 4, 128), "embedding": (2, 11, 256), "head": (2, 8, 97),
            "final_norm": (2, 97)}
  rng = np.random.default_rng(19)
  update, error = ({name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in "ab")
  shardings = partition.shardings(update, mesh)
  assert shardings["embedding"].spec[2] == (partition.FSDP, partition.TENSOR)
  nodes = jax.vmap(functools.partial(payload.transmit, kind=kind))
  spread = [jax.device_put(tree, shardings) for tree in (update, error)]
  with jax.set_mesh(mesh):
    compiled = jax.jit(nodes).lower(*spread).compile()
  instructions = compiled.as_text()
  assert not any(name in instructions for name in ("all-", "collective-", "reduce-scatter"))
  assert all(jax.tree.leaves(jax.tree.map(lambda leaf, wanted: leaf.is_equivalent_to(wanted, 4),
                                          compiled.output_shardings[0], shardings)))
  assert_same_bits(compiled(*spread), jax.jit(nodes)(update, error))


@pytest.mark.parametrize("kind", LOSSY)
def test_blocks_that_lie_across_devices_are_rounded_all_the_same(kind):
  mesh = partition.make_mesh(jax.devices()[:4], fsdp=4)
  update = np.random.default_rng(23).normal(size=(1, 3, 96)).astype(np.float32)  # a quarter is no whole block
  spread = jax.device_put(update, NamedSharding(mesh, PartitionSpec(None, None, partition.FSDP)))
  assert_same_bits(transmit(kind)(spread, 0 * spread), transmit(kind)(update, 0 * update))
