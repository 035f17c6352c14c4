#!/usr/bin/env bash
# Trains on a TPU VM slice, all its workers together:
#
#   export TPU_NAME=big TPU_ZONE=us-east5-a TPU_PROJECT=mine TPU_TYPE=v5p-128 TPU_VERSION=v2-alpha-tpuv5
#   export SHARED=10.0.0.2:/share
#   bash launch/tpu_vm.sh create --spot
#   bash launch/tpu_vm.sh install
#   bash launch/tpu_vm.sh run --keep --config=configs/folder.py --workdir=/mnt/shared/runs/big [...]
#   bash launch/tpu_vm.sh fetch --workdir=/mnt/shared/runs/big --to=runs/big
#   bash launch/tpu_vm.sh delete
#
#   create   the slice: on demand, with --spot one that may be preempted, with --queued as a queued resource
#   install  copies the repository to every worker, mounts SHARED, installs the locked versions with JAX for TPUs
#   run      trains; all arguments that are not named here go to worldlm_jax.main. It goes on when the connection is
#            lost: the same command again follows it. --keep: resumes it until it is finished
#   resume   the same with the arguments of `run`, after making and installing the slice again where it was preempted
#   stop     asks the run to save everything and to end
#   fetch    the results to --to=DIR on this machine; with --checkpoints, these too
#   status   the slice's state, and of every worker what it does
#   delete   the slice; with --queued, its request as well
#
# Flags, or variables: --name TPU_NAME, --zone TPU_ZONE, --project TPU_PROJECT, --type TPU_TYPE, --version TPU_VERSION
# (see `gcloud compute tpus tpu-vm versions list`), --shared SHARED (HOST:/EXPORT of a Filestore or other NFS, or
# gs://BUCKET), --mount MOUNT (where it appears on the workers; /mnt/shared), --prepare PREPARE (a shell command that
# every worker runs before anything is installed). The work directory and the texts have to lie where all workers see
# them. --spot and --queued are to be given to resume, run --keep and delete as they were to create.
#
# --dry-run prints the commands instead; of resume, those for a slice that was preempted. Exit codes are those of
# worldlm_jax.main (75: interrupted with everything saved), 255 where the workers cannot be reached. POLL_SECONDS=30:
# how often a state is asked for.
source "$(dirname -- "${BASH_SOURCE[0]}")/remote.sh"

name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-} type=${TPU_TYPE:-} version=${TPU_VERSION:-}
shared=${SHARED:-} mount=${MOUNT:-/mnt/shared} prepare=${PREPARE:-} workdir='' to='' spot='' queued='' keep=''
checkpoints='' poll=${POLL_SECONDS:-30} state='' made=''

actions='create, install, run, resume, stop, fetch, status or delete'
action=${1:-}
shift || true
values='name zone project type version shared mount prepare'
case $action in
  fetch) parse "$values workdir to" "spot queued checkpoints" "$@" ;;
  run | resume) parse "$values" "spot queued keep" "$@" ;;
  create | install | stop | status | delete) parse "$values" "spot queued" "$@" ;;
  *) bad_input "tpu_vm.sh ${action:-without an action}" "expected $actions; see the head of $0" ;;
esac
needed=(name zone project)
if [[ $action == create || $action == resume || $keep ]]; then needed+=(type version); fi
need TPU_ "${needed[@]}"
if [[ $action == run || $action == resume ]]; then need_training; else need_no_arguments; fi
where=("--zone=$zone" "--project=$project")

# on workers command: a shell command on one of the workers, or on all. A worker that is gone ends it after a minute.
on() {
  perform gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" --ssh-flag=-oServerAliveInterval=20 \
    "--command=$2"
}

create() {
  local of=("${where[@]}" "--accelerator-type=$type")
  if [[ $spot ]]; then of+=(--spot); fi
  if [[ $queued ]]; then
    perform gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${of[@]}" "--runtime-version=$version"
  else
    perform gcloud compute tpus tpu-vm create "$name" "${of[@]}" "--version=$version"
  fi
}

delete() {
  if [[ $queued ]]; then
    perform gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    perform gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

# Sets `state`, to ABSENT where there is no such slice. A dry run finds it preempted, and ready the next time.
look() {
  local errors command=(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)')
  if [[ $queued ]]; then
    command=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
  fi
  if [[ $dry_run ]]; then
    perform "${command[@]}"
    if [[ $state ]]; then state=READY; else state=PREEMPTED; fi
    return
  fi
  errors=$(mktemp)
  if ! state=$("${command[@]}" 2>"$errors"); then
    if ! grep -qi 'NOT_FOUND\|not found' "$errors"; then
      cat "$errors" >&2
      fail "the state of $name cannot be had (above)"
    fi
    state=ABSENT
  fi
  rm -f "$errors"
}

ready() {
  [[ $state == READY || $state == ACTIVE ]]
}

# Returns when the slice is ready, which may take days; makes it where it is absent, and again where it was lost.
# Sets `made` where it was not ready from the start.
arrive() {
  made=''
  look
  until ready; do
    made=yes
    case $state in
      ABSENT) create ;;
      PREEMPTED | TERMINATED | STOPPED | SUSPENDED)
        delete
        create
        ;;
      FAILED) fail "the request for $name has failed" "status says why; delete it and create it again" ;;
      *)
        echo "$name is $state"
        sleep "$poll"
        ;;
    esac
    look
  done
}

# A slice that was made again is bare.
restore() {
  arrive
  if [[ $made ]]; then install; fi
}

install() {
  pack
  perform gcloud compute tpus tpu-vm scp "$archive" "$name:" "${where[@]}" --worker=all
  if [[ $prepare ]]; then on all "$prepare"; fi
  on all "$(unpacking worldlm_jax tpu)"
  if [[ $shared ]]; then on all "bash worldlm_jax/launch/worker.sh mount $(quoted "$shared" "$mount")"; fi
}

# Returns the exit code of the first worker that has one other than 0.
train() {
  on all "bash worldlm_jax/launch/worker.sh run $python -m worldlm_jax.main --distributed $(quoted "${arguments[@]}")"
}

# Trains until the run has finished or failed, whatever is preempted.
train_on() {
  local code
  while true; do
    code=0
    train || code=$?
    if [[ $code == 0 || ! $keep ]]; then return "$code"; fi
    look
    if ready && [[ $code != 75 && $code != 255 ]]; then return "$code"; fi
    echo "the run ended with exit code $code, $name is $state: resuming; Ctrl-C ends this"
    sleep "$poll"
    restore
  done
}

fetch() {
  local leave='--exclude=./checkpoints --exclude=./damaged '
  if [[ ! $workdir || ! $to ]]; then bad_input "missing: --workdir or --to" "fetch --workdir=DIR --to=DIR"; fi
  if [[ $checkpoints ]]; then leave=''; fi
  on 0 "tar -czf results.tar.gz $leave-C $(quoted "$workdir") ."
  perform mkdir -p "$to"
  perform gcloud compute tpus tpu-vm scp "$name:results.tar.gz" "$to/results.tar.gz" "${where[@]}" --worker=0
  perform tar -xzf "$to/results.tar.gz" -C "$to"
  perform rm "$to/results.tar.gz"
}

case $action in
  create)
    create
    if [[ $queued && ! $dry_run ]]; then arrive; fi
    ;;
  install) install ;;
  run) train_on ;;
  resume)
    restore
    train_on
    ;;
  stop) on all "bash worldlm_jax/launch/worker.sh stop" ;;
  fetch) fetch ;;
  status)
    if [[ $queued ]]; then perform gcloud compute tpus queued-resources describe "$name" "${where[@]}"; fi
    perform gcloud compute tpus tpu-vm describe "$name" "${where[@]}"
    on all "bash worldlm_jax/launch/worker.sh status"
    ;;
  delete) delete ;;
esac
