#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: bash launch/tpu.sh COMMAND [--dry_run] [OPTIONS] [-- FLAGS]

Training on a Cloud TPU slice. Settings are in launch/env (see launch/env.example); the guide is launch/README.md.

  up [-- FLAGS]       all of it: check, create, wait, install, run, then watch. After a preemption it asks for a new
                      node and resumes; it restarts the trainer on exit codes 42 and 127-255, and ends on all others
                      with that code. Interrupted itself, training goes on, and the same command watches again.
      --max_restarts=N      restarts and new nodes before it gives up (MAX_RESTARTS, 50)
      --delete_when_done    deletes the node when there is nothing left to restart

  create              requests the node (a queued resource); nothing to do if it is there already
  wait                waits until the node is ready
  install             copies the code to all workers and installs it; mounts the bucket, copies the data
  run [-- FLAGS]      starts the trainer on all workers, in the background
  status              the node, and the trainer of every worker
  logs                follows the log of worker 0; --worker=N, --worker=all, --lines=N
  stop                SIGTERM to the trainers, which save and exit with code 42
  ssh [-- COMMAND]    a shell on worker 0, or a command; --worker=N, --worker=all
  delete              deletes the queued resource and its node; asks, unless --yes

FLAGS go to diversedit_jax.train. --config, --workdir and --config.data.data_dir come from CONFIG, WORKDIR and DATA_DIR
unless they are among them. --dry_run prints every command and runs none.

Examples:
  bash launch/tpu.sh up -- --config.total_steps=400_000
  bash launch/tpu.sh up --dry_run
  WORKDIR=runs/sit_b2 bash launch/tpu.sh run -- configs/sit.py:b2 --config.batch_size=512
  bash launch/tpu.sh logs --worker=all
  bash launch/tpu.sh stop && bash launch/tpu.sh delete
USAGE
}

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Functions return 1 for what trying again does not mend, and 2 for a node that is not to be had, or lost.

# --- gcloud

gcloud_tpu() {
  run gcloud compute tpus "$@" "--project=$PROJECT" "--zone=$ZONE" --quiet
}

# Why the last question had no answer: its errors are in $errors.
reason_of_silence() {
  local said
  said=$(last_lines <"$errors")
  echo "${said:+: $said}"
}

# What is to be done about an error of gcloud in a file; fails if waiting may mend it.
hopeless() {
  local advice
  if grep -qi "capacity" "$1"; then
    return 1
  elif grep -qiE "SERVICE_DISABLED|has not been used in project" "$1"; then
    advice="enable the API: gcloud services enable tpu.googleapis.com --project=$PROJECT"
  elif grep -qiE "UNAUTHENTICATED|auth login|credentials" "$1"; then
    advice="sign in: gcloud auth login"
  elif grep -qi "PERMISSION_DENIED" "$1"; then
    advice="the account that gcloud uses needs roles/tpu.admin and roles/iam.serviceAccountUser on $PROJECT"
  elif grep -qi "quota" "$1"; then
    advice="ask for more quota for $ACCELERATOR_TYPE (SPOT=$SPOT) in $ZONE, or use another zone or size"
  elif grep -qi "INVALID_ARGUMENT" "$1"; then
    advice="check ACCELERATOR_TYPE=$ACCELERATOR_TYPE, RUNTIME_VERSION=$RUNTIME_VERSION and ZONE=$ZONE"
  else
    return 1
  fi
  log "$advice (launch/README.md, Troubleshooting)"
}

# Prints what `describe` says of a queued-resources or tpu-vm; ABSENT if there is none; fails without an answer.
# A dry run assumes that all goes well.
query() {
  local kind=$1 format=$2 call
  call=(gcloud_tpu "$kind" describe "$TPU_NAME" "--format=$format" "${@:3}")
  if [[ $dry_run == 1 ]]; then
    "${call[@]}"
    echo "$assumed"
  elif ! "${call[@]}" 2>"$tmp/query"; then
    if grep -qiE "NOT_FOUND|was not found" "$tmp/query"; then
      echo ABSENT
    else
      cat "$tmp/query" >&2
      hopeless "$tmp/query" || return 2
      return 1
    fi
  fi
}

request_state() {
  query queued-resources "value(state.state)"
}

node_state() {
  if [[ $dry_run == 1 && $assumed == ACTIVE ]]; then
    local assumed=READY
  fi
  query tpu-vm "value(state)"
}

reason() {
  query queued-resources "value[separator=': '](state.stateInitiator,state.failedData.error.message)" 2>/dev/null || true
}

# Sets `count`, how many workers the node has; asked once, for it does not change.
count_workers() {
  local addresses
  if [[ -n $count ]]; then return; fi
  if [[ $dry_run == 1 ]]; then
    local assumed=10.0.0.1
  fi
  addresses=$(query tpu-vm "value(networkEndpoints.ipAddress)" "--flatten=networkEndpoints[]") || return
  if [[ $addresses == ABSENT ]]; then return 2; fi
  count=$(grep -c . <<<"$addresses")
}

bounded() {
  if [[ $dry_run != 1 ]] && command -v timeout >/dev/null; then
    # In the foreground, or Ctrl-C would not reach it.
    set -- timeout --foreground --kill-after=30 "$COMMAND_SECONDS" "$@"
  fi
  run "$@"
}

on_worker() {
  local worker=$1 command=$2
  # A connection to a machine that has gone ends after a minute and a half.
  bounded gcloud compute tpus tpu-vm ssh "$TPU_NAME" "--worker=$worker" "--command=$command" \
    "--project=$PROJECT" "--zone=$ZONE" --quiet \
    --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30 "${more[@]}"
}

# The command that calls worker.sh there.
remote() {
  quote env "REMOTE_DIR=$REMOTE_DIR" "BUCKET=$BUCKET" "DATA_DIR=$DATA_DIR" "EXTRAS=${EXTRAS:-tpu}" \
    "DISK=$DISK" "STOP_SECONDS=$STOP_SECONDS" bash "$REMOTE_DIR/code/launch/worker.sh" "$@"
}

# Calls a function, which takes `all` or the number of a worker and may be repeated, for all workers; where it fails,
# for each of them by itself, up to ATTEMPTS times. Says which workers fail for good, and their last lines.
everywhere() {
  local what=$1 function=$2 attempt worker seconds failed still code
  local -A processes codes
  code=0
  "$function" all || code=$?
  if ((code == 0)); then return; fi
  if ((code == 3)); then return 1; fi # a trainer is in the way
  log "$what: failed on a worker or more; asking each"
  count_workers || return
  mapfile -t failed < <(seq 0 $((count - 1)))
  for ((attempt = 1; ; attempt++)); do
    still=()
    for worker in "${failed[@]}"; do
      "$function" "$worker" >"$tmp/worker-$worker" 2>&1 </dev/null &
      processes[$worker]=$!
    done
    for worker in "${failed[@]}"; do
      code=0
      wait "${processes[$worker]}" || code=$?
      if ((code)); then
        still+=("$worker")
        codes[$worker]=$code
      fi
    done
    if ((${#still[@]} == 0)); then
      return
    fi
    failed=("${still[@]}")
    if ((attempt >= ATTEMPTS)); then
      break
    fi
    seconds=$(backoff "$attempt")
    log "$what: failed on worker ${failed[*]}; again in $seconds s"
    sleep "$seconds"
  done
  for worker in "${failed[@]}"; do
    log "$what: worker $worker failed with exit code ${codes[$worker]}; its last lines:"
    tail -n 15 "$tmp/worker-$worker" | sed 's/^/    /' >&2
  done
  return 1
}

# --- The node

create() {
  local state attempt seconds call
  local -a more
  words CREATE_ARGS
  call=(gcloud_tpu queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME"
    "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION")
  if ((SPOT && RESERVED)); then
    die "SPOT=yes and RESERVED=yes exclude each other"
  fi
  if ((FLEX_START)); then
    die "FLEX_START=yes is for launch/gke.sh"
  fi
  if ((SPOT)); then call+=(--spot); fi
  if ((RESERVED)); then call+=(--reserved); fi
  if [[ -n $NETWORK ]]; then call+=("--network=$NETWORK"); fi
  if [[ -n $SUBNETWORK ]]; then call+=("--subnetwork=$SUBNETWORK"); fi
  if [[ -n $SERVICE_ACCOUNT ]]; then call+=("--service-account=$SERVICE_ACCOUNT"); fi
  if [[ -n $DISK ]]; then
    # Read-only, for several workers may not write to one disk.
    call+=("--data-disk=source=projects/$PROJECT/zones/$ZONE/disks/$DISK,mode=read-only")
  fi
  call+=("${more[@]}")

  state=$(request_state) || return
  case $state in
    ABSENT) ;;
    FAILED | SUSPENDING | SUSPENDED)
      log "$TPU_NAME is there, but $state: delete it first, or use up, which does"
      return 2
      ;;
    *)
      log "$TPU_NAME is there already: $state"
      return
      ;;
  esac
  if [[ $dry_run == 1 ]]; then
    "${call[@]}"
    assumed=ACTIVE
    return
  fi
  for ((attempt = 1; ; attempt++)); do
    if "${call[@]}" 2>"$tmp/create"; then
      log "requested $ACCELERATOR_TYPE in $ZONE as $TPU_NAME"
      return
    fi
    cat "$tmp/create" >&2
    if grep -q ALREADY_EXISTS "$tmp/create"; then
      return # an earlier attempt went through, though its answer did not come back
    fi
    hopeless "$tmp/create" && return 1
    ((attempt < ATTEMPTS)) || return 2
    seconds=$(backoff "$attempt")
    log "the request failed; again in $seconds s"
    sleep "$seconds"
  done
}

# Sets `condition` to the states of request and node, as ACTIVE/READY or FAILED/, and to "" without an answer.
look() {
  local request node="" code=0
  condition=""
  request=$(request_state 2>"$errors") || code=$?
  if ((code == 0)) && [[ $request == ACTIVE ]]; then
    node=$(node_state 2>"$errors") || code=$?
  fi
  if ((code == 0)); then
    condition=$request/$node
  fi
  return "$code"
}

lost() {
  case $condition in
    FAILED/ | SUSPENDING/ | SUSPENDED/ | DELETING/ | ABSENT/ | ACTIVE/PREEMPTED | ACTIVE/TERMINATED | \
      ACTIVE/STOPPING | ACTIVE/STOPPED | ACTIVE/DELETING | ACTIVE/ABSENT)
      log "$TPU_NAME is not to be had: $condition $(reason)"
      ;;
    *) return 1 ;;
  esac
}

wait_ready() {
  local condition before=none start=$SECONDS code
  while true; do
    code=0
    look || code=$?
    if ((code == 1)); then
      cat "$errors" >&2
      return 1
    fi
    if [[ $condition != "$before" ]]; then
      log "$TPU_NAME: ${condition:-no answer$(reason_of_silence)}"
      before=$condition
    fi
    if [[ $condition == ACTIVE/READY ]]; then
      return
    fi
    # The node appears a moment after its request is active.
    if [[ $condition != ACTIVE/ABSENT ]] && lost; then
      return 2
    fi
    if ((SECONDS - start >= WAIT_SECONDS)); then
      log "$TPU_NAME is not ready after $WAIT_SECONDS s (WAIT_SECONDS); the request stands: delete it, or wait again"
      return 1
    fi
    sleep "$POLL_SECONDS"
  done
}

delete_node() {
  local state start=$SECONDS
  state=$(request_state) || return
  if [[ $state != ABSENT ]]; then
    if [[ $state != DELETING ]]; then
      # --force: with its node.
      retry gcloud_tpu queued-resources delete "$TPU_NAME" --force || [[ $(request_state) == ABSENT ]] || return
      assumed=ABSENT
    fi
    # The name is free only when all of it is gone.
    until [[ $(request_state) == ABSENT ]]; do
      if ((SECONDS - start >= WAIT_SECONDS)); then
        log "$TPU_NAME is not deleted after $WAIT_SECONDS s"
        return 1
      fi
      sleep "$POLL_SECONDS"
    done
  fi
  state=$(node_state) || return
  if [[ $state != ABSENT ]]; then
    retry gcloud_tpu tpu-vm delete "$TPU_NAME" || return
  fi
  log "$TPU_NAME is deleted"
}

# --- The workers

# The checkout as an archive: what git tracks and what it would not ignore, as it lies there. All nodes get the same.
pack() {
  if [[ $checkout == "$tmp/clone" ]]; then
    run git clone --quiet --depth=1 ${REPO_REF:+"--branch=$REPO_REF"} -- "$REPO" "$checkout" || return
  elif [[ ! -e $checkout/.git ]]; then
    log "REPO=$checkout is no git checkout"
    return 1
  fi
  # shellcheck disable=SC2016
  run bash -c 'set -o pipefail; cd "$1" && git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d "" file; do if [ -e "$file" ]; then printf "%s\0" "$file"; fi; done |
    COPYFILE_DISABLE=1 tar --null -T - -czf "$2"' pack "$checkout" "$tmp/diversedit.tgz"
}

# Without data there is nothing to copy to a worker. Whether the workers may read them is seen there alone.
check_data() {
  if [[ $DATA_DIR == gs://* ]] && ! run gcloud storage ls "$DATA_DIR" >/dev/null 2>"$errors" &&
    grep -qiE "matched no objects|not found" "$errors"; then
    die "DATA_DIR=$DATA_DIR: gcloud says: $(last_lines <"$errors")"
  fi
}

install_on() {
  local worker=$1 unpack directory
  directory=$(quote "$REMOTE_DIR")
  # One installation at a time: a connection that broke leaves the earlier one running. .venv stays.
  unpack="set -e; sudo mkdir -p $directory; sudo chown \"\$(id -u)\" $directory; mkdir -p $directory/code"
  unpack+="; exec 8>$directory/install.lock; flock --wait 1800 8"
  unpack+=" || { echo 'error: another installation has run for half an hour' >&2; exit 1; }"
  unpack+="; if [ -e $directory/code/launch/worker.sh ]; then $(remote idle); fi"
  unpack+="; find $directory/code -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +"
  unpack+="; tar -xzf diversedit.tgz -C $directory/code; $(remote install)"
  bounded gcloud compute tpus tpu-vm scp "$tmp/diversedit.tgz" "$TPU_NAME:diversedit.tgz" "--worker=$worker" \
    "--project=$PROJECT" "--zone=$ZONE" --quiet "${more[@]}" &&
    on_worker "$worker" "$unpack"
}

install_workers() {
  everywhere installing install_on && log "installed on all workers"
}

start_on() {
  on_worker "$1" "$(remote start "${flags[@]}")"
}

start_workers() {
  everywhere starting start_on && log "started on all workers: $(quote "${flags[@]}")"
}

# Asks all workers for their status, or lets them stop or end and then say it. Fills states[worker] and codes[worker];
# a worker that does not answer has no entry. Returns 2 if one does not.
ask_workers() {
  local command=${1:-status} line code=0 lines
  states=()
  codes=()
  count_workers 2>"$errors" || return
  # A new node has no worker.sh yet.
  lines=$(on_worker all "if [ -e $(quote "$REMOTE_DIR/code/launch/worker.sh") ]; then $(remote "$command"); fi" \
    2>"$errors" </dev/null) || code=$?
  while IFS= read -r line; do
    if [[ $line =~ worker=([0-9]+)\ state=([a-z]+)\ code=([0-9]+|-) ]]; then
      states[BASH_REMATCH[1]]=${BASH_REMATCH[2]}
      codes[BASH_REMATCH[1]]=${BASH_REMATCH[3]}
    fi
  done <<<"$lines"
  if ((code == 0 && ${#states[@]} == 0)); then
    mapfile -t states < <(for ((i = 0; i < count; i++)); do echo none; done)
  fi
  ((${#states[@]} >= count)) || return 2
}

in_state() {
  local state number=0
  for state in "${states[@]}"; do
    if [[ $state == "$1" ]]; then number=$((number + 1)); fi
  done
  echo "$number"
}

summary() {
  local worker line=""
  for worker in "${!states[@]}"; do
    line+="${line:+, }worker $worker ${states[$worker]}"
    if [[ ${codes[$worker]:--} != - ]]; then line+=" with ${codes[$worker]}"; fi
  done
  echo "${line:-no worker answers}"
}

# Follows node and trainers until there is something to do. Sets `outcome`: done CODE, again CODE, stopped, or lost;
# fails if there is no answer for WAIT_SECONDS.
watch() {
  local condition before="" now code answered silent=$SECONDS settling=0 ended=()
  while true; do
    states=()
    codes=()
    answered=0
    look || true
    if lost; then
      outcome=lost
      return
    fi
    if [[ -n $condition ]] && ask_workers; then
      now=$(summary)
      answered=1
      silent=$SECONDS
    elif ((${#states[@]})); then
      now="only part of the workers answer: $(summary)"
    else
      now="no answer${condition:+, $condition}"
    fi
    if [[ $now != "$before" ]]; then
      if ((answered)); then log "$now"; else log "$now$(reason_of_silence)"; fi
      before=$now
    fi
    if ((SECONDS - silent >= WAIT_SECONDS)); then
      log "no answer for $WAIT_SECONDS s; training may go on: see tpu.sh status, or watch again with up"
      return 1
    fi
    # If some answer, it is not this machine's network.
    if ((${#states[@]} && SECONDS - silent >= 10 * SETTLE_SECONDS + 1)); then
      log "the others do not answer for $((10 * SETTLE_SECONDS)) s: the node is broken"
      outcome=lost
      return
    fi
    if ((answered)); then
      mapfile -t ended < <(printf '%s\n' "${codes[@]}" | grep -v -e - || true)
      code=$(verdict "${ended[@]}")
      if (($(in_state running) == 0)); then
        if (($(in_state stopped))); then
          outcome=stopped
        elif (($(in_state none))); then
          outcome="again 137" # somebody else made this node
        elif ((code)) && should_restart "$code"; then
          outcome="again $code"
        else
          outcome="done $code"
        fi
        return
      fi
      if ((code == 0)) || (($(in_state stopped))); then
        settling=0
      elif ((settling == 0)); then
        settling=$((SECONDS + 1)) # so that it is not 0
      elif ((SECONDS - settling >= SETTLE_SECONDS)); then
        log "a worker has failed and the others still run after $SETTLE_SECONDS s"
        if should_restart "$code"; then outcome="again $code"; else outcome="done $code"; fi
        return
      fi
    fi
    sleep "$POLL_SECONDS"
  done
}

# --- All together

# Has the trainer running on all workers of a node that is ready.
launch_workers() {
  if ask_workers && (($(in_state running) == ${#states[@]})); then
    log "the trainer runs already; watching it"
    return
  fi
  if (($(in_state running))); then
    ask_workers end || true # all or none: a part cannot go on
  fi
  if [[ $installed != yes ]]; then
    install_workers || return
    installed=yes
  fi
  start_workers
}

up() {
  local restarts=0 failures=0 outcome code began why condition installed=no
  local -a states=() codes=()
  pack && check_flags "$checkout" && check_data || exit 1 # before anything is paid for
  trap 'log "no longer watching; training goes on. Watch again: tpu.sh up, end: tpu.sh stop"; exit 130' INT TERM
  while true; do
    outcome=""
    code=0
    began=$SECONDS
    create && wait_ready || code=$?
    if ((code == 1)); then exit 1; fi
    if ((code)); then
      outcome=lost
    elif ! launch_workers; then
      look || true
      if lost; then
        outcome=lost
      elif ((restarts)); then
        outcome="again 255" # it could be started before: the connection is bad
      else
        die "the trainer could not be started; the node is still there, and costs: bash launch/tpu.sh delete"
      fi
    fi
    if [[ $dry_run == 1 ]]; then
      ask_workers
      return
    fi
    if [[ -z $outcome ]]; then
      began=$SECONDS
      watch || exit 1
    fi
    case $outcome in
      stopped)
        log "stopped as asked; the same command resumes. The node is still there, and costs: bash launch/tpu.sh delete"
        exit 42
        ;;
      done*)
        code=${outcome#done }
        conclude "$code"
        ;;
      again*) why="trainer: $(explain "${outcome#again }")" ;;
      lost) why="the node is lost" ;;
    esac
    restart_pause "$began" "$why" ||
      die "gave up after $restarts restarts ($why); what is still there costs: bash launch/tpu.sh delete"
    if [[ $outcome == lost ]]; then
      installed=no
      count=""
      retry delete_node || exit 1
    else
      ask_workers end || true
    fi
  done
}

# The end of a run: says what its exit code asks for, and exits with it.
conclude() {
  local worker code=$1
  for worker in "${!codes[@]}"; do
    if ((code)) && [[ ${codes[$worker]} == "$code" ]]; then
      log "worker $worker ended with $code; its last lines:"
      on_worker "$worker" "tail -n 20 $(quote "$REMOTE_DIR/run/log")" 2>/dev/null | sed 's/^/    /' >&2 || true
      break
    fi
  done
  log "exit code $(explain "$code")"
  if (($(in_state running))); then
    ask_workers end || true
  fi
  if ((delete_when_done)); then
    delete_node || true
  else
    log "the node is still there, and costs: bash launch/tpu.sh delete"
  fi
  exit "$code"
}

stop_workers() {
  local worker bad=0
  local -a states=() codes=()
  log "SIGTERM to the trainers; they have $STOP_SECONDS s to save"
  ask_workers stop || {
    cat "$errors" >&2
    log "not all workers answer: $(summary)"
    return 1
  }
  log "$(summary)"
  for worker in "${!codes[@]}"; do
    case ${codes[$worker]} in
      - | 0 | 42) ;;
      *)
        log "worker $worker: $(explain "${codes[$worker]}")"
        bad=1
        ;;
    esac
  done
  if ((bad)); then
    return 1
  fi
  log "the node is still there, and costs: bash launch/tpu.sh delete"
}

show_status() {
  local state node="" worker
  local -a states=() codes=()
  state=$(request_state) || return
  if [[ $state == ACTIVE ]]; then node=$(node_state) || return; fi
  echo "$TPU_NAME: $state${node:+, node $node}"
  if [[ $node == READY ]]; then
    ask_workers || cat "$errors" >&2
    for worker in "${!states[@]}"; do
      if [[ ${codes[$worker]:--} == - ]]; then
        echo "worker $worker: ${states[$worker]}"
      else
        echo "worker $worker: ${states[$worker]}, exit code $(explain "${codes[$worker]}")"
      fi
    done
  fi
}

main() {
  local command option worker=0 lines=100 yes=0 delete_when_done=0 count="" allowed assumed=ACTIVE
  local -a options given flags=() more
  read_command "create up wait install run logs ssh status stop delete" "$@"
  case $command in
    create) allowed="" assumed=ABSENT ;;
    up) allowed="max_restarts delete_when_done" assumed=ABSENT ;;
    wait | install | run | status | stop) allowed="" ;;
    logs) allowed="worker lines" ;;
    ssh) allowed="worker" ;;
    delete) allowed="yes" ;;
  esac
  load_env
  for option in "${options[@]}"; do
    [[ $option == --* && " $allowed " == *" $(sed 's/^--//; s/=.*//' <<<"$option") "* ]] || refuse "$option"
    case $option in
      --worker=*) worker=${option#*=} ;;
      --lines=*) lines=${option#*=} ;;
      --max_restarts=*) MAX_RESTARTS=${option#*=} ;;
      --delete_when_done) delete_when_done=1 ;;
      --yes) yes=1 ;;
      *) refuse "$option" ;;
    esac
  done
  whole_numbers 0 MAX_RESTARTS lines
  [[ $worker == all ]] || whole_numbers 0 worker
  case $command in
    run | up | ssh) ;;
    *) ((${#given[@]} == 0)) || die "$command takes no flags of the trainer" ;;
  esac
  required PROJECT ZONE TPU_NAME
  [[ $REMOTE_DIR == /* ]] || die "REMOTE_DIR=$REMOTE_DIR: wanted a path that begins with /"
  case $command in
    create | up)
      required ACCELERATOR_TYPE RUNTIME_VERSION
      [[ $ACCELERATOR_TYPE != tpu7* ]] ||
        die "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: the Cloud TPU API has no TPU7x; use launch/gke.sh"
      ;;
  esac
  case $command in
    install | run | up | stop | status)
      required BUCKET REMOTE_DIR
      check_bucket
      ;;
  esac
  case $command in
    run | up)
      if [[ $DATA_DIR == gs://* ]]; then
        trainer_flags "$REMOTE_DIR/bucket" "$REMOTE_DIR/data/${DATA_DIR#gs://}"
      else
        trainer_flags "$REMOTE_DIR/bucket" "$DATA_DIR"
      fi
      ;;
  esac
  words SSH_ARGS
  if [[ $dry_run == 1 ]]; then
    tmp=${TMPDIR:-/tmp}/tmp.XXXXXXXXXX # a dry run makes no folder: it shows the pattern of mktemp in its commands
    errors=/dev/null
  else
    command -v gcloud >/dev/null || die "gcloud is not installed: see Google's documentation, \"Install the gcloud CLI\""
    tmp=$(mktemp -d)
    errors=$tmp/errors
    trap 'rm -rf "$tmp"' EXIT
  fi
  checkout=${REPO:-$root}
  if [[ $checkout == *://* || $checkout == git@* ]]; then checkout=$tmp/clone; fi

  case $command in
    create) create ;;
    wait) wait_ready ;;
    install) pack && install_workers ;;
    run) check_flags "$checkout" && start_workers ;;
    up) up ;;
    status) show_status ;;
    stop) stop_workers ;;
    logs)
      run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "--worker=$worker" "--command=$(remote log "$lines")" \
        "--project=$PROJECT" "--zone=$ZONE" --quiet "${more[@]}"
      ;;
    ssh)
      run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "--worker=$worker" ${given[0]+"--command=${given[*]}"} \
        "--project=$PROJECT" "--zone=$ZONE" --quiet "${more[@]}"
      ;;
    delete)
      if ((!yes)) && [[ $dry_run != 1 ]]; then
        confirm "Delete $TPU_NAME in $PROJECT, $ZONE, and its node? A trainer on it is killed without saving." ||
          die "not deleted"
      fi
      delete_node
      ;;
  esac
}

main "$@"
