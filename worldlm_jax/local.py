"""Local training: every node of a level runs its own optimizer steps on its own batches.

One node trains in a loop of as many steps as it has (`train_node`); the nodes of a wave train side by
side, spread over the devices (`train_nodes`). A wave takes as long as its longest member, and a wave
of one node per device computes nothing in vain.

A step whose loss, gradient or length is not finite is not taken, and the node stops there, so that the last good
parameters can be saved and the step be named. Moments stay finite, and are not taken back.

Shapes: N nodes of a level, S steps, B windows per step, W tokens per window.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from worldlm_jax import model, partition, trees
from worldlm_jax.config import NodeSettings, OptimizerConfig
from worldlm_jax.privacy import examples as examples_lib


class Workload(NamedTuple):
  """What nodes are to train on; with a node axis `[N]` in front of every leaf once stacked."""

  windows: Any  # int32 [S, B, W]; places beyond a node's own steps and batch size are ignored
  learning_rates: Any  # float32 [S]
  steps: Any  # int32 scalar: how many of the S steps this node makes
  batch_size: Any  # int32 scalar: how many of the B windows count
  weight_decay: Any  # float32 scalar
  clip_norm: Any  # float32 scalar
  weight: Any  # float32 scalar: of the node in a mean by text, its training tokens


class Trained(NamedTuple):
  """What a node's training gives; with a node axis in front once stacked."""

  params: model.Params
  opt_state: trees.PyTree
  losses: jax.Array  # float32 [S]: nats per token of each step; nan where there was none
  steps: jax.Array  # int32 scalar: steps taken; fewer than asked for where a loss was not finite
  tokens: jax.Array  # int32 scalar: predicted in these steps


def learning_rates(settings: NodeSettings, total_steps: int) -> np.ndarray:
  """The rate of each of a node's own steps over the whole run: float32 `[total_steps]`.

  All schedules warm up linearly. "cosine" then falls to a tenth of the peak, "wsd" stays and falls
  linearly towards zero over the last fifth, "constant" stays. Computed once, before training.
  """
  peak, warmup = settings.learning_rate, min(settings.warmup_steps, total_steps)
  rest = max(1, total_steps - warmup)
  decay = max(1, rest // 5)
  after_warmup = {
    "constant": lambda: optax.constant_schedule(peak),
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=0.1),
    "wsd": lambda: optax.join_schedules(
      [optax.constant_schedule(peak), optax.linear_schedule(peak, 0.0, decay)], [rest - decay]
    ),
  }[settings.lr_schedule]()
  step = jnp.arange(total_steps)
  # The first step is taken at 1 / warmup of the peak, not at rate 0.
  rates = jnp.where(step < warmup, peak * (step + 1) / max(1, warmup), after_warmup(step - warmup))
  return np.asarray(rates, np.float32)


def optimizer(
  config: OptimizerConfig, clip_norm: Any = jnp.inf, weight_decay: Any = 0.0
) -> optax.GradientTransformation:
  """Clipping and AdamW (or plain SGD) up to the learning rate: its updates are multiplied by minus the rate."""
  clip = optax.clip_by_global_norm(clip_norm)
  if config.name == "sgd":
    return optax.chain(clip, optax.identity(), optax.identity())
  return optax.chain(
    clip,
    optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
    optax.add_decayed_weights(weight_decay, mask=_is_decayed),
  )


def train_node(
  arch: model.Architecture, config: OptimizerConfig, params: model.Params, opt_state: trees.PyTree, work: Workload,
  most_steps: jax.Array | None = None, examples: examples_lib.Examples | None = None,
) -> Trained:
  """Runs `work.steps` optimizer steps on one node. Pure; shapes as in `Workload`.

  The loop ends with the node's last step, unless `most_steps` (int32 scalar, at least `work.steps`) says how many times
  it runs: devices that work on one node together talk within the loop, in which all have to stay together. With
  `examples`, the gradient of each window is clipped by itself and the sum noised (DP-SGD).
  """
  tx = optimizer(config, work.clip_norm, work.weight_decay)
  if config.moments == "reset":
    opt_state = trees.where(work.steps > 0, tx.init(params), opt_state)
  begun_from = params
  max_steps, max_batch, _ = work.windows.shape
  micro = min(config.microbatch_size or max_batch, max_batch)
  assert max_batch % micro == 0, (max_batch, micro)

  def gradient(params: model.Params, windows_BxW: jax.Array) -> tuple[jax.Array, model.Params]:
    """Summed loss and its gradient over the batch, one microbatch after the other."""

    def part(first: Any, windows: jax.Array) -> tuple[jax.Array, model.Params]:
      rows_B = first + jnp.arange(windows.shape[0]) < work.batch_size
      if examples is not None:
        loss = functools.partial(model.loss_sum, arch)
        return examples_lib.clipped_gradients(loss, params, windows, rows_B, examples)
      return jax.value_and_grad(lambda p: model.loss_sum(arch, p, windows, rows_B))(params)

    def add(i: jax.Array, total: tuple[jax.Array, model.Params]) -> tuple[jax.Array, model.Params]:
      return trees.add(total, part(i * micro, jax.lax.dynamic_slice_in_dim(windows_BxW, i * micro, micro)))

    if micro == max_batch:
      return part(0, windows_BxW)
    count = work.batch_size if most_steps is None else max_batch
    return jax.lax.fori_loop(0, -(-count // micro), add, (jnp.float32(0), trees.zeros_like(params)))

  def step(carry: tuple) -> tuple:
    i, _, params, state, losses_S, tokens = carry
    loss, grads = gradient(params, work.windows[i])
    num_tokens = model.num_targets(work.windows[i], jnp.arange(max_batch) < work.batch_size)
    if examples is None:
      grads = jax.tree.map(lambda g: g / num_tokens, grads)
    else:  # of a sample of examples there may be none
      num_tokens = jnp.maximum(num_tokens, 1)
      grads = examples_lib.noised_mean(grads, num_tokens, examples, i)
    if config.proximal:  # T. Li et al., arXiv:1812.06127
      grads = jax.tree.map(lambda g, p, p0: g + config.proximal * (p - p0), grads, params, begun_from)
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
    # Nothing to choose between: where old moments may be wanted beside new ones, all of them are copied in each step.
    grads = trees.where(finite, grads, trees.zeros_like(grads))
    updates, state = tx.update(grads, state, params)
    updates = jax.tree.map(lambda u: -work.learning_rates[i] * u, updates)
    finite &= jnp.isfinite(optax.tree.norm(updates))
    params = optax.apply_updates(params, trees.where(finite, updates, trees.zeros_like(updates)))
    return i + finite, finite, params, state, losses_S.at[i].set(loss / num_tokens), tokens + finite * num_tokens

  losses_S = jnp.full(max_steps, jnp.nan, jnp.float32)
  carry = (jnp.int32(0), jnp.bool_(True), params, opt_state, losses_S, jnp.int32(0))

  def goes_on(carry: tuple) -> jax.Array:
    return (carry[0] < work.steps) & carry[1]

  if most_steps is None:
    carry = jax.lax.while_loop(goes_on, step, carry)
  else:
    carry = jax.lax.fori_loop(0, most_steps, lambda _, c: trees.where(goes_on(c), step(c), c), carry)
  steps, _, params, opt_state, losses_S, tokens = carry
  return Trained(params, opt_state, losses_S, steps, tokens)


def train_nodes(
  arch: model.Architecture, config: OptimizerConfig, mesh: jax.sharding.Mesh,
  params: model.Params, opt_state: trees.PyTree, work: Workload, examples: examples_lib.Examples | None = None,
) -> Trained:
  """Trains nodes side by side: leaves `[N, ...]`, N a multiple of the mesh's node axis.

  Every device trains its own share; the loop runs as long as the longest of it, or of all where a node is spread over
  devices; nodes with 0 steps come back as they were.
  """

  def train_share(
    params: model.Params, opt_state: trees.PyTree, work: Workload, examples: examples_lib.Examples | None
  ) -> Trained:
    most_steps = jax.lax.pmax(jnp.max(work.steps), partition.NODE) if partition.is_spread() else None

    def train(params: model.Params, opt_state: trees.PyTree, work: Workload, examples: Any) -> Trained:
      return train_node(arch, config, params, opt_state, work, most_steps, examples)

    if work.steps.shape[0] > 1:
      return jax.vmap(train)(params, opt_state, work, examples)
    # A single node is spared what vmap adds to a loop: a choice between the old and the new state at each step.
    return jax.tree.map(lambda leaf: leaf[None], train(*trees.take((params, opt_state, work, examples), 0)))

  return partition.per_device(train_share, mesh)(params, opt_state, work, examples)


def _is_decayed(params: model.Params) -> trees.PyTree:
  """Weight decay is for matrices; norms keep their scale."""
  return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)
