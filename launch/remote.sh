# shellcheck shell=bash
# Sourced by tpu_vm.sh, gpu.sh and slurm.sh, after which it sources setup.sh: their flags, dry runs, and the archive
# of the repository that travels to other machines.

source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

dry_run=
archive=build/worldlm_jax.tar.gz
arguments=()  # what is no flag of the script, for worldlm_jax.main

# bad_input what [remedy]: as worldlm_jax.main does, with its exit code.
bad_input() {
  printf 'error: %s\n' "$1" >&2
  if [[ ${2:-} ]]; then printf '  %s\n' "$2" >&2; fi
  exit 2
}

# parse "names with a value" "names of switches" "$@": --gpus-per-node=8 sets gpus_per_node, a switch is set to yes.
parse() {
  local valued=" $1 " switches=" $2 dry_run " flag key
  shift 2
  for flag; do
    key=${flag#--}
    key=${key%%=*}
    key=${key//-/_}
    if [[ $flag == --*=* && $valued == *" $key "* ]]; then
      printf -v "$key" %s "${flag#*=}"
    elif [[ $flag == --* && $flag != *=* && $switches == *" $key "* ]]; then
      printf -v "$key" %s yes
    elif [[ $flag == --* && $valued == *" $key "* ]]; then
      bad_input "$flag has no value" "write $flag=VALUE"
    else
      arguments+=("$flag")
    fi
  done
}

# need prefix flag [...]: each has a value. With a prefix, an environment variable of that beginning gives it as well.
need() {
  local prefix=$1 flag key missing=''
  shift
  for flag; do
    key=${flag//-/_}
    if [[ ! ${!key} ]]; then
      missing+="${missing:+, }--$flag${prefix:+ ($(tr '[:lower:]' '[:upper:]' <<<"$prefix$key"))}"
    fi
  done
  if [[ $missing ]]; then bad_input "missing: $missing" "give each as --FLAG=VALUE; the head of $0 says what they are"; fi
}

# Without a config and a folder there is nothing to train.
need_training() {
  local all=" ${arguments[*]-} "
  if [[ $all != *" --config="* ]]; then bad_input "missing: --config" "name an experiment: --config=configs/FILE.py"; fi
  if [[ $all != *" --workdir="* ]]; then bad_input "missing: --workdir" "name the run's folder: --workdir=DIR"; fi
}

need_no_arguments() {
  if [[ ${arguments[*]-} ]]; then bad_input "unknown arguments: ${arguments[*]}" "see the head of $0"; fi
}

# The arguments in one line, as a shell reads them.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# Runs a command, or prints it.
perform() {
  if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# Packs the working tree, with what is not committed, and the history that tells the commit; no texts, no runs.
pack() {
  perform mkdir -p build
  perform tar -czf "$archive" --exclude=./.venv --exclude=./build --exclude=./data --exclude=./runs \
    --exclude='.*_cache' --exclude=__pycache__ .
}

# How a machine to which the archive was copied, into its home folder, unpacks and installs it.
# unpacking folder extra
unpacking() {
  echo "mkdir -p $(quoted "$1") && tar -xzf ${archive##*/} -C $(quoted "$1") &&" \
    "bash $(quoted "$1/launch/worker.sh") install $(quoted "$2")"
}
