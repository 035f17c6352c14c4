"""Every random draw comes from (seed, node path, round, purpose) and from nothing else.

The folding hash is SHA-256, so that no draw depends on the order of the nodes, on the number of
devices or on Python's salted `hash`.
"""

import hashlib

import jax


def stable_int(*parts: str | int) -> int:
  """A 31-bit integer that depends on `parts` alone, equal on every machine and in every process."""
  text = "\x1f".join(f"{'str' if isinstance(part, str) else 'int'}:{part}" for part in parts)
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def key(seed: int, *parts: str | int) -> jax.Array:
  """A typed PRNG key (scalar) for the draw that `parts` names, such as `key(0, "init")`."""
  return jax.random.fold_in(jax.random.key(seed), stable_int(*parts))
