"""Where compiled programs are kept."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from worldlm_jax import compiled

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def restored() -> Iterator[None]:
  before = {name: getattr(jax.config, name) for name in SETTINGS}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.usefixtures("restored")
def test_compiled_programs_are_kept_in_the_users_cache_unless_jax_is_told_otherwise(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  compiled.keep()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "worldlm_jax" / "compiled")
  assert jax.config.jax_persistent_cache_min_compile_time_secs == compiled.LEAST_SECONDS_TO_KEEP
  jax.config.update("jax_compilation_cache_dir", "mine")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
  compiled.keep()
  assert jax.config.jax_compilation_cache_dir == "mine"
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 7.0
