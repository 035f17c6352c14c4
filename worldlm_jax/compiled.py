"""Where compiled programs are kept from one command to the next."""

import os

import jax

from worldlm_jax.data import cache

LEAST_SECONDS_TO_KEEP = 0.2  # that compiling takes, for a program to be worth a file


def keep() -> None:
  """Has JAX keep compiled programs in the user's cache folder, for the next run; its own variables come first."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(cache.user_folder() / "compiled"))
  if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS_TO_KEEP)
