"""The members' mean and the server optimizers.

Three federations: 0 with members 0, 2 and 4, 1 with members 1 and 3, 2 with none.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from worldlm_jax import local, model, partition
from worldlm_jax.config import BackboneConfig, ModelConfig, OptimizerConfig
from worldlm_jax.exchange import backbone

P, C = 3, 5
PARENT = np.array([0, 1, 0, 1, 0])
WEIGHTS = np.array([3, 5, 0, 7, 11], np.float32)
SHAPES = {"embedding": (5, 2), "blocks": {"kernel": (2, 3, 7), "norm": ()}}

MESH = partition.make_mesh(jax.devices()[:1])


@jax.jit
def mean_difference(federations, members, parent, weights, own_weights):
  shares = backbone.shares(parent, weights, own_weights, len(own_weights))
  return backbone.mean_difference(federations, members, shares, MESH)


def draw(seed, count):
  rng = np.random.default_rng([seed, count])
  is_shape = lambda x: isinstance(x, tuple)
  return jax.tree.map(lambda shape: rng.normal(size=(count, *shape)).astype(np.float32), SHAPES, is_leaf=is_shape)


def expected_difference(federations, members, weights, own_weights):
  """The equation in float64, federation by federation."""

  def mean(leaf_P, leaf_C):
    result = np.zeros(leaf_P.shape)
    for p in range(P):
      mine = [c for c in range(C) if PARENT[c] == p and weights[c] > 0]
      total = sum(float(weights[c]) for c in mine) + float(own_weights[p])
      for c in mine:
        result[p] += weights[c] / total * (leaf_C[c].astype(np.float64) - leaf_P[p])
    return result

  return jax.tree.map(mean, federations, members)


def close(rounds, actual, expected, atol=1e-6):
  rounds.assert_trees_close(actual, expected, atol)


@pytest.mark.parametrize("own", [[0, 0, 0], [2, 13, 4]])
def test_the_mean_is_weighted_and_counts_the_federation_itself(rounds, own):
  federations, members, own = draw(1, P), draw(2, C), np.array(own, np.float32)
  found = mean_difference(federations, members, PARENT, WEIGHTS, own)
  close(rounds, found, expected_difference(federations, members, WEIGHTS, own))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))


def test_members_of_weight_zero_do_not_count_whatever_they_hold(rounds):
  federations, members, none = draw(1, P), draw(2, C), np.zeros(P, np.float32)
  clean = mean_difference(federations, members, PARENT, WEIGHTS, none)
  for poison in (np.nan, np.inf):
    factor = np.array([1, 1, poison, 1, 1], np.float32)
    poisoned = jax.tree.map(lambda leaf, f=factor: leaf * f.reshape(C, *[1] * (leaf.ndim - 1)), members)
    close(rounds, mean_difference(federations, poisoned, PARENT, WEIGHTS, none), clean, atol=0)


def test_a_federation_without_members_that_count_stays(rounds):
  federations, members = draw(1, P), draw(2, C)
  found = mean_difference(federations, members, PARENT, WEIGHTS * (PARENT == 0), np.array([0, 0, 3], np.float32))
  for leaf in jax.tree.leaves(found):
    np.testing.assert_array_equal(leaf[1:], np.zeros_like(leaf[1:]))
    assert np.all(leaf[0] != 0)


def test_identical_members_are_the_mean(rounds):
  """Law 1."""
  one = draw(3, 1)
  members = jax.tree.map(lambda leaf: np.repeat(leaf, C, axis=0), one)
  federations = draw(1, P)
  difference = mean_difference(federations, members, PARENT, WEIGHTS, np.zeros(P, np.float32))
  for p in (0, 1):
    arrived = jax.tree.map(lambda b, d, p=p: b[p] + d[p], federations, difference)
    close(rounds, arrived, jax.tree.map(lambda leaf: leaf[0], one))


def test_permuting_members_keeps_the_mean(rounds):
  """Law 2."""
  federations, members, own = draw(1, P), draw(2, C), np.array([2, 13, 4], np.float32)
  order = np.array([3, 0, 4, 2, 1])
  permuted = jax.tree.map(lambda leaf: leaf[order], members)
  close(rounds, mean_difference(federations, permuted, PARENT[order], WEIGHTS[order], own),
        mean_difference(federations, members, PARENT, WEIGHTS, own))


def test_sgd_at_rate_one_is_the_plain_weighted_mean(rounds):
  federations, members, own = draw(1, P), draw(2, C), np.zeros(P, np.float32)
  optimizer = backbone.server_optimizer(BackboneConfig())
  difference = mean_difference(federations, members, PARENT, WEIGHTS, own)
  found, _ = jax.jit(lambda b, d: backbone.apply_server_optimizer(optimizer, b, jax.vmap(optimizer.init)(b), d))(
    federations, difference
  )
  for p in (0, 1):
    mine = np.flatnonzero(p == PARENT)
    expected = jax.tree.map(lambda leaf, mine=mine: np.average(leaf[mine], axis=0, weights=WEIGHTS[mine]), members)
    close(rounds, jax.tree.map(lambda leaf, p=p: leaf[p], found), expected)
  for after, before in zip(jax.tree.leaves(found), jax.tree.leaves(federations), strict=True):
    np.testing.assert_array_equal(after[2], before[2])  # nobody there, nothing moved


@pytest.mark.parametrize(("name", "by_hand"), [
  ("sgd", lambda: optax.sgd(0.7)),
  ("nesterov", lambda: optax.sgd(0.7, momentum=0.6, nesterov=True)),
  ("adam", lambda: optax.adam(0.7, b1=0.6)),
])
def test_server_optimizers_are_optax_on_each_federation_by_itself(rounds, name, by_hand):
  config = BackboneConfig(server_optimizer=name, server_learning_rate=0.7, server_momentum=0.6)
  optimizer = backbone.server_optimizer(config)
  found = draw(1, P)
  state = jax.vmap(optimizer.init)(found)
  apply = jax.jit(lambda b, s, d: backbone.apply_server_optimizer(optimizer, b, s, d))
  differences = [draw(seed, P) for seed in (5, 6, 7)]
  for difference in differences:
    found, state = apply(found, state, difference)

  @jax.jit
  def hand(tree, *differences):
    tx = by_hand()
    own = tx.init(tree)
    for difference in differences:
      updates, own = tx.update(jax.tree.map(lambda d: -d, difference), own, tree)
      tree = optax.apply_updates(tree, updates)
    return tree

  for p in (0, 1):
    mine = [jax.tree.map(lambda leaf, p=p: leaf[p], tree) for tree in (draw(1, P), *differences)]
    close(rounds, jax.tree.map(lambda leaf, p=p: leaf[p], found), hand(*mine), atol=2e-6)


@functools.cache
def sgd_step():
  """One step of plain SGD on the first `batch_size` of 7 windows, and the parameters it begins from."""
  config = ModelConfig(num_layers=2, d_model=12, num_heads=3, num_kv_heads=1, d_ff=17, key_layer_share=0.0)
  arch, sgd = model.architecture(config, 11), OptimizerConfig(name="sgd")
  # Larger than those of `init`, so that every tensor's gradient counts.
  params = jax.device_get(jax.jit(model.init, static_argnums=0)(arch, jax.random.key(0)))
  params = jax.tree.map(lambda leaf: leaf if leaf.max() == 1 else 10 * leaf, params)
  train_node = jax.jit(functools.partial(local.train_node, arch, sgd))

  def train(windows_1xBxW, batch_size):
    rate, no_decay, no_clip = np.array([0.5], np.float32), np.float32(0), np.float32(np.inf)
    work = local.Workload(windows_1xBxW, rate, np.int32(1), batch_size, no_decay, no_clip, np.float32(1))
    return train_node(params, local.optimizer(sgd).init(params), work).params

  return train, params


@pytest.mark.parametrize("batches", [(2, 2, 2), (1, 3, 2)])
def test_one_sgd_step_each_averaged_is_one_step_on_the_joint_batch(rounds, batches):
  """Law 5, with tokens for weights where the batches are unequal."""
  train, params = sgd_step()
  windows = np.random.default_rng(4).integers(0, 11, (3, 1, 7, 8)).astype(np.int32)
  alone = [train(windows[n], np.int32(size)) for n, size in enumerate(batches)]
  joint = np.concatenate([windows[n, :, :size] for n, size in enumerate(batches)], axis=1)
  joint = np.pad(joint, [(0, 0), (0, 7 - sum(batches)), (0, 0)])
  together = train(joint, np.int32(sum(batches)))

  first = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
  weights = np.array(batches, np.float32) * 7  # tokens
  difference = mean_difference(first(params), stacked, np.zeros(3, np.int32), weights, np.zeros(1, np.float32))
  averaged, _ = backbone.apply_server_optimizer(
    backbone.server_optimizer(BackboneConfig()), first(params), (optax.EmptyState(),) * 2, difference
  )
  moved = jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), together, params))
  assert min(moved) > 1e-3, "every tensor takes part"
  close(rounds, jax.tree.map(lambda leaf: leaf[0], averaged), together, atol=1e-6)
