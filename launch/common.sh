# shellcheck shell=bash
# What the scripts in launch/ share: source this file.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION (macOS: brew install bash)" >&2
  exit 1
fi

unset CDPATH # with it, cd goes elsewhere
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=../tools/environment.sh
source "$launch/../tools/environment.sh" # sets root
DRY_RUN=${DRY_RUN:-}
yes_or_no DRY_RUN || exit 1
dry_run=$DRY_RUN

# --- Messages

log() {
  if [[ $dry_run != 1 ]]; then
    printf '[%(%H:%M:%S)T] %s\n' -1 "$*" >&2
  fi
}

die() {
  local said="$*"
  printf 'error: %s\n' "${said//$'\n'/ }" >&2
  exit 1
}

# --- Settings

# Sets what the environment does not: from launch/env, then from launch/env.example, which also names all there are.
load_env() {
  local file=${LAUNCH_ENV:-$launch/env}
  if [[ -f $file ]]; then
    read_env "$file"
  elif [[ -n ${LAUNCH_ENV:-} ]]; then
    die "LAUNCH_ENV=$file: there is no such file"
  fi
  read_env "$launch/env.example"
  yes_or_no SPOT RESERVED FLEX_START DETERMINISTIC || exit 1
  whole_numbers 0 MAX_RESTARTS POLL_SECONDS WAIT_SECONDS STOP_SECONDS SETTLE_SECONDS BACKOFF_SECONDS \
    BACKOFF_MAX_SECONDS COMMAND_SECONDS GRACE_SECONDS USER_ID
  whole_numbers 1 ATTEMPTS NUM_SLICES NODES GPUS_PER_NODE CPUS_PER_TASK
  plain_names PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION NETWORK SUBNETWORK SERVICE_ACCOUNT DISK \
    CLUSTER IMAGE WORKLOAD RESERVATION TIME_LIMIT
}

read_env() {
  local file=$1 line name value number=0 known
  known=$'\n'$(<"$launch/env.example")
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    if [[ $line =~ ^[[:space:]]*(#.*)?$ ]]; then
      continue
    fi
    if ! [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?([A-Z_]+)=(.*)$ ]]; then
      die "$file:$number: wanted NAME=VALUE"
    fi
    name=${BASH_REMATCH[2]}
    value=${BASH_REMATCH[3]}
    [[ $known == *$'\n'"$name="* ]] || die "$file:$number: unknown variable $name; see launch/env.example"
    if [[ $value =~ ^\"(.*)\"[[:space:]]*$ || $value =~ ^\'(.*)\'[[:space:]]*$ ]]; then
      value=${BASH_REMATCH[1]}
    elif [[ $value =~ ^(([^#[:space:]]|[[:space:]]+[^#[:space:]])*) ]]; then
      value=${BASH_REMATCH[1]} # without a comment at its end
    fi
    if [[ -z ${!name+set} ]]; then
      printf -v "$name" %s "$value"
    fi
  done <"$file"
}

required() {
  local name
  for name in "$@"; do
    if [[ -z ${!name:-} || ${!name} == *"<"*">"* ]]; then
      die "$name is not set: give it in launch/env (a copy of launch/env.example) or in the environment"
    fi
  done
}

# Makes settings decimal numbers of at least $1. In arithmetic bash evaluates other text, reads 010 as 8, fails at 08,
# and wraps around beyond 64 bits.
whole_numbers() {
  local least=$1 name
  for name in "${@:2}"; do
    if ! [[ ${!name} =~ ^0*([0-9]{1,10})$ ]] || ((10#${BASH_REMATCH[1]} < least)); then
      die "$name=${!name}: wanted a whole number of at least $least, with at most 10 digits"
    fi
    printf -v "$name" %s "$((10#${BASH_REMATCH[1]}))"
  done
}

# Settings that become a part of commands, labels and YAML of others: nothing in them may be syntax there.
plain_names() {
  local name
  for name in "$@"; do
    [[ -z ${!name} || ${!name} == *"<"*">"* || ${!name} =~ ^[A-Za-z0-9][A-Za-z0-9._:/@-]*$ ]] ||
      die "$name=${!name}: wanted letters, digits and ._:/@- only, a letter or digit first"
  done
}

check_bucket() {
  [[ $BUCKET =~ ^gs://[a-z0-9][a-z0-9._-]*$ ]] || die "BUCKET=$BUCKET: wanted gs://NAME, without a folder"
}

# Sets `more` to the words of a setting.
words() {
  [[ ${!1} != *[\'\"\\]* ]] || die "$1=${!1}: it is split at blanks; quotes and backslashes are not read"
  # shellcheck disable=SC2034
  read -r -d '' -a more <<<"${!1}" || true # read fails at the end of its input
}

# --- Commands

# A command as a shell reads it back.
quote() {
  local argument line="" escaped="'\\''"
  for argument in "$@"; do
    if [[ -z $argument || $argument == *[!A-Za-z0-9_./:=@%+,-]* ]]; then
      argument="'${argument//\'/$escaped}'"
    fi
    line+=${line:+ }$argument
  done
  printf '%s\n' "$line"
}

# Runs a command; with --dry_run prints it instead, also where its output would be read.
run() {
  if [[ $dry_run == 1 ]]; then
    quote "$@" >&3
  else
    "$@"
  fi
}

# Counts a restart and waits before it; fails when there were MAX_RESTARTS. $1: SECONDS at the last start; $2: why. The
# caller declares `restarts` and `failures`, 0 at first.
restart_pause() {
  local began=$1 seconds
  if ((restarts >= MAX_RESTARTS)); then
    return 1
  fi
  restarts=$((restarts + 1))
  if ((SECONDS - began >= 3600)); then failures=0; fi # it worked for an hour: no reason to wait long
  failures=$((failures + 1))
  seconds=$(backoff "$failures")
  log "restart $restarts of $MAX_RESTARTS in $seconds s${2:+; $2}"
  sleep "$seconds"
}

# Seconds to pause before attempt $1 + 1.
backoff() {
  local seconds=$BACKOFF_SECONDS i
  for ((i = 1; i < $1 && seconds < BACKOFF_MAX_SECONDS; i++)); do
    seconds=$((seconds * 2))
  done
  echo $((seconds < BACKOFF_MAX_SECONDS ? seconds : BACKOFF_MAX_SECONDS))
}

# Runs a command up to ATTEMPTS times, until it succeeds; returns its last exit code.
retry() {
  local attempt code seconds
  for ((attempt = 1; ; attempt++)); do
    code=0
    "$@" || code=$?
    if ((code == 0 || attempt >= ATTEMPTS)); then
      return "$code"
    fi
    seconds=$(backoff "$attempt")
    log "attempt $attempt of $ATTEMPTS failed with exit code $code; again in $seconds s"
    sleep "$seconds"
  done
}

# Asks on the terminal; without an answer it is no.
confirm() {
  local answer=""
  printf '%s [y/N] ' "$1" >&2
  read -r answer || true
  [[ $answer == [yY] || $answer == [yY][eE][sS] ]]
}

# --- Options and the flags of the trainer

# Sets `command` to the second argument, one of the words in the first, and reads the others with `parse`.
read_command() {
  local known=$1
  command=${2:-help}
  case $command in
    -h | --help | help)
      usage
      exit 0
      ;;
  esac
  [[ " $known " == *" $command "* ]] || die "unknown command $command; see --help"
  parse "${@:3}"
}

# Splits arguments at --: `options` before it, `given` after it. --dry_run is taken out, --help answered.
parse() {
  options=()
  given=()
  while (($#)); do
    case $1 in
      --dry_run | --dry-run) dry_run=1 ;;
      -h | --help | help)
        usage
        exit 0
        ;;
      --)
        given=("${@:2}")
        break
        ;;
      *) options+=("$1") ;;
    esac
    shift
  done
  if [[ $dry_run == 1 ]]; then
    exec 3>&1 # for `run`
  fi
}

refuse() {
  if (($#)); then
    die "unexpected argument $1; see --help (flags of the trainer come after --)"
  fi
}

names_flag() {
  local name=$1 flag
  for flag in "${given[@]}"; do
    if [[ $flag == "$name" || $flag == "$name="* ]]; then
      return 0
    fi
  done
  return 1
}

# Sets `flags`, what the trainer is called with: `given`, and before it CONFIG, WORKDIR in directory $1 and the data $2
# where `given` has none. A first word without dashes is the config.
trainer_flags() {
  local base=$1 data=$2 path
  flags=()
  if ((${#given[@]})) && [[ ${given[0]} != -* ]]; then
    given[0]=--config=${given[0]}
  fi
  names_flag --config || flags+=("--config=$CONFIG")
  if ! names_flag --workdir; then
    case $WORKDIR in
      /*) path=$WORKDIR ;;
      "$BUCKET"/*) path=$base/${WORKDIR#"$BUCKET"/} ;;
      *://*) die "WORKDIR=$WORKDIR is not in BUCKET=$BUCKET" ;;
      *) path=$base/$WORKDIR ;;
    esac
    flags+=("--workdir=$path")
  fi
  if [[ -n $data ]] && ! names_flag --config.data.data_dir; then
    flags+=("--config.data.data_dir=$data")
  fi
  flags+=("${given[@]}")
}

# Finds what the trainer would refuse in `flags`, before machines are paid for. $1: the checkout that they will run.
check_flags() {
  local directory=$1 chosen="" file i said code=0 python
  for ((i = 0; i < ${#flags[@]}; i++)); do
    case ${flags[i]} in
      --config=*) chosen=${flags[i]#*=} ;;
      --config) chosen=${flags[i + 1]:-} ;;
    esac
  done
  file=${chosen%%:*}
  if [[ ! -d $directory || ($file == /* && ! -f $file) ]]; then
    return 0 # it is not on this machine
  fi
  [[ $file == /* ]] || file=$directory/$file
  [[ -f $file ]] || die "CONFIG=$chosen: there is no file $file"

  gpu_python
  said=$(cd "$directory" && env JAX_PLATFORMS=cpu "$python" -B -m tools.check_config "${flags[@]}" 2>&1) || code=$?
  if ((code == 0)); then
    return 0
  elif ((code == 78)); then
    said=$(sed -n 's/^error: //p' <<<"$said" | tail -n 1)
  elif ((code == 130)); then
    exit "$code" # Ctrl-C
  elif needs_data "$file" && [[ " ${flags[*]}" != *" --config.data.data_dir"* ]]; then
    said="config.data.data_dir is not set"
  else # this machine has no Python with the package
    log "of $chosen only the data are checked here: $(last_lines <<<"$said")"
    return 0
  fi
  if [[ $said == "config.data.data_dir is not set"* ]]; then
    said="it needs data: set DATA_DIR, or give --config.data.data_dir=VALUE after --"
  fi
  die "$chosen: $said"
}

# Whether a config file shows that the data must be named.
needs_data() {
  grep -qF -e --config.data.data_dir= "$1"
}

# --- What an exit code of the trainer asks for (diversedit_jax/errors.py)

should_restart() {
  (($1 == 42 || ($1 >= 127 && $1 <= 255)))
}

# Of the exit codes of all processes, the one that decides. When one fails the others die of its absence, so a code
# that a restart would not mend comes before those that it would, and these before 0.
verdict() {
  local code restart=0
  for code in "$@"; do
    if ((code != 0)) && ! should_restart "$code"; then
      echo "$code"
      return
    fi
    if ((code != 0)) && ((restart == 0 || restart == 42)); then
      restart=$code
    fi
  done
  echo "$restart"
}

explain() {
  case $1 in
    0) echo "0: done" ;;
    42) echo "42: stopped and saved; the same command resumes" ;;
    65) echo "65: data or weights are missing or damaged; mend what the log names, then start again" ;;
    70) echo "70: a loss or gradient is not finite; the last good checkpoint is kept: change the config, then start again" ;;
    71) echo "71: a host or device lacks memory, threads or open files; the log says which" ;;
    74) echo "74: a checkpoint cannot be written or read; see the log, the space and the permissions of WORKDIR" ;;
    78) echo "78: a config, flag or WORKDIR that cannot be used; mend what the log names, then start again" ;;
    12[7-9] | 1[3-9][0-9] | 2[0-9][0-9]) echo "$1: crashed or killed; a restart resumes from the last checkpoint" ;;
    *) echo "$1: an error that nobody foresaw; its traceback is in the log" ;;
  esac
}

# --- GPUs

# Installs the checkout with the extras of GPUs; sets `python`.
gpu_environment() {
  # shellcheck disable=SC2016
  run env "DIVERSEDIT_EXTRAS=${EXTRAS:-cuda}" bash -euo pipefail -c 'source "$1/tools/environment.sh" && environment' \
    install "$root"
  gpu_python
}

gpu_python() {
  # shellcheck disable=SC2034
  python=${VIRTUAL_ENV:-$root/.venv}/bin/python
}

# Runs a command, passes SIGINT and SIGTERM on to it as SIGTERM, and returns its exit code. Sets `stopping` if one came.
supervise() {
  local child code=0 again=0
  stopping=0
  "$@" &
  child=$!
  trap 'stopping=1; kill -TERM "$child" 2>/dev/null || true' INT TERM
  wait "$child" || code=$?
  # A signal ends `wait` too; the exit code is then still to be had.
  while ((stopping)) && kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  if ((stopping)); then
    wait "$child" 2>/dev/null || again=$?
    if ((again != 127)); then code=$again; fi
  fi
  trap - INT TERM
  return "$code"
}

# A directory for compiled programs that only this user and this run have: who can write to it can run code.
private_cache() {
  local directory
  directory=${XDG_CACHE_HOME:-$HOME/.cache}/diversedit/xla-$(cksum <<<"$1" | cut -d " " -f 1)
  mkdir -p "$directory"
  chmod 700 "$directory"
  echo "$directory"
}
