#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: bash launch/gpu_node.sh COMMAND [--dry_run] [OPTIONS] [-- FLAGS]

Training on one machine with GPUs, from this checkout. Settings are in launch/env (see launch/env.example).

  install             installs the checkout with the extra cuda in .venv (EXTRAS=cuda12 for drivers older than CUDA 13)
  run [-- FLAGS]      installs, and trains on all GPUs in the foreground; after exit codes 42 and 127-255 starts again
                      and resumes, and ends on all others with that code. Ctrl-C and SIGTERM save, and end with 42
      --max_restarts=N    restarts before it gives up (MAX_RESTARTS, 50)

FLAGS go to diversedit_jax.train. A relative WORKDIR lies in the checkout.

Examples:
  bash launch/gpu_node.sh run -- --config.data.data_dir=/data/latents
  tmux new -d -s train bash launch/gpu_node.sh run -- configs/sit.py:b2 --workdir=/data/runs/sit_b2
  CUDA_VISIBLE_DEVICES=0 bash launch/gpu_node.sh run -- configs/digits.py --workdir=runs/digits
USAGE
}

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source-path=SCRIPTDIR source=xla_flags.sh
source "$launch/xla_flags.sh"

run_training() {
  local restarts=0 failures=0 began code stopping python
  [[ $DATA_DIR != gs://* ]] || die "DATA_DIR=$DATA_DIR: copy it to this machine, and give that path"
  trainer_flags "$root" "$DATA_DIR"
  xla_flags gpu
  gpu_environment
  cd "$root"
  if [[ $dry_run == 1 ]]; then
    run env "XLA_FLAGS=$XLA_FLAGS" "XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION" \
      "$python" -m diversedit_jax.train "${flags[@]}"
    return
  fi
  JAX_COMPILATION_CACHE_DIR=$(private_cache "${flags[*]}")
  export JAX_COMPILATION_CACHE_DIR
  while true; do
    began=$SECONDS
    code=0
    supervise "$python" -m diversedit_jax.train "${flags[@]}" || code=$?
    log "exit code $(explain "$code")"
    if ((stopping)) || ! should_restart "$code"; then
      exit "$code"
    fi
    if ! restart_pause "$began" ""; then
      log "gave up after $restarts restarts"
      exit "$code"
    fi
  done
}

main() {
  local command option
  local -a options given flags=()
  read_command "install run" "$@"
  load_env
  for option in "${options[@]}"; do
    case $command$option in
      run--max_restarts=*) MAX_RESTARTS=${option#*=} ;;
      *) refuse "$option" ;;
    esac
  done
  whole_numbers 0 MAX_RESTARTS
  case $command in
    install) gpu_environment ;;
    run) run_training ;;
  esac
}

main "$@"
