#!/usr/bin/env bash
# Trains a small federation on this computer, from nothing: bash launch/quickstart.sh [--config.rounds=3 ...]
#
# Ends with a report, a page to open in a browser. Running it again goes on where it stopped. Environment:
#   WORKDIR=  where the run is written (default: runs/quickstart in the repository)
#   PYTHON=   see setup.sh
workdir=${WORKDIR:-runs/quickstart}
if [[ ${WORKDIR:-/} != /* ]]; then workdir=$PWD/$WORKDIR; fi  # set-up changes the current directory

source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
if [[ " $* " == *" --workdir"* ]]; then fail "the quick start's folder is set by WORKDIR=, not by --workdir"; fi

set_up report
$python -m worldlm_jax.main --config=configs/quickstart.py --workdir="$workdir" "$@"
echo "$(cd -- "$workdir" && pwd): $(ls -- "$workdir" | paste -sd ' ' -)"
$python -m worldlm_jax.report --workdir="$workdir"
