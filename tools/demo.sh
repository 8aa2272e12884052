#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: bash tools/demo.sh [captioned_digits | solids] [options of diversedit_jax.train, such as --config.total_steps=200]

Installs what is needed and trains the default model on handwritten digits, then says where the samples are.
With captioned_digits: a text-to-image model, on digits by colour, size and place.
With solids: a model of volumes, on solids in a grid of voxels.

  WORKDIR=DIR           where the run is kept (default: runs/digits in the repository, or runs/NAME of the example); a run
                        found there is resumed
  PYTHON, DIVERSEDIT_EXTRAS, DIVERSEDIT_LATEST: see tools/environment.sh
USAGE
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  usage
  exit
fi

recipe=digits extras=""
if [[ ${1:-} == captioned_digits ]]; then
  recipe=$1 extras=text
  shift
elif [[ ${1:-} == solids ]]; then
  recipe=$1
  shift
fi

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
