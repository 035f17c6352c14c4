"""Fingerprints of what runs must have in common to be compared: initial parameters, batches, evaluation."""

import hashlib
from collections.abc import Mapping

import jax
import numpy as np

from worldlm_jax import model
from worldlm_jax.data.batches import NodeText
from worldlm_jax.data.windows import PADDING


def initial_parameters(params: model.Params) -> str:
  """16 hex digits of a model's parameters, however its blocks are split into backbone and key layers."""
  params = jax.device_get(params)
  backbone = dict(params["backbone"])
  blocks = [stack for stack in (backbone.pop("blocks"), params["key_layers"]) if stack]
  whole = backbone | {"blocks": jax.tree.map(lambda *leaves: np.concatenate(leaves), *blocks)}
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
    digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()[:16]


def windows(windows: np.ndarray) -> int:
  """A number that depends on which windows `[..., W]` there are, but not on their order; sums to that of the union.

  Windows of padding alone do not count.
  """
  rows = windows.reshape(-1, windows.shape[-1])
  rows = rows[np.any(rows != PADDING, axis=1)]
  return sum(int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest()) for row in rows) % 2**64


def evaluation(texts: Mapping[str, NodeText], test_windows: int) -> dict[str, str]:
  """By node, what it is scored on: 16 hex digits of its text and of how many windows are taken."""
  return {
    path: hashlib.sha256(f"{text.digest} {test_windows}".encode()).hexdigest()[:16] for path, text in texts.items()
  }
