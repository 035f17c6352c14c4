#!/usr/bin/env bash
# Trains on the GPUs of one machine, all of them in one process, or on those of several machines:
#
#   bash launch/gpu.sh --config=configs/folder.py --workdir=runs/mine [...]
#
#   bash launch/gpu.sh install --hosts=a,b,c
#   bash launch/gpu.sh --hosts=a,b,c --config=configs/folder.py --workdir=/shared/runs/mine [...]
#   bash launch/gpu.sh stop --hosts=a,b,c
#
# Several machines are reached by ssh without a password (--hosts=me@a,me@b); `install` copies the repository to each,
# into --dir (worldlm_jax in the home folder), and installs the locked versions with JAX for CUDA. Where all share that
# folder, installing on one is enough. The work directory and the texts have to lie where all machines see them, and
# all reach the first at --port (8476). A run goes on when the connection is lost: the same command again follows it.
#
#   --cuda=cuda12   or cuda13 (by the machine's driver): which JAX is installed
#   --dry-run       prints the commands instead
#
# Everything else goes to worldlm_jax.main. Relative paths start from the root of the repository. Exit codes are those of
# worldlm_jax.main; 75: interrupted with everything saved, run the same command again. Environment: PYTHON=, see setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/remote.sh"

hosts='' dir=worldlm_jax port=8476 cuda=cuda12
action=run
case ${1:-} in
  install | run | stop)
    action=$1
    shift
    ;;
esac
parse "hosts dir port cuda" "" "$@"
if [[ $cuda != cuda12 && $cuda != cuda13 ]]; then bad_input "--cuda=$cuda: expected cuda12 or cuda13"; fi
if [[ $action == run ]]; then need_training; else need_no_arguments; fi

if [[ ! $hosts ]]; then
  case $action in
    stop) bad_input "missing: --hosts" "on one machine Ctrl-C ends the run so that it saves everything" ;;
    install) perform bash launch/worker.sh install "$cuda" ;;
    run)
      perform bash launch/worker.sh install "$cuda"
      perform "$python" -m worldlm_jax.main "${arguments[@]}"
      ;;
  esac
  exit
fi
IFS=, read -r -a machines <<<"$hosts"
worker=$(quoted "$dir/launch/worker.sh")
options=(-o BatchMode=yes -o ServerAliveInterval=20)  # a machine that is gone is noticed after a minute

install() {
  local host
  pack
  for host in "${machines[@]}"; do
    perform scp "${options[@]}" "$archive" "$host:"
    perform ssh "${options[@]}" "$host" "$(unpacking "$dir" "$cuda")"
  done
}

# Returns the exit code that says most: of bad input or an error before that of an interruption or a lost machine.
train() {
  local i code command codes=' ' started=()
  for i in "${!machines[@]}"; do
    command="bash $worker run $python -m worldlm_jax.main --coordinator=${machines[0]#*@}:$port"
    command+=" --num_processes=${#machines[@]} --process_id=$i $(quoted "${arguments[@]}")"
    if [[ $dry_run ]]; then
      perform ssh "${options[@]}" "${machines[i]}" "$command"
    else
      # shellcheck disable=SC2029
      ssh "${options[@]}" "${machines[i]}" "$command" </dev/null &
      started+=($!)
    fi
  done
  if [[ $dry_run ]]; then return; fi
  for i in "${started[@]}"; do
    code=0
    wait "$i" || code=$?
    codes+="$code "
  done
  for code in 2 1 75 $codes; do
    if [[ $code != 0 && $codes == *" $code "* ]]; then return "$code"; fi
  done
}

case $action in
  install) install ;;
  run) train ;;
  stop) for host in "${machines[@]}"; do perform ssh "${options[@]}" "$host" "bash $worker stop"; done ;;
esac
