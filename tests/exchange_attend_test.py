"""Laws and equations of attention over parameters, against float64 NumPy where there is one.

Shapes: S = 5 candidates, M = 3 layers, T = 2 tensors of a block.
"""

import functools
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from worldlm_jax.exchange import attend, rows

S, M, T = 5, 3, 2
SHAPES = {"matrix": (M, 5, 2), "vector": (M, 7)}
GRANULARITIES = ("layer", "tensor", "all")
ALL_THERE = np.ones((S, M), bool)
SOME_THERE = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]], bool)
UNIFORM = np.ones(S, np.float32)


def draw(seed, *leading):
  """Random key layers, leaves `[*leading, M, ...]`."""
  rng = np.random.default_rng([seed, *leading])
  return {name: rng.normal(size=(*leading, *shape)).astype(np.float32) for name, shape in SHAPES.items()}


def each(function, *layers):
  return {name: function(*(one[name] for one in layers)) for name in SHAPES}


def with_nan_where_absent(candidates, mask_SxM):
  return each(lambda leaf: np.where(mask_SxM.reshape(S, M, *[1] * (leaf.ndim - 2)), leaf, np.nan).astype(np.float32),
              candidates)


def units(layers, granularity):
  """What counts as one vector, in float64: a list over `[T or 1]` of lists over `[M or 1]`."""
  per_tensor = [[np.ravel(row).astype(np.float64) for row in layers[name]] for name in sorted(layers)]
  per_layer = [np.concatenate(rows) for rows in zip(*per_tensor, strict=True)]
  return {"tensor": per_tensor, "layer": [per_layer], "all": [[np.concatenate(per_layer)]]}[granularity]


def table(values):
  """A function of (query unit, candidate unit) pairs as `[T or 1, S, M or 1]`."""
  return np.moveaxis(np.array(values), 0, 1)


def cosine(a, b):
  norms = np.linalg.norm(a) * np.linalg.norm(b)
  return a @ b / norms if norms else 0.0


def scores_in_numpy(similarity, granularity, direction, reference, candidates):
  measure = {"scaled_dot": lambda a, b: a @ b / math.sqrt(a.size)}.get(similarity, cosine)
  rows = []
  for s in range(S):
    candidate = each(lambda leaf, s=s: leaf[s], candidates)
    displacement = candidate if reference is None else each(lambda c, r: c.astype(np.float64) - r, candidate, reference)
    rows.append([
      [measure(q, c) for q, c in zip(queries, found, strict=True)]
      for queries, found in zip(units(direction, granularity), units(displacement, granularity), strict=True)
    ])
  return table(rows)


parameter_scores = functools.partial(jax.jit, static_argnums=(0, 1))(attend.parameter_scores)
attention_weights = jax.jit(attend.attention_weights)
mix = jax.jit(attend.mix)


@functools.partial(jax.jit, static_argnames=("similarity", "granularity"))
def attend_layers(query, candidates, mask_SxM, prior_S, temperature, *, similarity="param_cosine", granularity="layer"):
  scores = attend.parameter_scores(similarity, granularity, query, None, candidates, mask_SxM)
  weights = attend.attention_weights(scores, mask_SxM, prior_S, temperature)
  return weights, attend.mix(query, candidates, weights)


@functools.partial(jax.jit, static_argnames="granularity")
def attend_updates(update, candidates, mask_SxM=ALL_THERE, *, granularity="layer", strength=1.0, threshold=0.1,
                   norm_cap=1.0, means_S=None):
  """What is added, beta and the cosines; absent candidates show in no more than the table of inner products."""
  everybody = each(lambda own, theirs: jnp.concatenate([own[None], theirs]), update, candidates)
  gram = jnp.stack(rows.gram([rows.Source(everybody, lambda own: own)]))
  coefficients, weights, cosines = attend.update_coefficients(
    gram, jnp.asarray(mask_SxM), granularity, strength=strength, threshold=threshold, norm_cap=norm_cap,
    means_S=means_S,
  )
  there = jnp.concatenate([jnp.ones_like(mask_SxM[:1]), mask_SxM])
  addition = {}
  for name, c_MxC in zip(sorted(SHAPES), coefficients, strict=True):
    leaf = everybody[name]
    clean = jnp.where(there.reshape(*there.shape, *[1] * (leaf.ndim - 2)), leaf, 0.0)
    addition[name] = jnp.einsum("mc,cm...->m...", c_MxC, clean, precision="highest")
  return addition, weights, cosines


# Similarities.


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("similarity", ["param_cosine", "scaled_dot", "centered_cosine", "update_cosine"])
def test_each_similarity_is_its_equation_in_each_unit(similarity, granularity):
  own, parents, update, candidates = draw(1), draw(2), draw(3), draw(4, S)
  direction, reference = {
    "centered_cosine": (each(np.subtract, own, parents), parents),
    "update_cosine": (update, each(np.subtract, own, update)),
  }.get(similarity, (own, None))
  scores = parameter_scores(similarity, granularity, direction, reference, candidates, ALL_THERE)
  assert scores.shape == {"layer": (1, S, M), "tensor": (T, S, M), "all": (1, S, 1)}[granularity]
  assert scores.dtype == jnp.float32
  expected = scores_in_numpy(similarity, granularity, direction, reference, candidates)
  np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_scores_take_no_notice_of_what_absent_candidates_hold():
  own, candidates = draw(1), draw(4, S)
  there = with_nan_where_absent(candidates, SOME_THERE)
  scores = parameter_scores("param_cosine", "tensor", own, None, there, SOME_THERE)
  full = scores_in_numpy("param_cosine", "tensor", own, None, candidates)
  np.testing.assert_allclose(scores, np.where(SOME_THERE, full, 0), atol=1e-6)


def test_without_a_direction_of_its_own_the_candidates_mean_one_counts():
  reference, candidates = draw(2), draw(4, S)
  nothing = each(np.zeros_like, reference)
  there = with_nan_where_absent(candidates, SOME_THERE)
  scores = parameter_scores("update_cosine", "layer", nothing, reference, there, SOME_THERE)

  def mean(leaf, origin):
    mask = SOME_THERE.reshape(S, M, *[1] * (leaf.ndim - 2))
    return (mask * (leaf - origin[None])).sum(0) / mask.sum(0)

  expected = scores_in_numpy("update_cosine", "layer", each(mean, candidates, reference), reference, candidates)
  np.testing.assert_allclose(np.asarray(scores)[0][SOME_THERE], expected[0][SOME_THERE], atol=1e-6)


def test_a_cosine_with_nothing_is_zero():
  own, reference = draw(1), draw(2)
  candidates = each(lambda r: np.stack([r] * S), reference)  # no displacement at all
  scores = parameter_scores("centered_cosine", "layer", own, reference, candidates, ALL_THERE)
  np.testing.assert_array_equal(scores, np.zeros((1, S, M)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_loss_scores_put_one_unit_in_the_place_of_ones_own(granularity):
  own, candidates, target, curvature = draw(1), draw(4, S), draw(5), draw(6)

  def loss(layers):  # not a sum over units: swapping one unit is not swapping another
    terms = each(lambda k, t, c: (c * (k - t)).sum(), layers, target, curvature)
    return terms["matrix"] ** 2 + terms["matrix"] * terms["vector"]

  scores = jax.jit(lambda q, c: attend.loss_scores(granularity, q, c, loss))(own, candidates)
  expected = np.zeros({"layer": (1, S, M), "tensor": (T, S, M), "all": (1, S, 1)}[granularity])
  for t, s, m in np.ndindex(expected.shape):
    swapped = {name: np.array(leaf, np.float64) for name, leaf in own.items()}
    names = [sorted(SHAPES)[t]] if granularity == "tensor" else sorted(SHAPES)
    rows = slice(None) if granularity == "all" else m
    for name in names:
      swapped[name][rows] = candidates[name][s][rows]
    expected[t, s, m] = -loss(swapped)
  assert scores.shape == expected.shape and scores.dtype == jnp.float32
  np.testing.assert_allclose(scores, expected, rtol=2e-5, atol=2e-5)


# Attention over layers.


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
  st.integers(0, 2**15 - 1), st.integers(0, 2**32),
  st.sampled_from([0.0, 1e-3, 0.1, 1.0, 31.0, math.inf]), st.booleans(),
)
def test_weights_sum_to_one_over_what_is_there(bits, seed, temperature, nan_where_absent):
  """Law 3."""
  mask = np.array([bits >> i & 1 for i in range(S * M)], bool).reshape(S, M)
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(T, S, M)).astype(np.float32)
  if nan_where_absent:
    scores = np.where(mask, scores, np.nan).astype(np.float32)
  prior = rng.integers(0, 3, S).astype(np.float32) * 17
  weights = np.asarray(attention_weights(scores, mask, prior, np.float32(temperature)))
  counted = mask & (prior > 0)[:, None]
  assert weights.dtype == np.float32 and weights.shape == (T, S, M)
  assert (weights >= 0).all()
  assert (weights[:, ~counted] == 0).all()
  np.testing.assert_allclose(weights.sum(axis=1), np.broadcast_to(counted.any(axis=0), (T, M)), atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("temperature", [0.0, 0.1, math.inf])
def test_identical_siblings_give_the_sibling(granularity, temperature):
  """Law 1."""
  sibling = draw(7)
  candidates = with_nan_where_absent(each(lambda leaf: np.stack([leaf] * S), sibling), SOME_THERE)
  _, mixed = attend_layers(draw(1), candidates, SOME_THERE, UNIFORM, temperature, granularity=granularity)
  for name in SHAPES:
    np.testing.assert_allclose(mixed[name], sibling[name], atol=1e-6)
    assert mixed[name].dtype == jnp.float32


def test_infinite_temperature_with_a_uniform_prior_is_the_plain_mean():
  candidates = draw(4, S)
  _, mixed = attend_layers(draw(1), with_nan_where_absent(candidates, SOME_THERE), SOME_THERE, UNIFORM, math.inf)
  for name, leaf in candidates.items():
    for m in range(M):
      np.testing.assert_allclose(mixed[name][m], leaf[SOME_THERE[:, m], m].mean(axis=0), atol=1e-6)


def test_temperature_zero_takes_the_most_similar_whatever_its_prior():
  own, candidates = draw(1), draw(4, S)
  prior = np.array([1e6, 1, 1e-6, 3, 2], np.float32)
  weights, mixed = attend_layers(own, candidates, SOME_THERE, prior, 0.0, granularity="tensor")
  scores = np.where(SOME_THERE, scores_in_numpy("param_cosine", "tensor", own, None, candidates), -np.inf)
  best = scores.argmax(axis=1)
  np.testing.assert_array_equal(weights, np.eye(S)[best].swapaxes(1, 2))
  for t, name in enumerate(sorted(SHAPES)):
    np.testing.assert_array_equal(mixed[name], candidates[name][best[t], np.arange(M)])


def test_temperature_zero_takes_the_first_of_equals():
  scores = np.full((1, S, M), 0.5, np.float32)
  weights = attention_weights(scores, SOME_THERE, UNIFORM, np.float32(0))
  assert np.asarray(weights).argmax(axis=1).tolist() == [[0, 0, 2]]
  np.testing.assert_array_equal(np.sum(weights, axis=1), np.ones((1, M)))


def test_temperatures_near_the_limits_approach_them():
  own, candidates = draw(1), draw(4, S)
  for near, limit in ((1e-4, 0.0), (1e6, math.inf)):
    _, a = attend_layers(own, candidates, ALL_THERE, UNIFORM, near)
    _, b = attend_layers(own, candidates, ALL_THERE, UNIFORM, limit)
    for name in SHAPES:
      np.testing.assert_allclose(a[name], b[name], atol=1e-5)


@pytest.mark.parametrize("temperature", [0.1, math.inf])
def test_at_equal_scores_weights_are_as_the_priors(temperature):
  tokens = np.array([3, 5, 0, 7, 11], np.float32)
  weights = attention_weights(np.full((1, S, M), 0.3, np.float32), ALL_THERE, tokens, np.float32(temperature))
  np.testing.assert_allclose(weights[0, :, 0], tokens / tokens.sum(), atol=1e-6)


def test_weights_are_the_softmax():
  scores = np.random.default_rng(8).normal(size=(T, S, M)).astype(np.float32)
  prior = np.array([3, 5, 2, 7, 11], np.float32)
  weights = attention_weights(scores, SOME_THERE, prior, np.float32(0.3))
  raised = SOME_THERE * np.exp(scores.astype(np.float64) / 0.3) * prior[:, None]
  np.testing.assert_allclose(weights, raised / raised.sum(axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.1, math.inf])
def test_a_node_without_candidates_keeps_its_own(temperature):
  own = draw(1)
  nobody = np.zeros((S, M), bool)
  weights, mixed = attend_layers(own, with_nan_where_absent(draw(4, S), nobody), nobody, UNIFORM, temperature)
  np.testing.assert_array_equal(weights, np.zeros((1, S, M)))
  for name in SHAPES:
    np.testing.assert_array_equal(mixed[name], own[name])


def test_a_layer_without_candidates_keeps_its_own_beside_others_that_mix():
  own, candidates = draw(1), draw(4, S)
  mask = ALL_THERE & np.array([True, False, True])
  _, mixed = attend_layers(own, candidates, mask, UNIFORM, 0.1)
  for name in SHAPES:
    np.testing.assert_array_equal(mixed[name][1], own[name][1])
    for m in (0, 2):
      assert np.all(mixed[name][m] != own[name][m])


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_permuting_candidates_permutes_the_weights_and_keeps_the_result(temperature):
  """Law 2."""
  own, candidates, prior = draw(1), draw(4, S), np.array([3, 5, 2, 7, 11], np.float32)
  order = np.array([3, 0, 4, 2, 1])
  weights, mixed = attend_layers(own, candidates, SOME_THERE, prior, temperature)
  reordered = each(lambda leaf: leaf[order], candidates)
  permuted, again = attend_layers(own, reordered, SOME_THERE[order], prior[order], temperature)
  np.testing.assert_allclose(permuted, np.asarray(weights)[:, order], atol=1e-6)
  for name in SHAPES:
    np.testing.assert_allclose(again[name], mixed[name], atol=1e-6)


def test_mix_is_the_weighted_sum_for_every_tensor_by_itself():
  candidates = draw(4, S)
  weights = np.random.default_rng(9).uniform(size=(T, S, M)).astype(np.float32)
  mixed = mix(draw(1), candidates, weights)
  for w, name in zip(weights, sorted(SHAPES), strict=True):
    np.testing.assert_allclose(mixed[name], np.einsum("sm,sm...->m...", w, candidates[name]), atol=1e-5)


def test_nodes_side_by_side_attend_as_each_alone():
  own, candidates = draw(1, 2), draw(4, 2, S)
  masks = np.stack([SOME_THERE, ALL_THERE])
  temperatures = np.array([0.1, 0.0], np.float32)
  together = jax.vmap(attend_layers, in_axes=(0, 0, 0, None, 0))(own, candidates, masks, UNIFORM, temperatures)
  for n in range(2):
    mine = each(lambda leaf, n=n: leaf[n], candidates)
    alone = attend_layers(each(lambda leaf, n=n: leaf[n], own), mine, masks[n], UNIFORM, temperatures[n])
    jax.tree.map(lambda a, b, n=n: np.testing.assert_allclose(a[n], b, atol=1e-6), together, alone)


# Attention over updates.


def updates_in_numpy(update, candidates, mask_SxM, granularity, strength, threshold, norm_cap):
  """The equation, unit by unit: the new displacement D_q + addition and beta `[T or 1][M or 1][S]`."""
  own = units(update, granularity)
  others = [units(each(lambda leaf, s=s: leaf[s], candidates), granularity) for s in range(S)]
  betas = [[
    [mask_SxM[s, m] * strength * max(0.0, cosine(vector, others[s][t][m]) - threshold) for s in range(S)]
    for m, vector in enumerate(vectors)] for t, vectors in enumerate(own)]
  moved = []
  for t, vectors in enumerate(own):
    for m, vector in enumerate(vectors):
      step = vector + sum(betas[t][m][s] * others[s][t][m] for s in range(S))
      moved.append(step * min(1.0, norm_cap * np.linalg.norm(vector) / np.linalg.norm(step)))
  return moved, betas


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("norm_cap", [1.0, 1.3, math.inf])
def test_attend_updates_is_its_equation(granularity, norm_cap):
  update = draw(1)
  candidates = each(lambda own, leaf: own[None] + leaf, update, draw(4, S))  # so that most are relevant
  mask = ALL_THERE & np.array([1, 1, 0, 1, 1], bool)[:, None]
  addition, weights, cosines = attend_updates(
    update, with_nan_where_absent(candidates, mask), mask, granularity=granularity,
    strength=0.7, threshold=0.2, norm_cap=norm_cap,
  )
  moved, betas = updates_in_numpy(update, candidates, mask, granularity, 0.7, 0.2, norm_cap)
  found = [v for vectors in units(each(np.add, update, addition), granularity) for v in vectors]
  for actual, expected in zip(found, moved, strict=True):
    np.testing.assert_allclose(actual, expected, atol=2e-6)
  shape = {"tensor": (T, S, M)}.get(granularity, (1, S, M))
  assert weights.shape == cosines.shape == shape
  np.testing.assert_allclose(weights, np.broadcast_to(np.moveaxis(betas, 2, 1), shape), atol=1e-6)
  full = scores_in_numpy("param_cosine", granularity, update, None, candidates) * mask[None]
  np.testing.assert_allclose(cosines, np.broadcast_to(full, shape), atol=1e-6)
  assert all(leaf.dtype == jnp.float32 for leaf in (*addition.values(), weights, cosines))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("norm_cap", [1.0, 1.7, math.inf])
def test_with_nothing_relevant_it_is_training_alone_bit_by_bit(granularity, norm_cap):
  nodes = 31  # rounding would show in one of them
  update = draw(1, nodes)
  opposed = each(lambda own, leaf: 0.1 * leaf - own[:, None], update, draw(4, nodes, S))
  absent = np.broadcast_to(SOME_THERE, (nodes, S, M))
  opposed = each(lambda leaf: np.where(absent.reshape(nodes, S, M, *[1] * (leaf.ndim - 3)), leaf, np.nan), opposed)
  one = functools.partial(attend_updates, granularity=granularity, threshold=0.0, norm_cap=norm_cap)
  addition, weights, cosines = jax.jit(jax.vmap(one))(update, opposed, absent)
  assert np.all(np.asarray(cosines).max(axis=1) <= 0)
  np.testing.assert_array_equal(weights, np.zeros_like(weights))
  for name in SHAPES:
    np.testing.assert_array_equal(addition[name], np.zeros_like(addition[name]))


def test_an_aligned_update_adds_its_strength_beyond_the_threshold():
  update = draw(1)
  lonely = ALL_THERE & (np.arange(S) == 3)[:, None]
  candidates = each(lambda own: np.stack([2 * own] * S), update)
  addition, weights, _ = attend_updates(update, candidates, lonely, strength=0.6, threshold=0.25, norm_cap=math.inf)
  np.testing.assert_allclose(weights, np.where(lonely, 0.6 * 0.75, 0)[None], atol=1e-6)
  for name in SHAPES:
    np.testing.assert_allclose(addition[name], 0.6 * 0.75 * 2 * update[name], atol=1e-5)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**32), pull=st.floats(-2, 2), scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]),
  strength=st.floats(0, 5), threshold=st.floats(0, 0.99), norm_cap=st.floats(1, 3),
  granularity=st.sampled_from(GRANULARITIES),
)
def test_the_step_is_never_longer_than_the_cap(seed, pull, scale, strength, threshold, norm_cap, granularity):
  update = each(lambda leaf: np.float32(scale) * leaf, draw(seed))
  candidates = each(lambda own, leaf: np.float32(pull) * own[None] + leaf, update, draw(seed, S))
  addition, weights, cosines = attend_updates(
    update, candidates, granularity=granularity, strength=strength, threshold=threshold, norm_cap=norm_cap
  )
  before, after = units(update, granularity), units(each(np.add, update, addition), granularity)
  for own, moved in zip(itertools.chain(*before), itertools.chain(*after), strict=True):
    assert np.linalg.norm(moved) <= (norm_cap + 1e-5) * np.linalg.norm(own)
  assert np.all((np.asarray(weights) > 0) <= (np.asarray(cosines) > threshold))


def test_updates_that_point_away_count_for_nothing():
  update, candidates = draw(1), draw(4, S)
  candidates["matrix"][2], candidates["vector"][2] = -update["matrix"], -update["vector"]
  with_it = attend_updates(update, candidates, threshold=0.0)
  without = attend_updates(update, candidates, ALL_THERE & (np.arange(S) != 2)[:, None], threshold=0.0)
  assert np.all(with_it[1][:, 2] == 0) and np.all(np.asarray(with_it[2])[:, 2] < -0.999)
  for name in SHAPES:
    np.testing.assert_array_equal(with_it[0][name], without[0][name])


def test_to_a_node_without_an_update_nothing_is_relevant():
  candidates = with_nan_where_absent(draw(4, S), SOME_THERE)
  nothing = each(lambda leaf: np.zeros(leaf.shape[1:], np.float32), candidates)
  addition, weights, _ = attend_updates(nothing, candidates, SOME_THERE, threshold=-1.0)
  assert not np.any(weights)
  assert all(not np.any(addition[name]) for name in SHAPES)


def test_a_mean_counts_as_all_that_it_is_the_mean_of():
  """As if each of them were as long as one's own update: their weights add up to its."""
  update = draw(1)
  candidates = each(lambda own, leaf: own[None] + leaf, update, draw(4, S))
  vectors = [units(each(lambda leaf, s=s: leaf[s], candidates), "all")[0][0] for s in range(S)]
  own = np.linalg.norm(units(update, "all")[0][0])
  lengths = np.array([own / np.linalg.norm(vector) for vector in vectors], np.float32)
  candidates = each(lambda leaf: leaf * lengths.reshape(S, *[1] * (leaf.ndim - 1)), candidates)
  options = {"granularity": "all", "threshold": -1.0, "norm_cap": math.inf, "strength": 0.3}
  _, one_by_one, _ = attend_updates(update, candidates, **options)
  mean = each(lambda leaf: np.stack([leaf.mean(axis=0)] * S), candidates)
  first = ALL_THERE & (np.arange(S) == 0)[:, None]
  addition, weights, _ = attend_updates(update, mean, first, means_S=jnp.zeros(S).at[0].set(S), **options)
  np.testing.assert_allclose(weights[0, 0], np.sum(one_by_one[0], axis=0), rtol=1e-5)
  for name in SHAPES:
    np.testing.assert_allclose(addition[name], weights[0, 0, 0] * mean[name][0], rtol=1e-4, atol=1e-6)


def test_permuting_the_others_keeps_the_addition():
  """Law 2."""
  update = draw(1)
  candidates = each(lambda own, leaf: own[None] + leaf, update, draw(4, S))
  order = np.array([3, 0, 4, 2, 1])
  addition, weights, _ = attend_updates(update, candidates, SOME_THERE)
  again, permuted, _ = attend_updates(update, each(lambda leaf: leaf[order], candidates), SOME_THERE[order])
  np.testing.assert_allclose(permuted, np.asarray(weights)[:, order], atol=1e-6)
  for name in SHAPES:
    np.testing.assert_allclose(again[name], addition[name], atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_a_candidate_whose_score_is_nan_gets_no_weight(temperature):
  scores = jnp.asarray([0.5, math.nan, 0.7]).reshape(1, 3, 1)
  weights = attention_weights(scores, jnp.ones((3, 1), bool), jnp.ones(3), jnp.float32(temperature))
  assert weights[0, 1, 0] == 0 and float(jnp.sum(weights)) == pytest.approx(1)


def test_a_candidate_without_weight_adds_nothing_whatever_it_holds():
  candidates = {"w": jnp.asarray([[1.0, 2.0], [math.nan, math.inf]]).reshape(2, 1, 2)}
  mixed = mix({"w": jnp.zeros((1, 2))}, candidates, jnp.asarray([1.0, 0.0]).reshape(1, 2, 1))
  np.testing.assert_array_equal(mixed["w"][0], [1, 2])
