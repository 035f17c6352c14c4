"""Local training against a loop written by hand with Optax, and the learning rates.

Shapes: S = 5 steps of at most B = 4 windows of W = 8 tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from worldlm_jax import local, model, partition
from worldlm_jax.config import ModelConfig, NodeSettings, OptimizerConfig

S, B, W, VOCAB = 5, 4, 8, 11
ARCH = model.architecture(
  ModelConfig(num_layers=2, d_model=12, num_heads=3, num_kv_heads=1, d_ff=17, key_layer_share=0.0), VOCAB
)
RATES = np.array([0.02, 0.05, 0.03, 0.01, 0.04], np.float32)


def config_of(**options):
  # A large epsilon keeps Adam from blowing rounding errors of tiny gradients up to whole steps.
  return OptimizerConfig(b1=0.8, b2=0.9, epsilon=1e-3, **options)


@functools.cache
def compiled(**options):
  return jax.jit(functools.partial(local.train_node, ARCH, config_of(**options)))


def train(params, opt_state, work, **options):
  return compiled(**options)(params, opt_state, work)


@functools.cache
def start():
  return jax.device_get(jax.jit(model.init, static_argnums=0)(ARCH, jax.random.key(0)))


def work_of(seed=0, steps=S, batch_size=3, weight_decay=0.3, clip_norm=0.5):
  windows = np.random.default_rng(seed).integers(0, VOCAB, (S, B, W)).astype(np.int32)
  return local.Workload(
    windows, RATES, np.int32(steps), np.int32(batch_size), np.float32(weight_decay), np.float32(clip_norm),
    np.float32(1),
  )


@functools.cache
def fresh(**options):
  return jax.device_get(jax.jit(local.optimizer(config_of(**options)).init)(start()))


def loop_by_hand(tx, work):
  """Parameters after the loop, and each step's loss and norm of the gradient."""

  @jax.value_and_grad
  def gradient(params, windows):
    logits = model.apply(ARCH, params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

  @jax.jit
  def step(params, state, windows):
    loss, grads = gradient(params, windows)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss, optax.tree.norm(grads)

  params, state, log = start(), jax.jit(tx.init)(start()), []
  for s in range(work.steps):
    params, state, *numbers = step(params, state, work.windows[s, : work.batch_size])
    log.append([float(number) for number in numbers])
  return params, *np.transpose(log)


@functools.cache
def adamw_loop_by_hand(**options):
  work = work_of(**options)
  return loop_by_hand(adamw_by_hand(work), work)


def adamw_by_hand(work):
  decayed = {
    "backbone": {
      "embedding": True, "final_norm": False,
      "blocks": {"attention_norm": False, "mlp_norm": False} | {
        name: {"kernel": True} for name in ("query", "key", "value", "attention_out", "gate", "up", "down")
      },
    },
    "key_layers": {},
  }
  return optax.chain(
    optax.clip_by_global_norm(float(work.clip_norm)),
    optax.adamw(lambda count: jnp.asarray(RATES)[count], b1=0.8, b2=0.9, eps=1e-3,
                weight_decay=float(work.weight_decay), mask=decayed),
  )


def test_train_node_is_adamw_with_clipping(rounds):
  work = work_of()
  expected, losses, norms = adamw_loop_by_hand()
  assert max(norms) > work.clip_norm, "the clip matters"
  trained = train(start(), fresh(), work)
  rounds.assert_trees_close(trained.params, expected, atol=1e-5)
  np.testing.assert_allclose(trained.losses, losses, atol=1e-5)
  assert trained.losses.dtype == jnp.float32 and trained.steps == S


def test_train_node_with_sgd_and_no_clip(rounds):
  work = work_of(weight_decay=7.0, clip_norm=math.inf)  # SGD knows no weight decay
  expected, losses, _ = loop_by_hand(optax.sgd(lambda count: jnp.asarray(RATES)[count]), work)
  trained = train(start(), fresh(name="sgd"), work, name="sgd")
  rounds.assert_trees_close(trained.params, expected, atol=1e-5)
  np.testing.assert_allclose(trained.losses, losses, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_gradients_of_microbatches_add_up_to_that_of_the_batch(rounds, batch_size):
  work = work_of(batch_size=batch_size)
  whole = train(start(), fresh(), work)
  parts = train(start(), fresh(), work, microbatch_size=2)
  rounds.assert_trees_close(parts.params, whole.params, atol=1e-5)
  np.testing.assert_allclose(parts.losses, whole.losses, atol=1e-5)


def test_places_beyond_the_steps_and_the_batch_size_are_ignored(rounds):
  work = work_of(steps=3)
  trained = train(start(), fresh(), work)
  assert trained.steps == 3
  np.testing.assert_array_equal(np.isnan(trained.losses), [False] * 3 + [True] * 2)
  other = np.array(work_of(seed=1).windows)
  other[:3, :3] = work.windows[:3, :3]
  rates = np.where(np.arange(S) < 3, RATES, np.nan).astype(np.float32)
  again = train(start(), fresh(), work._replace(windows=other, learning_rates=rates))
  rounds.assert_trees_close(again.params, trained.params, atol=0)
  np.testing.assert_allclose(trained.losses[:3], adamw_loop_by_hand()[1][:3], atol=1e-5)


def test_without_steps_everything_stays(rounds):
  state = train(start(), fresh(), work_of()).opt_state
  for moments in ("keep", "reset"):
    trained = train(start(), state, work_of(steps=0), moments=moments)
    rounds.assert_trees_close(trained.params, start(), atol=0)
    rounds.assert_trees_close(trained.opt_state, state, atol=0)
    assert trained.steps == 0 and np.all(np.isnan(trained.losses))


def test_kept_moments_continue_and_reset_ones_begin_anew(rounds):
  whole = train(start(), fresh(), work_of())
  first = train(start(), fresh(), work_of(steps=2))
  rest = jax.tree.map(lambda leaf: np.roll(leaf, -2, axis=0), work_of()[:2])
  second = work_of(steps=3)._replace(windows=rest[0], learning_rates=rest[1])
  kept = train(first.params, first.opt_state, second)
  rounds.assert_trees_close((kept.params, kept.opt_state), (whole.params, whole.opt_state), atol=1e-6)
  anew = train(first.params, first.opt_state, second, moments="reset")
  expected = train(first.params, fresh(), second)
  rounds.assert_trees_close((anew.params, anew.opt_state), (expected.params, expected.opt_state), atol=1e-6)
  assert np.abs(anew.params["backbone"]["embedding"] - kept.params["backbone"]["embedding"]).max() > 1e-3


def test_training_stops_before_a_loss_that_is_not_finite(rounds):
  good = train(start(), fresh(), work_of(steps=2))
  work = work_of()
  windows = np.array(work.windows)
  windows[2, 0, -1] = VOCAB  # no such token: its loss is nan
  trained = train(start(), fresh(), work._replace(windows=windows))
  assert trained.steps == 2
  np.testing.assert_array_equal(np.isfinite(trained.losses), [True, True, False, False, False])
  rounds.assert_trees_close(trained.params, good.params, atol=0)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.opt_state))


def test_training_stops_before_a_gradient_that_is_not_finite(rounds, monkeypatch):
  loss_sum = model.loss_sum

  def with_steep_corner(arch, params, windows, rows):  # adds 0, with an infinite slope
    return loss_sum(arch, params, windows, rows) + jnp.sqrt(0 * jnp.sum(params["backbone"]["final_norm"]))

  monkeypatch.setattr(model, "loss_sum", with_steep_corner)
  trained = jax.jit(functools.partial(local.train_node, ARCH, config_of(name="sgd")))(
    start(), fresh(name="sgd"), work_of()
  )
  assert trained.steps == 0
  np.testing.assert_array_equal(np.isfinite(trained.losses), [True, False, False, False, False])
  rounds.assert_trees_close(trained.params, start(), atol=0)


def test_norms_have_no_weight_decay():
  nothing = jax.tree.map(jnp.zeros_like, start())
  tx = local.optimizer(config_of(), 1.0, 0.3)
  updates, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(nothing, start())
  for (path, update), leaf in zip(
    jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(start()), strict=True
  ):
    name = jax.tree_util.keystr(path)
    expected = 0 * leaf if "_norm" in name else 0.3 * leaf
    np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("devices", [2, 4])
def test_nodes_side_by_side_train_as_each_alone(rounds, devices):
  """Two on each device, and one on each."""
  short = work_of(2, steps=3, batch_size=1, clip_norm=0.1)
  works = [work_of(0), work_of(1, steps=0), short, work_of(3, batch_size=4)]
  stack = lambda *leaves: np.stack(leaves)
  stacked = lambda tree: jax.tree.map(lambda leaf: np.stack([leaf] * 4), tree)
  mesh = partition.make_mesh(jax.devices()[:devices])
  together = jax.jit(functools.partial(local.train_nodes, ARCH, config_of(), mesh))(
    stacked(start()), stacked(fresh()), jax.tree.map(stack, *works)
  )
  for n, work in enumerate(works):
    alone = train(start(), fresh(), work)
    rounds.assert_trees_close(jax.tree.map(lambda leaf, n=n: leaf[n], together), alone, atol=1e-5)


# Learning rates.


def rates_of(schedule, total, warmup=3, peak=0.7):
  settings = NodeSettings(learning_rate=peak, warmup_steps=warmup, lr_schedule=schedule)
  return local.learning_rates(settings, total)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize(("total", "warmup"), [(0, 3), (1, 0), (1, 3), (2, 2), (23, 0), (23, 3)])
def test_rates_warm_up_linearly_and_never_rise_again(schedule, total, warmup):
  rates = rates_of(schedule, total, warmup)
  assert rates.shape == (total,) and rates.dtype == np.float32
  ramp = min(warmup, total)
  np.testing.assert_allclose(rates[:ramp], 0.7 * (np.arange(ramp) + 1) / max(1, ramp), rtol=1e-6)
  assert np.all(np.diff(rates[max(0, ramp - 1) :]) <= 1e-7)
  assert np.all((rates >= 0) & (rates <= 0.7 * (1 + 1e-6)))


def test_constant_rates_stay():
  np.testing.assert_allclose(rates_of("constant", 23)[2:], np.full(21, 0.7), rtol=1e-6)


def test_cosine_rates_fall_to_a_tenth():
  rates = rates_of("cosine", 23)
  done = np.arange(20) / 20  # of what comes after 3 steps of warm-up
  np.testing.assert_allclose(rates[3:], 0.7 * (0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2), rtol=1e-5)
  np.testing.assert_allclose(rates_of("cosine", 2003)[-1], 0.07, rtol=1e-4)


def test_wsd_rates_stay_and_fall_over_the_last_fifth():
  rates = rates_of("wsd", 23)  # 3 of warm-up, 20 beyond, 4 of which fall; none is wasted at rate 0
  np.testing.assert_allclose(rates[2:20], np.full(18, 0.7), rtol=1e-6)
  np.testing.assert_allclose(rates[20:] / 0.7, [0.75, 0.5, 0.25], atol=1e-6)


def test_padding_counts_neither_in_the_mean_nor_as_tokens():
  """A window cut short by padding trains like the shorter window, beside a full one."""
  work = work_of(steps=2, batch_size=2)
  cut = work.windows.copy()
  cut[:, 1, 4:] = -1
  trained = train(start(), fresh(), work._replace(windows=cut))
  assert trained.tokens == 2 * (7 + 3)
  loss = jax.jit(model.loss_sum, static_argnums=0)
  separate = [loss(ARCH, start(), cut[0, :1], np.ones(1, bool)), loss(ARCH, start(), cut[0, 1:2, :4], np.ones(1, bool))]
  np.testing.assert_allclose(trained.losses[0], sum(separate) / 10, rtol=1e-5)
  assert train(start(), fresh(), work).tokens == 2 * 2 * 7
  micro = train(start(), fresh(microbatch_size=1), work._replace(windows=cut), microbatch_size=1)
  np.testing.assert_allclose(micro.losses, trained.losses, rtol=1e-5)
