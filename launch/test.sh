#!/usr/bin/env bash
# Lints, checks the types and runs the tests: bash launch/test.sh [pytest's arguments]
#
# The fast tests alone: bash launch/test.sh -m 'not slow'; those that show more cases of the same, which are left out
# otherwise: bash launch/test.sh -m exhaustive. Environment: PYTHON=, see setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

set_up dev
echo "ruff check"
$python -m ruff check
echo "mypy"
$python -m mypy
echo "pytest"
# A file stays with one worker, so that what its tests share is made once.
$python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
