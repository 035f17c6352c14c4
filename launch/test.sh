#!/usr/bin/env bash
# Lints, checks the types and runs the tests: bash launch/test.sh [pytest's arguments]
#
# The fast tests alone: bash launch/test.sh -m 'not slow'. Environment: PYTHON=, see setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

set_up dev
echo "ruff check"
$python -m ruff check
echo "mypy"
$python -m mypy
echo "pytest"
# What XLA compiled is kept from one run of the tests to the next; results are the same bits.
export JAX_COMPILATION_CACHE_DIR=$PWD/.venv/jax_cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
$python -m pytest "$@"
