#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: bash tools/test.sh [options of pytest]

Installs what is needed, checks format and style, and runs the tests on the CPU, one process for each core.

  bash tools/test.sh                    all but the slow tests
  bash tools/test.sh -m slow            the slow tests
  bash tools/test.sh tests/models/test_dit.py -x -n0    one file, up to the first failure, in one process

  PYTHON, DIVERSEDIT_EXTRAS, DIVERSEDIT_LATEST: see tools/environment.sh
USAGE
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  usage
  exit
fi

# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment test

cd "$root"
"$python" -m ruff format --check .
"$python" -m ruff check .
# Of two -m options pytest takes the last; likewise of -n, the number of processes.
"$python" -m pytest -m "not slow" -n auto --dist worksteal "$@"
