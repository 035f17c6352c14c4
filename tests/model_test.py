"""The model: its equations in float64 NumPy, causality, the split into backbone and key layers, sizes.

Shapes: B = 2 windows, T = 7 positions, D = 24 width, H = 6 heads of C = 4, K key-value heads, V = 11.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldlm_jax import model, trees
from worldlm_jax.config import ModelConfig
from worldlm_jax.model import transformer

B, T, V, D, H, F, L = 2, 7, 11, 24, 6, 17, 3
BASE, EPSILON = 53.0, 1e-3
ONE_STACK = {"key_layer_share": 0.0}  # half as much to compile

init = functools.partial(jax.jit, static_argnums=0)(model.init)
apply = functools.partial(jax.jit, static_argnums=0)(model.apply)
loss_and_gradient = functools.partial(jax.jit, static_argnums=0)(jax.value_and_grad(model.loss_sum, argnums=1))


@functools.cache
def small(**changes):
  """Three blocks, one of them a key layer, two query heads to a key-value head, an untied head."""
  config = ModelConfig(num_layers=L, d_model=D, num_heads=H, num_kv_heads=3, d_ff=F, rope_base=BASE,
                       norm_epsilon=EPSILON, tied_head=False, key_layer_share=0.3)
  return model.architecture(dataclasses.replace(config, **changes), V)


@functools.cache
def start(arch):
  """Parameters far enough from those of `init` that every one of them matters."""
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    noise = 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
    return 1 + noise if "norm" in jax.tree_util.keystr(path) else noise

  return jax.tree_util.tree_map_with_path(draw, model.abstract_params(arch))


def tokens_of(seed, *shape):
  return np.random.default_rng([seed, *shape]).integers(0, V, shape).astype(np.int32)


def join(params):
  """All blocks, `[L, ...]`."""
  stacks = [stack for stack in (params["backbone"]["blocks"], params["key_layers"]) if stack]
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *stacks)


def split(params, num_key_layers):
  """The same blocks with another share of key layers."""
  blocks, cut = join(params), L - num_key_layers
  key_layers = jax.tree.map(lambda leaf: leaf[cut:], blocks) if num_key_layers else {}
  backbone = params["backbone"] | {"blocks": jax.tree.map(lambda leaf: leaf[:cut], blocks) if cut else {}}
  return {"backbone": backbone, "key_layers": key_layers}


def logits_in_numpy(arch, params, tokens_BxT):
  """The whole model, position by position and head by head, in float64."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  width, group = arch.d_model // arch.num_heads, arch.num_heads // arch.num_kv_heads

  def norm(x, scale):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + arch.norm_epsilon) * scale

  def rotate(x_C, t):  # pairs (x_j, x_{j + C/2}) as complex numbers
    z = x_C[: width // 2] + 1j * x_C[width // 2 :]
    z = z * np.exp(1j * t * arch.rope_base ** (-np.arange(width // 2) / (width // 2)))
    return np.concatenate([z.real, z.imag])

  def attention(h_TxD, block):
    out_TxD = np.zeros_like(h_TxD)
    for head in range(arch.num_heads):
      q, kv = slice(head * width, (head + 1) * width), slice(head // group * width, (head // group + 1) * width)
      query = np.array([rotate(row, t) for t, row in enumerate(h_TxD @ block["query"]["kernel"][:, q])])
      key = np.array([rotate(row, t) for t, row in enumerate(h_TxD @ block["key"]["kernel"][:, kv])])
      value = h_TxD @ block["value"]["kernel"][:, kv]
      for t in range(len(h_TxD)):
        raised = np.exp(query[t] @ key[: t + 1].T / math.sqrt(width))
        out_TxD[t, q] = raised / raised.sum() @ value[: t + 1]
    return out_TxD @ block["attention_out"]["kernel"]

  blocks, backbone, logits = join(params), params["backbone"], []
  for tokens in tokens_BxT:
    x = backbone["embedding"][tokens]
    for i in range(arch.num_layers):
      block = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
      x = x + attention(norm(x, block["attention_norm"]), block)
      h = norm(x, block["mlp_norm"])
      gate = h @ block["gate"]["kernel"]
      x = x + (gate / (1 + np.exp(-gate)) * (h @ block["up"]["kernel"])) @ block["down"]["kernel"]
    x = norm(x, backbone["final_norm"])
    logits.append(x @ (backbone["embedding"].T if arch.tied_head else backbone["head"]))
  return np.array(logits)


def nats_in_numpy(logits_BxTxV, targets_BxT):
  """Cross-entropy of every token in float64, `[B, T]`."""
  picked = np.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
  return np.log(np.exp(logits_BxTxV).sum(axis=-1)) - picked


@pytest.mark.parametrize("changes", [
  {}, {"num_kv_heads": 6, "tied_head": True}, {"num_kv_heads": 1, "key_layer_share": 0},
])
def test_logits_are_those_of_the_equations(changes):
  arch = small(**changes)
  params, tokens = start(arch), tokens_of(2, B, T)
  logits = apply(arch, params, tokens)
  assert logits.shape == (B, T, V) and logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, logits_in_numpy(arch, params, tokens), atol=2e-4, rtol=1e-4)


def test_later_tokens_do_not_touch_earlier_logits():
  """Law 8, bit by bit."""
  arch = small()
  params, tokens = start(arch), tokens_of(2, B, T)
  before = np.asarray(apply(arch, params, tokens))
  for t in range(1, T):
    changed = tokens.copy()
    changed[:, t:] = (changed[:, t:] + 1 + t) % V
    after = np.asarray(apply(arch, params, changed))
    np.testing.assert_array_equal(after[:, :t], before[:, :t])
    assert np.all(np.any(after[:, t:] != before[:, t:], axis=-1))


def test_the_gradient_of_a_loss_with_respect_to_later_tokens_is_exactly_zero():
  """Law 8: with every token at one position only, an embedding's row is an input's gradient."""
  arch = small()
  params = start(arch)
  tokens, targets = np.arange(T, dtype=np.int32)[None], tokens_of(3, T)

  def losses_T(embedding):
    changed = params | {"backbone": params["backbone"] | {"embedding": embedding}}
    logits = model.apply(arch, changed, tokens)[0]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]

  jacobian_TxVxD = np.asarray(jax.jit(jax.jacrev(losses_T))(params["backbone"]["embedding"]))
  for t in range(T):
    np.testing.assert_array_equal(jacobian_TxVxD[t, t + 1 :], np.zeros((V - t - 1, D)))
    assert np.all(np.any(jacobian_TxVxD[t, : t + 1] != 0, axis=1)), "earlier tokens do matter"


def test_any_share_of_key_layers_is_the_same_function():
  params, tokens = start(small()), tokens_of(2, B, T)
  expected = apply(small(), params, tokens)
  for m, share in ((0, 0.0), (2, 0.6), (3, 1.0)):
    arch = small(key_layer_share=share)
    assert arch.num_key_layers == m
    np.testing.assert_allclose(apply(arch, split(params, m), tokens), expected, atol=1e-5)


def test_init_draws_the_same_blocks_for_any_share(rounds):
  whole = init(small(), jax.random.key(3))
  other = init(small(key_layer_share=0.6), jax.random.key(3))
  rounds.assert_trees_close(other, split(whole, 2), atol=0)


def test_grouped_queries_are_key_value_heads_repeated():
  grouped, full = small(), small(num_kv_heads=H)
  params, tokens = start(grouped), tokens_of(2, B, T)
  repeated = jax.tree.map(lambda leaf: leaf, params)
  for blocks in (repeated["backbone"]["blocks"], repeated["key_layers"]):
    for name in ("key", "value"):
      kernel = blocks[name]["kernel"]
      heads = kernel.reshape(*kernel.shape[:2], 3, D // H)
      blocks[name] = {"kernel": np.repeat(heads, H // 3, axis=2).reshape(*kernel.shape[:2], D)}
  np.testing.assert_allclose(apply(full, repeated, tokens), apply(grouped, params, tokens), atol=2e-5)


def test_rotary_products_depend_on_the_distance_alone():
  rng = np.random.default_rng(5)
  query, key = (np.broadcast_to(rng.normal(size=(H, 4)), (1, T, H, 4)).astype(np.float32) for _ in range(2))
  rotated_q, rotated_k = transformer._rotate(query, BASE), transformer._rotate(key, BASE)
  product = np.einsum("thc,shc->hts", rotated_q[0], rotated_k[0])
  for t in range(1, T):
    np.testing.assert_allclose(product[:, t, 1:], product[:, t - 1, :-1], atol=1e-5)
  assert np.all(np.abs(product[:, 0, 1:] - product[:, 0, :1]) > 1e-3), "positions do matter"
  np.testing.assert_array_equal(rotated_q[0, 0], query[0, 0])
  np.testing.assert_allclose(np.linalg.norm(rotated_q, axis=-1), np.linalg.norm(query, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("remat", ["blocks", "dots"])
def test_recomputing_blocks_changes_neither_loss_nor_gradient(rounds, remat):
  plain, again = small(**ONE_STACK), small(**ONE_STACK, remat=remat)
  params, windows, rows = start(plain), tokens_of(2, B, T + 1), np.ones(B, bool)
  loss, gradient = loss_and_gradient(plain, params, windows, rows)
  same, recomputed = loss_and_gradient(again, params, windows, rows)
  np.testing.assert_allclose(same, loss, rtol=1e-6)
  rounds.assert_trees_close(recomputed, gradient, atol=1e-4)


def test_what_is_recomputed():
  """"blocks" makes all products of a block a second time but its last, "dots" the two of attention alone."""
  windows = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
  rows = jax.ShapeDtypeStruct((B,), bool)

  def products(remat):
    arch = small(**ONE_STACK, remat=remat)
    gradient = jax.grad(functools.partial(model.loss_sum, arch))
    return len(dot_dtypes(jax.make_jaxpr(gradient)(model.abstract_params(arch), windows, rows).jaxpr))

  assert products("blocks") == products("none") + 7 + 2 - 1
  assert products("dots") == products("none") + 2


def dot_dtypes(jaxpr):
  """Of each matrix product in a program: the dtypes of its two operands and its result."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      found.append(tuple(str(v.aval.dtype) for v in (*equation.invars, *equation.outvars)))
    for value in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(value, "jaxpr", value)
      found += dot_dtypes(inner) if hasattr(inner, "eqns") else []
  return found


def test_bfloat16_computes_in_half_and_keeps_float32_parameters():
  arch = small(**ONE_STACK, compute_dtype="bfloat16")
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model.abstract_params(arch)))
  params = jax.tree.map(lambda leaf: 0.3 * leaf, start(arch))
  windows, rows = tokens_of(2, B, T + 1), np.ones(B, bool)
  assert jax.eval_shape(lambda p: model.apply(arch, p, windows), params).dtype == jnp.bfloat16
  loss, gradient = loss_and_gradient(arch, params, windows, rows)
  exact, _ = loss_and_gradient(small(**ONE_STACK), params, windows, rows)
  assert loss.dtype == jnp.float32 and loss != exact
  np.testing.assert_allclose(loss, exact, rtol=1e-2)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


def test_bfloat16_multiplies_no_matrices_in_float32():
  """Forward and back; scores and logits come out in float32, and the head's gradient is summed in it."""
  arch = small(**ONE_STACK, compute_dtype="bfloat16")
  shapes = jax.ShapeDtypeStruct((B, T + 1), jnp.int32), jax.ShapeDtypeStruct((B,), bool)
  gradient = jax.make_jaxpr(jax.grad(functools.partial(model.loss_sum, arch)))(model.abstract_params(arch), *shapes)
  dots = dot_dtypes(gradient.jaxpr)
  assert len(dots) == 3 * (7 + 2) + 3
  assert {dot[:2] for dot in dots} == {("bfloat16", "bfloat16")}
  assert sum(dot[2] == "float32" for dot in dots) == 3


def test_loss_sum_is_the_cross_entropy_of_the_next_token():
  arch, windows = small(**ONE_STACK), tokens_of(2, B, T + 1)
  params = start(arch)
  expected = nats_in_numpy(logits_in_numpy(arch, params, windows[:, :-1]), windows[:, 1:]).sum(axis=1)
  for rows in ([True, True], [True, False], [False, True], [False, False]):
    loss, _ = loss_and_gradient(arch, params, windows, np.array(rows))
    np.testing.assert_allclose(loss, expected[rows].sum(), rtol=1e-5)


@pytest.mark.parametrize("chunk_logits", [1, 37, 90])
def test_the_loss_in_chunks_is_the_loss(rounds, monkeypatch, chunk_logits):
  """In chunks of one token, of a few, and of a size that does not divide the tokens; some of them do not count."""
  arch, windows, rows = small(**ONE_STACK), tokens_of(4, 5, 9), np.array([True, True, False, True, True])
  params = start(arch)
  windows[1, 6:] = -1
  whole = loss_and_gradient(arch, params, windows, rows)
  monkeypatch.setattr(transformer, "CHUNK_LOGITS", chunk_logits)
  loss, gradient = jax.value_and_grad(model.loss_sum, argnums=1)(arch, params, windows, rows)
  np.testing.assert_allclose(loss, whole[0], rtol=1e-6)
  rounds.assert_trees_close(gradient, whole[1], 2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_never_holds_all_logits(monkeypatch, dtype):
  """At the width, vocabulary and kind of the preset `75m`; as a guard, all of them are held in a single chunk."""
  config = dataclasses.replace(model.PRESETS["75m"](), num_layers=1, key_layer_share=0.0, compute_dtype=dtype)
  arch = model.architecture(config, 257)
  windows, rows = jax.ShapeDtypeStruct((64, 65), jnp.int32), jax.ShapeDtypeStruct((64,), bool)

  def compiled():
    gradient = jax.jit(lambda *args: jax.grad(model.loss_sum, argnums=1)(arch, *args))
    return gradient.lower(model.abstract_params(arch), windows, rows).compile()

  all_logits = 64 * 64 * arch.vocab_size * 4  # 788 MiB in float32
  chunked = compiled()
  assert f"{64 * 64},{arch.vocab_size}]" not in chunked.as_text()
  assert chunked.memory_analysis().temp_size_in_bytes < all_logits
  monkeypatch.setattr(transformer, "CHUNK_LOGITS", 2**60)
  assert compiled().memory_analysis().temp_size_in_bytes > all_logits


def test_windows_that_do_not_count_add_nothing(rounds):
  arch, windows, rows = small(**ONE_STACK), tokens_of(2, B, T + 1), np.array([True, False])
  loss, gradient = loss_and_gradient(arch, start(arch), windows, rows)
  other = np.concatenate([windows[:1], tokens_of(6, 1, T + 1)])
  again, same = loss_and_gradient(arch, start(arch), other, rows)
  assert again == loss
  rounds.assert_trees_close(same, gradient, atol=0)
  _, nothing = loss_and_gradient(arch, start(arch), windows, np.array([False, False]))
  rounds.assert_trees_close(nothing, jax.tree.map(np.zeros_like, nothing), atol=0)


def test_a_model_that_knows_nothing_loses_log_v_per_token():
  arch = small(**ONE_STACK)
  params = start(arch)
  params = params | {"backbone": params["backbone"] | {"head": np.zeros((D, V), np.float32)}}
  loss, _ = loss_and_gradient(arch, params, tokens_of(2, B, T + 1), np.ones(B, bool))
  np.testing.assert_allclose(loss, B * T * math.log(V), rtol=1e-6)


def test_the_tree_of_parameters():
  def block(layers):
    kernel = lambda *shape: {"kernel": (layers, *shape)}
    return {
      "attention_norm": (layers, 24), "mlp_norm": (layers, 24),
      "query": kernel(24, 24), "key": kernel(24, 12), "value": kernel(24, 12), "attention_out": kernel(24, 24),
      "gate": kernel(24, 17), "up": kernel(24, 17), "down": kernel(17, 24),
    }

  expected = {
    "backbone": {"embedding": (11, 24), "blocks": block(2), "final_norm": (24,), "head": (24, 11)},
    "key_layers": block(1),
  }
  params = init(small(), jax.random.key(0))
  assert jax.tree.map(jnp.shape, params) == expected
  kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert kinds(model.abstract_params(small())) == kinds(params)
  tied = model.abstract_params(small(tied_head=True, key_layer_share=0.0))
  assert tied["backbone"].keys() == {"embedding", "blocks", "final_norm"} and tied["key_layers"] == {}


def test_initial_parameters_have_the_documented_spread():
  params = jax.device_get(init(small(), jax.random.key(0)))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path)
    if "norm" in name:
      np.testing.assert_array_equal(leaf, np.ones_like(leaf))
    else:
      spread = math.sqrt(0.4 / D) / (math.sqrt(2 * L) if "attention_out" in name or "down" in name else 1)
      np.testing.assert_allclose(leaf.std(), spread, rtol=0.15, err_msg=name)
      assert abs(leaf.mean()) < 0.2 * spread
  kernels = join(params)["query"]["kernel"]
  assert all(np.any(kernels[i] != kernels[j]) for i in range(L) for j in range(i))


@pytest.mark.parametrize(("name", "count"), [
  ("nano", 45_312),
  ("tiny", 431_040),
  ("75m", 74_128_896),
  ("125m", 123_685_632),
  ("400m", 405_324_800),
  ("1b", 1_047_087_104),
])
def test_presets_have_exactly_the_documented_number_of_parameters(name, count):
  arch = model.architecture(model.PRESETS[name](), 257)
  d, kv = arch.d_model, arch.d_model // arch.num_heads * arch.num_kv_heads
  block = 2 * d + 2 * d * d + 2 * d * kv + 3 * d * arch.d_ff
  embeddings = arch.vocab_size * d * (1 if arch.tied_head else 2)
  assert trees.num_parameters(model.abstract_params(arch)) == embeddings + arch.num_layers * block + d == count
  assert arch.vocab_size == (257 if name in ("nano", "tiny") else 50_432)
  assert arch.d_model % (2 * arch.num_heads) == arch.num_heads % arch.num_kv_heads == 0


SEPARATOR = V - 1


def masked():
  return dataclasses.replace(small(**ONE_STACK), document_separator=SEPARATOR)


def test_attention_stays_within_the_document():
  """Each document's logits are those that it has alone, wherever it stands."""
  arch = masked()
  params = start(arch)
  first, second = (np.array([SEPARATOR, *ids], np.int32) for ids in ([1, 2], [3, 4, 5]))
  joint = apply(arch, params, np.concatenate([first, second])[None])[0]
  alone = [apply(arch, params, np.pad(part, (0, T - len(part)))[None])[0, : len(part)] for part in (first, second)]
  np.testing.assert_allclose(joint, np.concatenate(alone), atol=1e-4)
  unmasked = apply(small(**ONE_STACK), params, np.concatenate([first, second])[None])[0]
  np.testing.assert_allclose(unmasked[: len(first)], alone[0], atol=1e-4)
  assert np.abs(unmasked[len(first) :] - alone[1]).max() > 1e-2


def test_a_window_may_begin_within_a_document():
  """What stands before the first separator is one document too."""
  arch = masked()
  params = start(arch)
  tokens = np.array([[1, 2, SEPARATOR, 3, 4, 5, 6]], np.int32)
  changed = tokens.copy()
  changed[0, 0] = 7
  before, after = (np.asarray(apply(arch, params, t)[0]) for t in (tokens, changed))
  assert np.abs(before[:2] - after[:2]).max(axis=1).min() > 1e-3
  np.testing.assert_array_equal(before[2:], after[2:])


def test_padding_is_not_predicted_and_changes_nothing_before_it():
  arch = small(**ONE_STACK)
  params = start(arch)
  window = tokens_of(3, 1, T + 1)
  padded = np.concatenate([window, np.full((1, 4), -1, np.int32)], axis=1)
  whole, padded_too = (loss_and_gradient(arch, params, w, np.ones(1, bool)) for w in (window, padded))
  np.testing.assert_allclose(padded_too[0], whole[0], rtol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-3, rtol=1e-3), padded_too[1], whole[1])
  assert model.num_targets(jnp.asarray(padded), np.ones(1, bool)) == T
  assert model.num_targets(jnp.asarray(np.repeat(padded, 3, axis=0)), np.array([True, False, True])) == 2 * T
