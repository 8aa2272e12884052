#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: bash launch/slurm.sh COMMAND [--dry_run] [-- FLAGS]

Training on GPU nodes under SLURM, from a checkout on a file system that all nodes see. Settings are in launch/env (see
launch/env.example): NODES, GPUS_PER_NODE, CPUS_PER_TASK, TIME_LIMIT, SBATCH_ARGS.

  install             installs the checkout with the extra cuda, on this machine
  submit [-- FLAGS]   submits a job with one task a node, which drives all GPUs of the node. Two minutes before
                      TIME_LIMIT, and at preemption, it saves; then, and after a crash, it is queued again and resumes,
                      up to MAX_RESTARTS times
  status              your jobs of this checkout
  logs JOB            follows the log of a job
  stop JOB            SIGTERM to its tasks, which save; it is not queued again

FLAGS go to diversedit_jax.train. A relative WORKDIR lies in the checkout; logs are in runs/slurm.

Examples:
  bash launch/slurm.sh install
  NODES=2 SBATCH_ARGS=--partition=gpu bash launch/slurm.sh submit -- --config.data.data_dir=/data/latents
  bash launch/slurm.sh stop 1234
USAGE
}

# A job runs a copy of this script that SLURM keeps elsewhere, and is told where the checkout is.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "${DIVERSEDIT_LAUNCH:-$(dirname "${BASH_SOURCE[0]}")}/common.sh"
# shellcheck source-path=SCRIPTDIR source=xla_flags.sh
source "$launch/xla_flags.sh"

logs=$root/runs/slurm

submit() {
  local more
  [[ $DATA_DIR != gs://* ]] || die "DATA_DIR=$DATA_DIR: give a path that the nodes see"
  [[ $root != *\\* ]] || die "$root: sbatch cannot write a log below a folder with a backslash in its name"
  words SBATCH_ARGS
  trainer_flags "$root" "$DATA_DIR"
  check_flags "$root"
  run mkdir -p "$logs"
  # In the environment, for sbatch splits --export at commas. In --output it replaces what follows a %.
  # --signal without B: goes to the tasks, not to the script, which is to see their exit codes.
  run env "DIVERSEDIT_LAUNCH=$launch" "LAUNCH_ENV=${LAUNCH_ENV:-}" sbatch --export=ALL --job-name=diversedit \
    "--nodes=$NODES" --ntasks-per-node=1 "--gpus-per-node=$GPUS_PER_NODE" "--cpus-per-task=$CPUS_PER_TASK" \
    "--time=$TIME_LIMIT" --signal=TERM@120 --requeue --open-mode=append "--output=${logs//%/%%}/%j.log" "${more[@]}" \
    "$launch/slurm.sh" job -- "${flags[@]}"
}

# In the job, on its first node.
job() {
  local codes=() code i devices directory=$logs/$SLURM_JOB_ID
  mkdir -p "$directory"
  rm -f "$directory"/exit_code.*
  xla_flags gpu
  JAX_COMPILATION_CACHE_DIR=$(private_cache "${flags[*]}")
  export JAX_COMPILATION_CACHE_DIR
  # One task a node: data are read, and a checkpoint is written, once a node. jax, which sees SLURM, would give a task
  # the one GPU of its own number; this names them all.
  devices=$(seq -s , 0 $((GPUS_PER_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS=$devices
  log "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): diversedit_jax.train $(quote "${flags[@]}")"

  trap : TERM # at preemption this script is to see what the tasks do
  # Not --kill-on-bad-exit: the first task that has saved would kill those that still save.
  # It must be told the CPUs again: since 22.05 srun does not take them from sbatch.
  srun --ntasks-per-node=1 "--cpus-per-task=$CPUS_PER_TASK" "--wait=$STOP_SECONDS" bash "$launch/slurm.sh" task -- "${flags[@]}" || true

  for ((i = 0; i < ${SLURM_NTASKS:-$NODES}; i++)); do
    if [[ -s $directory/exit_code.$i ]]; then
      codes+=("$(<"$directory/exit_code.$i")")
    else
      codes+=(137) # killed together with its shell
    fi
  done
  code=$(verdict "${codes[@]}")
  log "exit codes ${codes[*]}; $(explain "$code")"
  if [[ -e $directory/stop ]]; then
    log "stopped as asked; submit again to resume"
  elif should_restart "$code"; then
    if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
      log "gave up after $MAX_RESTARTS restarts"
    else
      run scontrol requeue "$SLURM_JOB_ID"
    fi
  fi
  exit "$code"
}

# In the job, once on each node.
task() {
  local code=0 python stopping
  gpu_python
  cd "$root"
  supervise "$python" -m diversedit_jax.train "${flags[@]}" || code=$?
  echo "$code" >"$logs/$SLURM_JOB_ID/exit_code.$SLURM_PROCID"
  exit "$code"
}

main() {
  local command id
  local -a options given flags=()
  read_command "install submit job task status logs stop" "$@"
  load_env
  case $command in
    logs | stop)
      id=${options[0]:-}
      [[ $id =~ ^[0-9_]+$ ]] || die "$command: which job? See status"
      refuse "${options[@]:1}"
      ;;
    *) refuse "${options[@]}" ;;
  esac
  case $command in
    install) gpu_environment ;;
    submit) submit ;;
    job | task)
      flags=("${given[@]}")
      "$command"
      ;;
    status) run squeue --me --name=diversedit ;;
    logs) run tail -n 100 -F "$logs/$id.log" ;;
    stop)
      run mkdir -p "$logs/$id"
      run touch "$logs/$id/stop"
      run scancel --signal=TERM "$id"
      ;;
  esac
}

main "$@"
