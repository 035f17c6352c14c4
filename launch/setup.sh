# Sourced by the other scripts: goes to the root of the repository and defines `set_up [extra]`.
#
# set_up makes .venv where there is none and installs the exact versions of requirements.lock into it
# where something has changed, and sets `python` to its interpreter. Environment:
#   PYTHON=  the interpreter that .venv is made with (default: python3.11, else a python3 of at least 3.11)

set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
# While this file is there, a set-up was cut short; what it left is thrown away by the next.
unfinished=.venv/unfinished
installed=.venv/installed

# fail what [remedy]
fail() {
  printf 'error: %s\n' "$1" >&2
  if [[ ${2:-} ]]; then printf '  %s\n' "$2" >&2; fi
  exit 1
}

# "3.11.7 in /where/it/is/installed", or nothing if $1 does not run (a pyenv shim exists for versions that do not).
describe() {
  "$1" -c 'import sys; print(sys.version.split()[0], "in", sys.base_prefix)' 2>/dev/null || true
}

new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints the interpreter to make .venv with.
choose_python() {
  local candidate candidates=(python3.11 python3) tried=()
  if [[ ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
    tried+=("$candidate is $(describe "$candidate" | grep . || echo 'not there or does not run')")
  done
  fail "no Python of at least 3.11: $(IFS=,; echo "${tried[*]}")" \
    "install Python 3.11, or name one: PYTHON=/path/to/python3.11 bash $0"
}

check_venv() {
  local found wanted
  found=$(describe $python)
  [[ $found ]] && $python -m pip --version >/dev/null 2>&1 ||
    fail "$PWD/.venv is broken: its python or pip does not run" "remove it and run this again: rm -rf $PWD/.venv"
  new_enough $python ||
    fail "$PWD/.venv has Python $found, but at least 3.11 is needed" "remove it and run this again: rm -rf $PWD/.venv"
  if [[ ${PYTHON:-} ]]; then
    wanted=$(describe "$PYTHON")
    [[ $found == "$wanted" ]] ||
      fail "$PWD/.venv was made with Python $found, but PYTHON=$PYTHON is ${wanted:-not there or does not run}" \
        "remove .venv and run this again (rm -rf $PWD/.venv), or leave PYTHON unset"
  fi
}

make_venv() {
  local chosen
  chosen=$(choose_python)
  echo "set-up: making .venv with Python $(describe "$chosen")"
  mkdir -p .venv
  touch $unfinished
  find .venv/ -mindepth 1 ! -path $unfinished -delete
  "$chosen" -m venv .venv >&2 ||
    fail "$chosen cannot make a virtual environment (above)" \
      "install what it asks for (on Debian and Ubuntu: the python3-venv package), or name another with PYTHON="
}

set_up() {
  local extra=${1:-} state log
  if [[ ! -e .venv || -e $unfinished ]]; then make_venv; else check_venv; fi
  # The path is in it because the installation points at this folder.
  state=$({ pwd; cat pyproject.toml requirements.lock; } | cksum)
  if grep -qsxF "$state $extra" $installed; then return; fi

  log=$(mktemp)
  touch $unfinished
  rm -f $installed
  echo "set-up: installing the versions of requirements.lock${extra:+ with extra $extra} (a minute or two the first time)"
  if ! $python -m pip install --disable-pip-version-check -c requirements.lock -e ".${extra:+[$extra]}" &>"$log"; then
    rm -f $unfinished  # pip takes back what it has begun
    cat "$log" >&2
    fail "pip failed (above); running this again goes on from here; its output is in $log"
  fi
  # The extra is on top of the rest, so that the quick start has what it needs after the tests.
  printf '%s\n' "$state " "$state $extra" >$installed
  if [[ $extra == dev ]]; then printf '%s\n' "$state data" "$state report" >>$installed; fi
  rm -f $unfinished "$log"
}

# What XLA compiled is kept from one run to the next; results are the same bits.
export JAX_COMPILATION_CACHE_DIR=$PWD/.venv/jax_cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
