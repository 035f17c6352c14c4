"""Bytes of memory per device: what nodes hold, and what training, scoring and exchanging take beside it.

How much is held is read off abstract shapes, and what differentiation saves for the backward pass off a traced block.
What XLA needs beyond that is a handful of terms, which `tests/plan_test.py` holds against its own analysis of compiled
programs:

  wave = parameters + moments + update + batches             of the nodes that train side by side
  training = wave + max(loss, backward, step)
    loss     = P0 + C + A + saved + 2 logits + 1 or 2 heads   the second head where logits are made in chunks
    backward = P0 + C + A + saved + G + workspace
    step     = P0 + 3 P

P parameters; P0 = P, those that training began from, where updates are tracked; G = P gradients; A = P where they add
up over microbatches; C what products are made of: the blocks in the layout that CPUs want, elsewhere all parameters in
the compute dtype. Without remat `saved` has every block's arrays, with remat every block's input. The workspace is
twice the largest array of a block, two of its input, and all arrays of the one block that the loop has at hand.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from worldlm_jax import local, model, partition, state as state_lib, trees
from worldlm_jax.config import OptimizerConfig
from worldlm_jax.model import transformer

SAFE = 0.9  # share of a device's memory that a plan fills; the rest is the runtime's, and fragments


class Training(NamedTuple):
  """Bytes per device at the moment of a wave's training at which they are most."""

  wave: float  # parameters, moments, update and batches of the nodes that train
  copies: float  # of the parameters: those that training began from, and those that products are made of
  gradients: float
  activations: float  # saved for the backward pass
  workspace: float  # one chunk of logits and its gradient, or one block's backward pass
  optimizer: float  # new parameters and moments beside the old

  @property
  def temporary(self) -> float:
    """All but what the nodes hold anyway."""
    return self.total - self.wave

  @property
  def total(self) -> float:
    """The sum."""
    return float(sum(self))


class Block(NamedTuple):
  """Bytes that one block saves for its backward pass, for all windows of a microbatch."""

  arrays: tuple[int, ...]
  carry: int  # its input

  @property
  def total(self) -> int:
    """Of all its arrays."""
    return sum(self.arrays)


@functools.cache
def block(arch: model.Architecture, windows: int, length: int, platform: str) -> Block:
  """What one block saves for the backward pass, read off the traced gradient of two.

  Args:
    arch: the architecture.
    windows: in one microbatch.
    length: predicted tokens of a window.
    platform: of the devices; XLA computes bfloat16 in float32 on CPUs.
  """
  dtype = "float32" if platform == "cpu" else arch.compute_dtype
  two = dataclasses.replace(arch, num_layers=2, num_key_layers=0, vocab_size=8, remat="none", compute_dtype=dtype)

  def loss(params: model.Params, windows_BxW: jax.Array) -> jax.Array:
    return model.loss_sum(two, params, windows_BxW, jnp.ones(windows, bool))

  batch = jax.ShapeDtypeStruct((windows, length + 1), jnp.int32)
  traced = jax.make_jaxpr(jax.grad(loss))(model.abstract_params(two), batch)
  saved = next(found for found in map(_saved_by_scan, _equations(traced.jaxpr)) if found)
  return Block(tuple(saved), windows * length * arch.d_model * jnp.dtype(dtype).itemsize)


def training(
  arch: model.Architecture, optimizer: OptimizerConfig, shape: tuple[int, int, int], nodes: int,
  mesh: Any, platform: str, tracks: tuple[str, ...] = (),
) -> Training:
  """What training takes on each device.

  Args:
    arch: the architecture.
    optimizer: of the nodes.
    shape: S steps, B windows, W = T + 1 tokens of a workload.
    nodes: that train side by side on a device, or on the devices that share one node.
    mesh: the mesh.
    platform: of the devices.
    tracks: the parts of a model whose updates are kept.
  """
  steps, batch, width = shape
  micro = min(optimizer.microbatch_size or batch, batch)
  params = model.abstract_params(arch)
  head = {"embedding": params["backbone"]["embedding" if arch.tied_head else "head"]}
  own, moments, update, head_bytes, blocks = (device_bytes(tree, mesh) for tree in (
    params, jax.eval_shape(local.optimizer(optimizer).init, params), {part: params[part] for part in tracks}, head,
    [params["backbone"]["blocks"], params["key_layers"]],
  ))
  wave = own + moments + update + 4 * steps * batch * width
  begun_from = own if tracks else 0
  copies = begun_from + (blocks if platform == "cpu" else own * jnp.dtype(arch.compute_dtype).itemsize / 4)
  share = mesh.shape[partition.FSDP] * mesh.shape[partition.TENSOR]
  if share > 1:
    copies += gathered(arch)
  added_up = own if micro < batch else 0
  saved, workspace = (size / share for size in _activations(arch, micro, width - 1, platform))
  logits = logits_at_once(arch, micro * (width - 1))
  heads = head_bytes * (1 if logits == micro * (width - 1) * arch.vocab_size else 2)
  most = max(
    Training(wave, copies, added_up + heads, saved, 4 * logits / share + head_bytes, 0),
    Training(wave, copies, added_up + own, saved, workspace, 0),
    Training(wave, begun_from, own, 0, 0, 2 * own),
    key=lambda moment: moment.total,
  )
  return Training(*(nodes * part for part in most))


def _activations(arch: model.Architecture, windows: int, length: int, platform: str) -> tuple[float, float]:
  """What is saved for the backward pass, and what one block's takes beside it."""
  one = block(arch, windows, length, platform)
  segments = [count for count in (arch.num_layers - arch.num_key_layers, arch.num_key_layers) if count]
  backward = 2 * max(one.arrays) + 2 * one.carry
  # Of what a block saves, about half is there twice at the time (found by comparison with XLA's own analysis).
  # XLA unrolls a loop over a single block, whose arrays it then uses where they are; on CPUs it computes nothing twice
  # there, remat or not.
  if arch.remat == "none":
    return one.total * arch.num_layers, backward + (one.total / 2 if segments[-1] > 1 else 0)
  single = segments.count(1) if platform == "cpu" else 0
  return one.carry * arch.num_layers + one.total * single, backward + (0 if single else one.total / 2)


def scoring(
  arch: model.Architecture, windows: int, length: int, nodes: int, mesh: Any, platform: str, *, trusts: bool
) -> float:
  """What scoring takes on each device: the models in use and one forward pass of `windows` windows each.

  Where nodes are `trusts` between their parent's model and their own, those two are there as well.
  """
  params = model.abstract_params(arch)
  own = device_bytes(params, mesh)
  blocks = device_bytes([params["backbone"]["blocks"], params["key_layers"]], mesh)
  copies = blocks if platform == "cpu" else own * jnp.dtype(arch.compute_dtype).itemsize / 4
  share = mesh.shape[partition.FSDP] * mesh.shape[partition.TENSOR]
  one = block(arch, windows, length, platform)
  logits = 4 * logits_at_once(arch, windows * length)
  forward = max(copies + 1.25 * max(one.arrays) / share, logits / share) + 3 * one.carry / share
  return nodes * (own * (3 if trusts else 1) + forward)


def exchange(
  arch: model.Architecture, topologies: Sequence[state_lib.Topology], mesh: Any, *, tracks: bool, averages: bool
) -> float:
  """What the largest down- or up-phase takes on each device beside the state: a rough figure.

  Going down, the relevance of others compares whole models, and every node has the key layers that it attends to in
  one stack. Going up, members' differences from their federation stand beside its new model.

  Args:
    arch: the architecture.
    topologies: of all levels.
    mesh: the mesh.
    tracks: whether the algorithm looks at updates.
    averages: whether members' backbones are averaged.
  """
  params = model.abstract_params(arch)
  own, key_layers = device_bytes(params, mesh), device_bytes(params["key_layers"], mesh)
  places = [len(level.member) / mesh.shape[partition.NODE] for level in topologies]
  most = 0.0
  for level, topology in enumerate(topologies[1:], start=1):
    candidates = topology.siblings.shape[1] + 2  # siblings, parent and a residual layer
    down = places[level] * (2 * own + 1.5 * candidates * key_layers) if tracks else 0.0
    members = own + 2 * key_layers * tracks
    up = (places[level] * members + places[level - 1] * own) if averages else 0.0
    most = max(most, down, up)
  return most


def logits_at_once(arch: model.Architecture, tokens: int) -> int:
  """How many logits `model.loss_sum` holds at once."""
  chunks = min(tokens, -(-tokens * arch.vocab_size // transformer.CHUNK_LOGITS))
  return -(-tokens // max(1, chunks)) * arch.vocab_size


def gathered(arch: model.Architecture) -> float:
  """What lies whole on every device that shares a node: embedding, head and one block, in the compute dtype."""
  params = model.abstract_params(arch)
  backbone = params["backbone"]
  whole = trees.num_bytes({name: backbone[name] for name in ("embedding", "head") if name in backbone})
  blocks = trees.num_bytes([params["key_layers"], backbone["blocks"]])
  return (whole + blocks / arch.num_layers) * jnp.dtype(arch.compute_dtype).itemsize / 4


def device_bytes(tree: trees.PyTree, mesh: Any) -> float:
  """The bytes of one node's (abstract) leaves on each of the devices that share it."""
  size = mesh.shape[partition.NODE]
  stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), tree)
  return stacked_bytes(stacked, mesh)


def stacked_bytes(tree: trees.PyTree, mesh: Any) -> float:
  """The bytes per device of stacked nodes' (abstract) leaves `[N, ...]`."""
  sizes = jax.tree.map(
    lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
    tree, partition.shardings(tree, mesh),
  )
  return float(sum(jax.tree.leaves(sizes)))


def state_parts(levels: Any, mesh: Any) -> Mapping[str, float]:
  """Bytes per device of a (abstract) state, by field of `LevelState`; the small ones are in "books"."""
  names = {"params": "parameters", "opt_state": "moments"} | dict.fromkeys(("residuals", "received"), "residual layers")
  total: dict[str, float] = {}
  for level in levels:
    for field, value in level._asdict().items():
      name = "books" if isinstance(value, jax.ShapeDtypeStruct) else names.get(field, field)
      total[name] = total.get(name, 0.0) + stacked_bytes(value, mesh)
  return {name: size for name, size in total.items() if size}


def _equations(jaxpr: Any) -> Any:
  """All equations of a traced function, and those of the functions in it."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from _equations(inner)


def _saved_by_scan(equation: Any) -> list[int]:
  """The bytes, per iteration, of the arrays that a forward loop stacks; nothing for other equations."""
  if equation.primitive.name != "scan" or equation.params["reverse"]:
    return []
  stacked = equation.outvars[equation.params["num_carry"] :]
  return [math.prod(v.aval.shape[1:]) * v.aval.dtype.itemsize for v in stacked]
