#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: bash launch/gke.sh COMMAND [--dry_run] [OPTIONS] [-- FLAGS]

Training on Google Kubernetes Engine with XPK (launch/README.md says what to install). GKE gets new nodes by itself;
XPK restarts the job on exit codes 42 and 127-255, up to MAX_RESTARTS times, and ends it on all others. Settings are in
launch/env (see launch/env.example). TPU7x is ACCELERATOR_TYPE=tpu7x-16.

  create              creates CLUSTER with NUM_SLICES of ACCELERATOR_TYPE, attaches BUCKET to it; takes half an hour
  image               builds the image from this checkout and pushes it to IMAGE
  run [-- FLAGS]      starts the job WORKLOAD
  status              the state of the job
  logs                follows its log; --worker=N for one worker
  stop                ends the job: SIGTERM, so that it saves, and SIGKILL after GRACE_SECONDS
  delete              deletes the cluster and its nodes; asks, unless --yes

FLAGS go to diversedit_jax.train, as in tpu.sh. BUCKET is at /bucket in the job, also for DATA_DIR=gs://BUCKET/...

Examples:
  bash launch/gke.sh create --dry_run
  bash launch/gke.sh image && bash launch/gke.sh run -- --config.total_steps=400_000
  SPOT=no FLEX_START=yes bash launch/gke.sh create
  NUM_SLICES=2 bash launch/gke.sh run -- --config.mesh.data=2 --config.mesh.fsdp=-1
  WORKLOAD=sit-b2 WORKDIR=runs/sit_b2 bash launch/gke.sh run -- configs/sit.py:b2
USAGE
}

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

storage=diversedit-bucket

xpk_cluster() {
  run xpk "$@" "--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE"
}

# Fails before anything is made if one of these programs is missing.
needs() {
  local program
  for program in "$@"; do
    if [[ $dry_run != 1 ]] && ! command -v "$program" >/dev/null; then
      die "$program is not installed: see launch/README.md, \"Google Kubernetes Engine\""
    fi
  done
}

create() {
  local capacity=--on-demand mount=implicit-dirs,rename-dir-limit=100000
  mount+=,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0,uid=$USER_ID,gid=$USER_ID
  local -a more
  words CREATE_ARGS
  if [[ -n $NETWORK$SUBNETWORK ]]; then
    more+=("--custom-cluster-arguments=${NETWORK:+--network=$NETWORK }${SUBNETWORK:+--subnetwork=$SUBNETWORK}")
  fi
  if ((FLEX_START)) && { ((SPOT)) || [[ -n $RESERVATION ]]; }; then
    die "FLEX_START=yes excludes SPOT=yes and a RESERVATION"
  fi
  if [[ -n $RESERVATION ]]; then
    capacity=--reservation=$RESERVATION
  elif ((FLEX_START)); then
    capacity=--flex
  elif ((SPOT)); then
    capacity=--spot
  fi
  xpk_cluster cluster create "--tpu-type=$ACCELERATOR_TYPE" "--num-slices=$NUM_SLICES" "$capacity" --enable-workload-identity \
    --enable-gcsfuse-csi-driver "${more[@]}"
  # The workers share one directory, and the container's user may write to it.
  xpk_cluster storage attach "$storage" --type=gcsfuse "--bucket=${BUCKET#gs://}" --mount-point=/bucket \
    --readonly=false --size=1 --auto-mount=false "--mount-options=$mount"
}

image() {
  run docker build "--build-arg=EXTRAS=${EXTRAS:-tpu}" "--build-arg=USER_ID=$USER_ID" "--file=$launch/Dockerfile" \
    "--tag=$IMAGE" "$root"
  run docker push "$IMAGE"
}

run_workload() {
  local data=$DATA_DIR command
  case $data in
    "$BUCKET"/*) data=/bucket/${data#"$BUCKET"/} ;;
    gs://*) die "DATA_DIR=$data is not in BUCKET=$BUCKET" ;;
  esac
  trainer_flags /bucket "$data"
  command=$(quote python -m diversedit_jax.train "${flags[@]}")
  [[ $command != *$'\n'* ]] || die "a flag has a line break, which would end a line of XPK's YAML: $command"
  [[ $command != *\$[\$\(]* ]] || die "a flag has \$( or \$\$, which Kubernetes replaces: $command"
  check_flags "$root"
  # 42 and 127-255 are the exit codes that XPK restarts on; the cache lives and dies with its container.
  xpk_cluster workload create "--workload=$WORKLOAD" "--tpu-type=$ACCELERATOR_TYPE" "--num-slices=$NUM_SLICES" \
    "--docker-image=$IMAGE" "--max-restarts=$MAX_RESTARTS" "--termination-grace-period-seconds=$GRACE_SECONDS" \
    "--storage=$storage" --env=JAX_COMPILATION_CACHE_DIR=/tmp/xla-cache \
    "--command=$command"
}

logs() {
  local selector=jobset.sigs.k8s.io/jobset-name=$WORKLOAD
  if [[ -n $worker ]]; then
    selector+=,batch.kubernetes.io/job-completion-index=$worker
  fi
  run gcloud container clusters get-credentials "$CLUSTER" "--region=${ZONE%-*}" "--project=$PROJECT"
  run kubectl logs --follow --prefix --tail=100 --max-log-requests=256 --all-containers "--selector=$selector"
}

main() {
  local command option worker="" yes=0
  local -a options given flags=()
  read_command "create image run status logs stop delete" "$@"
  for option in "${options[@]}"; do
    case $command$option in
      logs--worker=*) worker=${option#*=} ;;
      delete--yes) yes=1 ;;
      *) refuse "$option" ;;
    esac
  done
  [[ $command == run || ${#given[@]} -eq 0 ]] || die "$command takes no flags of the trainer"
  load_env
  [[ -z $worker ]] || whole_numbers 0 worker
  required PROJECT ZONE CLUSTER WORKLOAD
  case $command in
    image) needs docker ;;
    logs) needs gcloud kubectl gke-gcloud-auth-plugin ;;
    *) needs xpk gcloud kubectl gke-gcloud-auth-plugin ;;
  esac
  case $command in
    create)
      required ACCELERATOR_TYPE BUCKET
      check_bucket
      create
      ;;
    image) required IMAGE && image ;;
    run)
      required ACCELERATOR_TYPE BUCKET IMAGE
      check_bucket
      run_workload
      ;;
    status) xpk_cluster workload list "--filter-by-job=$WORKLOAD" ;;
    logs) logs ;;
    stop) xpk_cluster workload delete "--workload=$WORKLOAD" --force ;;
    delete)
      if ((!yes)) && [[ $dry_run != 1 ]]; then
        confirm "Delete the cluster $CLUSTER in $PROJECT, all its nodes and all jobs on it?" || die "not deleted"
      fi
      xpk_cluster cluster delete --force
      ;;
  esac
}

main "$@"
