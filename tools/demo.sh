#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: bash tools/demo.sh [RECIPE] [options of diversedit_jax.train, such as --config.total_steps=200]

Installs what is needed and trains the default model on handwritten digits, then says where the samples are.
RECIPE:
  captioned_digits      a text-to-image model, on digits by colour, size and place
  moving_digits         a model of videos, on digits that move and bounce
  solids                a model of volumes, on solids in a grid of voxels

  WORKDIR=DIR           where the run is kept (default: runs/RECIPE in the repository, or runs/digits); a run found there
                        is resumed
  PYTHON, DIVERSEDIT_EXTRAS, DIVERSEDIT_LATEST: see tools/environment.sh
USAGE
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  usage
  exit
fi

recipe=digits extras=""
case ${1:-} in
  captioned_digits) recipe=$1 extras=text && shift ;;
  moving_digits | solids) recipe=$1 && shift ;;
esac

# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment "$extras"

workdir=${WORKDIR:-$root/runs/$recipe}
case $workdir in
  /* | *://*) ;;
  *) workdir=$PWD/$workdir ;; # relative to where the script was called
esac

cd "$root"
exec "$python" -m diversedit_jax.train --config="configs/$recipe.py" --workdir="$workdir" "$@"
