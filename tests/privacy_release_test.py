"""What is clipped and noised: sensitivity, deviation, the clip that adapts, gradients of examples."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from worldlm_jax.privacy import examples as examples_lib, release

SHAPES = {
  "backbone": {"embedding": (5, 3), "blocks": {"gate": {"kernel": (2, 3, 4)}, "mlp_norm": (2, 3)}, "final_norm": (3,)},
  "key_layers": {"gate": {"kernel": (2, 3, 4)}, "mlp_norm": (2, 3)},
}
IS_SHAPE = lambda x: isinstance(x, tuple)
LAYERS = 6  # two blocks, two key layers, embedding, final norm


def update_of(seed, size):
  draw = np.random.default_rng(seed)
  return jax.tree.map(lambda shape: np.float32(size * draw.normal(size=shape)), SHAPES, is_leaf=IS_SHAPE)


def norm_of(tree):
  return float(np.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in jax.tree.leaves(tree))))


def guard_of(**fields):
  defaults = dict(
    key=np.asarray(jax.random.key_data(jax.random.key(3))), clips=True, by_layer=False, noise=0.0, mean_noise=0.0,
    adapts=False, adapts_mean=False, quantile=0.5, quantile_noise=2.0, quantile_rate=0.2, hands_down=False,
    example_clip=math.inf, example_noise=0.0, example_batch=0.0,
  )
  return jax.tree.map(jnp.asarray, release.Guard(**(defaults | fields)))


def private_of(clip, count=0):
  return release.Private({}, jnp.float32(clip), jnp.float32(0), jnp.int32(count))


released = jax.jit(release.release)
clipped = jax.jit(release.clip)

SIZES = st.floats(-6, 6).map(lambda power: 10.0**power)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 99), size=SIZES, norm=SIZES, by_layer=st.booleans(),
                  broken=st.sampled_from([None, math.nan, math.inf]))
def test_without_ones_text_a_release_moves_by_the_clip_at_most(seed, size, norm, by_layer, broken):
  """Neighbours under zero-out: the update, whatever it is, and zero; the noise is the same."""
  guard = guard_of(by_layer=by_layer, noise=0.7)
  update = update_of(seed, size)
  nothing = jax.tree.map(np.zeros_like, update)
  if broken is not None:
    update["backbone"]["embedding"][1, 1] = broken
  here, there = (released(u, private_of(norm), guard)[0] for u in (update, nothing))
  # The noise is added in float32, which rounds at its own size.
  distance = norm_of(jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), here, there))
  assert distance <= norm * (1 + 1e-4)
  exact = norm_of(clipped(update, jnp.float32(norm), jnp.bool_(by_layer))[0])
  assert exact <= norm * (1 + 1e-6)
  if broken is not None:
    assert exact == 0


def test_what_is_under_the_clip_stays_as_it_is_and_what_is_over_it_keeps_its_direction():
  update = update_of(1, 1.0)
  size = norm_of(update)
  same, within = clipped(update, jnp.float32(1.01 * size), jnp.bool_(False))
  jax.tree.map(np.testing.assert_array_equal, same, update)
  assert within == 1
  half, within = clipped(update, jnp.float32(size / 2), jnp.bool_(False))
  jax.tree.map(lambda h, u: np.testing.assert_allclose(h, u / 2, rtol=1e-5), half, update)
  assert within == 0


def test_by_layer_each_has_an_equal_share_of_the_norm():
  update = update_of(2, 1.0)
  update["key_layers"] = jax.tree.map(lambda leaf: 1e-3 * leaf, update["key_layers"])
  found, within = clipped(update, jnp.float32(0.6), jnp.bool_(True))
  for i in range(2):
    block = jax.tree.map(lambda leaf, i=i: leaf[i], found["backbone"]["blocks"])
    assert norm_of(block) == pytest.approx(0.6 / math.sqrt(LAYERS), rel=1e-5)
  assert norm_of(found["backbone"]["embedding"]) == pytest.approx(0.6 / math.sqrt(LAYERS), rel=1e-5)
  jax.tree.map(np.testing.assert_array_equal, found["key_layers"], update["key_layers"])
  assert within == pytest.approx(2 / LAYERS)


def test_noise_has_its_standard_deviation_and_is_drawn_anew_each_time():
  shape = {"backbone": {"embedding": np.zeros((200, 300), np.float32)}}
  draws = [np.asarray(released(shape, private_of(2.5, count), guard_of(noise=0.4))[0]["backbone"]["embedding"])
           for count in (0, 1)]
  for draw in draws:
    assert abs(draw.mean()) < 4 * 1.0 / math.sqrt(draw.size)
    assert draw.std() == pytest.approx(0.4 * 2.5, rel=0.015)
  assert abs(np.corrcoef(draws[0].ravel(), draws[1].ravel())[0, 1]) < 0.02
  again = np.asarray(released(shape, private_of(2.5, 1), guard_of(noise=0.4))[0]["backbone"]["embedding"])
  np.testing.assert_array_equal(again, draws[1])


def test_a_federations_noise_is_what_its_most_exposed_member_asks_for():
  like = {"backbone": {"embedding": np.zeros((2, 200, 300), np.float32)}}
  shares = jnp.array([[0.5, 0.0], [0.3, 0.0], [0.2, 0.0], [0.0, 1.0]])  # four members, two federations
  asks = jnp.array([0.2, 0.9, 0.0, 0.0])
  guards = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), guard_of())
  members = guard_of()._replace(mean_noise=asks)
  private = release.Private({}, jnp.ones(2), jnp.zeros(2), jnp.zeros(2, jnp.int32))
  clips = jnp.array([2.0, 1.0, 1.0, 1.0])
  found = np.asarray(release.mean_noise(like, shares, clips, guards, members, private)["backbone"]["embedding"])
  assert found[0].std() == pytest.approx(max(0.5 * 0.2 * 2.0, 0.3 * 0.9 * 1.0), rel=0.015)
  np.testing.assert_array_equal(found[1], 0)  # nobody there asks for any


def test_the_clip_goes_to_the_quantile():
  """Andrew et al.: with sizes spread evenly over 1 to 5, the 3/4 quantile is 4."""
  guard = guard_of(quantile=0.75, quantile_noise=0.3, quantile_rate=0.05, adapts=True)
  step = jax.jit(lambda clip, share, count: release.next_clip(
    release.draw_key(guard, release.SHARE, count), clip, share, 1, guard))
  clip, sizes, seen = 1.0, np.random.default_rng(0).uniform(1, 5, 600), []
  for count, size in enumerate(sizes):
    clip = float(step(clip, float(size <= clip), count))
    seen.append(clip)
  assert np.mean(seen[300:]) == pytest.approx(4.0, rel=0.1)


# Examples.


def loss_sum(params, windows, rows):
  """Of a linear model: its gradient is the window itself."""
  return jnp.sum(jnp.where(rows[:, None], windows[:, 1:] * params["w"][None], 0.0))


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 99), norm=st.floats(0.01, 100.0))
def test_without_an_example_the_sum_of_gradients_moves_by_the_clip_at_most(seed, norm):
  windows = np.random.default_rng(seed).integers(0, 9, (4, 6)).astype(np.int32)
  protection = examples_lib.Examples(jnp.float32(norm), jnp.float32(0), jnp.float32(3), jax.random.key(0))
  params = {"w": jnp.ones(5)}
  both = [gradients(params, windows, jnp.array(rows), protection)[1]["w"]
          for rows in ([True] * 4, [True, False, True, True])]
  assert np.linalg.norm(both[0] - both[1]) <= norm * (1 + 1e-5)


gradients = jax.jit(functools.partial(examples_lib.clipped_gradients, loss_sum))


def test_the_gradient_of_a_step_is_the_clipped_sum_and_noise_over_the_average_number():
  windows = np.array([[0, 3, 4, 0, 0, 0], [0, 300, 400, 0, 0, 0], [-1] * 6], np.int32)  # of norms 5, 500; and padding
  protection = examples_lib.Examples(jnp.float32(2.0), jnp.float32(0), jnp.float32(4), jax.random.key(0))
  _, found = gradients({"w": jnp.ones(5)}, windows[:2], jnp.ones(2, bool), protection)
  # A mean over five targets: 1, under the clip, and 100, over it.
  np.testing.assert_allclose(found["w"], np.array([0.6, 0.8, 0, 0, 0]) + 2 * np.array([0.6, 0.8, 0, 0, 0]), rtol=1e-5)
  mean = examples_lib.noised_mean(found, jnp.int32(10), protection, 0)
  np.testing.assert_allclose(mean["w"], found["w"] / 4, rtol=1e-6)
  wide = {"w": jnp.zeros(60_000)}
  noisy = examples_lib.noised_mean(wide, jnp.int32(10), protection._replace(noise=jnp.float32(3.0)), 1)["w"]
  assert np.asarray(noisy).std() == pytest.approx(3.0 * 2.0 / 4, rel=0.015)
