#!/usr/bin/env bash
# Prepares the text of The Pile or mC4 for training: bash launch/prepare.sh --corpus=pile --out=data/pile [...]
#
# Running it again goes on where it stopped. Relative paths start from the root of the repository; all flags are
# in worldlm_jax/prepare.py. Environment: PYTHON=, see setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

set_up data
$python -m worldlm_jax.prepare "$@"
