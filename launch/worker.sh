#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: REMOTE_DIR=DIR bash worker.sh install|start|status|stop|end|log|idle [...]

One worker of a TPU: tpu.sh copies the repository to DIR/code there and calls this script on it. On a machine that is a
TPU by itself, a user may call it in a clone, with BUCKET, DATA_DIR, DISK and EXTRAS in the environment (launch/README.md).

  install         installs Python, the repository with EXTRAS, gcsfuse; mounts BUCKET at DIR/bucket; copies DATA_DIR
                  to DIR/data; mounts DISK at DIR/disk. May be repeated: what is done is not done again
  start FLAGS     starts the trainer in the background; nothing to do if it runs with the same flags
  status          one line: worker=N state=none|running|exited|stopped|lost code=CODE
  stop            SIGTERM to the trainer, so that it saves, and its status; SIGKILL after STOP_SECONDS
  end             the same before a restart: the status will not be `stopped`
  log [LINES]     follows the log, each line with the number of the worker
  idle            fails if a trainer runs

Exit code 3 says that a trainer is in the way: there is no use in trying again.

In DIR/run: log, command, pid, exit_code (written when the trainer has ended), lock (held while it runs).
USAGE
}

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source-path=SCRIPTDIR source=xla_flags.sh
source "$launch/xla_flags.sh"

number() {
  local file=$REMOTE_DIR/worker value
  if [[ ! -s $file ]]; then
    value=$(curl -fsS --max-time 10 -H "Metadata-Flavor: Google" \
      "http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number") ||
      value=$(hostname | sed -n 's/.*-w-\([0-9]*\)$/\1/p')
    [[ ${value:=0} =~ ^[0-9]+$ ]] || die "the number of this worker is no number: $value"
    echo "$value" >"$file"
  fi
  echo "$(<"$file")"
}

# --- Installing. Descriptor 8 holds the lock of tpu.sh on installations: a daemon that inherits it would keep it.

# A Python that is new enough: that of the system, else one that uv brings, for images of TPUs come with Python 3.10.
choose_python() {
  if PYTHON=$(find_python 2>/dev/null); then
    return
  fi
  command -v uv >/dev/null || export PATH=$HOME/.local/bin:$PATH
  if ! { command -v uv >/dev/null || retry python3 -m pip install --user --quiet uv; } ||
    ! retry uv python install --quiet 3.12 || ! PYTHON=$(uv python find 3.12); then
    find_python # says again what is wrong with those that are here
  fi
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc source
  if command -v gcsfuse >/dev/null; then
    return
  fi
  source="deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main"
  retry curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg -o "$REMOTE_DIR/apt-key"
  chmod 644 "$REMOTE_DIR/apt-key"
  sudo cp "$REMOTE_DIR/apt-key" "$key"
  sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null <<<"$source"
  # A new machine updates itself for a while: wait for that lock.
  retry sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
  retry sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=600 install gcsfuse
}

mount_bucket() {
  local directory=$REMOTE_DIR/bucket
  if [[ -z ${BUCKET:-} ]] || timeout 60 mountpoint -q "$directory"; then
    return
  fi
  fusermount -uz "$directory" 2>/dev/null || true # what a gcsfuse that died has left
  mkdir -p "$directory"
  # Without cached metadata every worker sees at once what another wrote; checkpoints are renamed as folders.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "${BUCKET#gs://}" "$directory" </dev/null >>"$REMOTE_DIR/gcsfuse.log" 2>&1 8>&- || {
    tail -n 5 "$REMOTE_DIR/gcsfuse.log" >&2
    die "$BUCKET cannot be mounted"
  }
  if ! touch "$directory/.diversedit-$(number)" || ! rm "$directory/.diversedit-$(number)"; then
    die "$BUCKET cannot be written: the workers' account needs roles/storage.objectUser on it"
  fi
}

mount_disk() {
  local directory=$REMOTE_DIR/disk
  if [[ -z ${DISK:-} ]] || timeout 60 mountpoint -q "$directory"; then
    return
  fi
  mkdir -p "$directory"
  # By its label: names of devices differ between generations. noload: the disk cannot be written, nor can its journal.
  sudo mount -t ext4 -o ro,noload -L diversedit "$directory" ||
    die "DISK=$DISK cannot be mounted: it needs an ext4 file system with the label diversedit"
}

install_all() {
  number >/dev/null
  choose_python
  VIRTUAL_ENV='' environment "${EXTRAS:-tpu}"
  if [[ -n ${BUCKET:-} ]]; then
    install_gcsfuse
    mount_bucket
  fi
  mount_disk
  if [[ ${DATA_DIR:-} == gs://* ]]; then
    mkdir -p "$REMOTE_DIR/data/${DATA_DIR#gs://}"
    retry gcloud storage rsync --recursive --quiet "$DATA_DIR" "$REMOTE_DIR/data/${DATA_DIR#gs://}" ||
      die "$DATA_DIR cannot be copied; free space: $(df -h "$REMOTE_DIR/data" | tail -n 1)"
  fi
  echo "worker $(number): installed"
}

# --- Running

# Probes share the lock, so that they do not take each other for a trainer.
running() {
  ! flock --shared --nonblock "$state/lock" true
}

status() {
  local state_now=none code=-
  if running; then
    state_now=running
  elif [[ -s $state/exit_code ]]; then
    state_now=exited
    code=$(<"$state/exit_code")
    if [[ -e $state/stopped ]]; then
      state_now=stopped
    fi
  elif [[ -s $state/pid ]]; then
    state_now=lost # the machine was restarted, or the trainer killed together with its parent
    code=137
  fi
  echo "worker=$(number) state=$state_now code=$code"
}

busy() {
  echo "error: worker $(number): a trainer is running; stop it first: $(<"$state/command")" >&2
  exit 3
}

start() {
  local i
  if running; then
    if [[ $(quote "$@") == "$(<"$state/command")" ]]; then
      echo "worker $(number): runs already"
      return
    fi
    busy
  fi
  mount_bucket
  mount_disk
  rm -f "$state/exit_code" "$state/stopped" "$state/pid"
  quote "$@" >"$state/command"
  setsid nohup bash "$launch/worker.sh" trainer "$@" </dev/null >>"$state/log" 2>&1 &
  for ((i = 0; i < 300; i++)); do
    if [[ -s $state/pid ]]; then
      echo "worker $(number): started"
      return
    fi
    sleep 0.1
  done
  tail -n 5 "$state/log" >&2
  die "the trainer did not start"
}

# The parent of the trainer: it only waits for the exit code.
trainer() {
  local code=0 child
  exec 9>"$state/lock"
  flock --wait 30 9 || die "another trainer is starting"
  mkdir -p "$REMOTE_DIR/cache"
  chmod 700 "$REMOTE_DIR/cache" # compiled programs are code
  export JAX_COMPILATION_CACHE_DIR=$REMOTE_DIR/cache
  xla_flags tpu
  cd "$root"
  log "worker $(number): diversedit_jax.train $(quote "$@")"
  "$root/.venv/bin/python" -m diversedit_jax.train "$@" 9>&- &
  child=$!
  trap '' INT TERM HUP # after the child: it must not inherit them ignored
  echo "$child" >"$state/pid"
  wait "$child" || code=$?
  log "worker $(number): exit code $(explain "$code")"
  echo "$code" >"$state/exit_code.new"
  mv "$state/exit_code.new" "$state/exit_code"
}

end() {
  local pid i
  if [[ -s $state/pid ]] && pid=$(<"$state/pid") && grep -qs diversedit_jax.train "/proc/$pid/cmdline"; then
    kill -TERM "$pid" || true
    for ((i = 0; i < 5 * STOP_SECONDS; i++)); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.2
    done
    kill -KILL "$pid" 2>/dev/null || true
    for ((i = 0; i < 50; i++)); do
      running || break # its parent has written the exit code
      sleep 0.1
    done
  fi
  status
}

main() {
  local command=${1:-help}
  case $command in
    -h | --help | help)
      usage
      return
      ;;
  esac
  shift
  : "${REMOTE_DIR:?is where tpu.sh has put the repository}"
  state=$REMOTE_DIR/run
  # Those of common.sh, which read them from launch/env elsewhere.
  ATTEMPTS=${ATTEMPTS:-3} BACKOFF_SECONDS=${BACKOFF_SECONDS:-10} BACKOFF_MAX_SECONDS=${BACKOFF_MAX_SECONDS:-60}
  STOP_SECONDS=${STOP_SECONDS:-300}
  whole_numbers 0 BACKOFF_SECONDS BACKOFF_MAX_SECONDS STOP_SECONDS
  whole_numbers 1 ATTEMPTS
  mkdir -p "$state"
  case $command in
    install) install_all ;;
    start | trainer | status | end) "$command" "$@" ;;
    stop)
      touch "$state/stopped"
      end
      ;;
    log) tail -n "${1:-100}" -F "$state/log" 2>/dev/null | sed -u "s/^/[worker $(number)] /" ;;
    idle) if running; then busy; fi ;;
    *) die "unknown command $command; see --help" ;;
  esac
}

main "$@"
