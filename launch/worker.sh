#!/usr/bin/env bash
# What tpu_vm.sh and gpu.sh run on every machine, in its copy of the repository:
#
#   bash launch/worker.sh install EXTRA          .venv with an extra of pyproject.toml: tpu, cuda12 or cuda13
#   bash launch/worker.sh mount SHARED FOLDER    HOST:/EXPORT (NFS) or gs://BUCKET (gcsfuse), unless it is there
#   bash launch/worker.sh run COMMAND [...]      until it ends, with its exit code
#   bash launch/worker.sh status | stop          what `run` runs; stop it so that it saves everything
#
# `run` starts the command apart from the connection and follows its output; where the same command is still running,
# it only follows. A lost connection therefore ends nothing, and nothing is started twice by a client that repeats its
# command after one, as gcloud does. Environment: PYTHON=, see setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

place=.venv/worker/$(hostname)  # machines may share the repository

# Images of TPU VMs have an older Python, or one without the package that makes environments.
install_python() {
  local packages=(python3.11 python3.11-venv) found=python3.11
  if ! new_enough python3.11 && new_enough python3; then packages=(python3-venv) found=python3; fi
  if [[ ${PYTHON:-} ]] || "$found" -c 'import ensurepip' 2>/dev/null; then return; fi
  sudo apt-get -o DPkg::Lock::Timeout=600 update
  sudo apt-get -o DPkg::Lock::Timeout=600 install -y "${packages[@]}"
}

mount_shared() {
  local shared=$1 folder=$2
  if mountpoint -q "$folder"; then return; fi
  sudo mkdir -p "$folder"
  if [[ $shared == gs://* ]]; then
    command -v gcsfuse >/dev/null ||
      fail "SHARED=$shared: gcsfuse is not installed on $(hostname)" "install it by --prepare='...', or use a Filestore"
    sudo chown "$(id -u):$(id -g)" "$folder"
    # Checkpoints are completed by renaming their folder.
    gcsfuse --implicit-dirs --rename-dir-limit=1000000 "${shared#gs://}" "$folder"
  else
    command -v mount.nfs >/dev/null || sudo apt-get -o DPkg::Lock::Timeout=600 install -y nfs-common
    sudo mount -t nfs -o hard "$shared" "$folder"
    sudo chmod a+rwx "$folder"  # a new Filestore is root's alone
  fi
}

# Whether a command still runs: it and its children hold the lock, which goes when they go, whatever ends them.
running() {
  [[ -e $place/lock ]] && ! flock -n "$place/lock" true
}

run() {
  local wanted pid
  [[ -x $python ]] || fail "$PWD/.venv is not there: this machine is not installed" "install first"
  wanted=$(printf '%q ' "$@")
  mkdir -p "$place"
  exec 9>>"$place/lock"
  if flock -n 9; then
    if [[ -e $place/log ]]; then mv "$place/log" "$place/log.before"; fi
    rm -f "$place/exit_code"
    : >"$place/log"  # there is something to follow before the command has begun
    printf '%s\n' "$wanted" >"$place/command"
    # shellcheck disable=SC2016
    # With a trap, a signal to the whole group leaves the shell there to note the command's exit code.
    PYTHONUNBUFFERED=1 setsid bash -c 'trap : TERM; "$@"; echo $? >"$0/exit_code"' "$place" "$@" \
      </dev/null >"$place/log" 2>&1 &
    echo $! >"$place/pid"
  elif [[ $(cat "$place/command") != "$wanted" ]]; then
    printf 'error: on %s something else is running: %s\n  stop it first\n' "$(hostname)" "$(cat "$place/command")" >&2
    exit 2
  fi
  exec 9>&-
  pid=$(cat "$place/pid")
  tail -n +1 -f --pid="$pid" "$place/log"
  exit "$(cat "$place/exit_code" 2>/dev/null || echo 137)"  # nothing noted: killed, or the machine was restarted
}

status() {
  local now=idle
  if running; then
    now=running
  elif [[ -e $place/exit_code ]]; then
    now="ended with exit code $(cat "$place/exit_code")"
  fi
  echo "$(hostname): $now$(tail -n 1 "$place/log" 2>/dev/null | sed 's/^/: /')"
}

stop() {
  if running; then kill -TERM -- "-$(cat "$place/pid")"; fi
}

action=${1:-}
shift || true
case $action in
  install)
    if [[ $1 == tpu && ! -e .venv ]]; then install_python; fi
    set_up "$1"
    ;;
  mount) mount_shared "$@" ;;
  run) run "$@" ;;
  status) status ;;
  stop) stop ;;
  *) fail "worker.sh ${action:-without an action}: expected install, mount, run, status or stop" ;;
esac
