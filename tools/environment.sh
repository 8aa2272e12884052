# shellcheck shell=bash
# The virtual environment of the scripts in tools/: source this file, then call `environment [EXTRAS]`.
# Afterwards "$python" has this repository and its dependencies, and "$root" is the repository.
#
#   VIRTUAL_ENV           an active virtual environment is used as it is; otherwise .venv in the repository is made
#   PYTHON                the Python that makes .venv (default: the first of candidates that is new enough)
#   DIVERSEDIT_EXTRAS     extras of setup.py to install besides, for example `cuda` or `tpu`
#   DIVERSEDIT_LATEST=yes the newest releases instead of the versions in constraints.txt

unset CDPATH # with it, cd goes elsewhere
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Images of containers set it: Python would compile jax and all that it imports anew at every start, for 3 seconds.
unset PYTHONDONTWRITEBYTECODE
candidates=(python3.11 python3.12 python3.13 python3.14 python3 python)

# Makes settings 1 or 0, however yes or no is written.
yes_or_no() {
  local name
  for name in "$@"; do
    case ${!name:-} in
      1 | [yY][eE][sS] | [tT][rR][uU][eE]) printf -v "$name" 1 ;;
      0 | [nN][oO] | [fF][aA][lL][sS][eE] | "") printf -v "$name" 0 ;;
      *)
        echo "error: $name=${!name}: wanted yes, true or 1, or no, false, 0 or nothing" >&2
        return 1
        ;;
    esac
  done
}

# The last lines of what it reads, as one line.
last_lines() {
  grep '[^[:space:]]' | tail -n 8 | paste -s -d " " - | tr -s " " || true
}

# Runs a command without its output. If it fails, prints its last lines as one line, and fails with its exit code.
quietly() {
  local output code=0
  output=$("$@" 2>&1) || code=$?
  if ((code)); then
    output=$(last_lines <<<"$output")
    echo "${output:-exit code $code, without a word}"
  fi
  return "$code"
}

# Prints the version of a Python; true if it is new enough. It is run, not only looked up: a pyenv shim can be on PATH
# without a Python behind it, and says so.
python_version() {
  local why
  why=$(quietly "$1" -c "") || {
    echo "does not run: $why"
    return 1
  }
  "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 11))'
}

find_python() {
  local candidate found="" version why
  if [[ -n ${PYTHON:-} ]]; then
    local candidates=("$PYTHON")
  fi
  for candidate in "${candidates[@]}"; do
    command -v "$candidate" >/dev/null || continue
    if version=$(python_version "$candidate"); then
      if why=$(quietly "$candidate" -c "import ensurepip, venv"); then
        echo "$candidate"
        return
      fi
      version+=" without venv: on Debian, apt-get install python3-venv; it says: $why"
    fi
    found+="${found:+, }$candidate ($version)"
  done
  echo "Python 3.11 or newer is needed; found ${found:-none of: ${candidates[*]}}." \
    "Set PYTHON to one, or activate a virtual environment." >&2
  return 1
}

# Makes .venv unless it is there. The marker tells one whose making was interrupted, which is made again, from one
# that somebody else made, which is left alone.
make_venv() {
  local venv=$1 base marker=$1/.unfinished
  if [[ -d $venv && ! -e $marker ]]; then
    return
  fi
  base=$(find_python) || return 1
  echo "Making $venv with $base" >&2
  mkdir -p "$venv" && touch "$marker" &&
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .unfinished -exec rm -rf {} + &&
    "$base" -m venv "$venv" && rm "$marker"
}

# Installs the repository with `extras` unless the stamp says that it was done, from the same files, before. The
# stamp's first line stands for all that an installation depends on; the others are the extras that it has.
install() {
  local venv=$1 extras=$2 stamp=$1/.diversedit_installed log=$1/.diversedit_installed.log inputs before="" pip_options
  inputs=$(
    cd "$root" && {
      "$python" --version
      echo "$root latest=$DIVERSEDIT_LATEST"
      cat setup.py constraints.txt
    } | cksum
  )
  if [[ -f $stamp && $(head -n 1 "$stamp") == "$inputs" ]]; then
    if [[ -z $extras ]] || grep -qxF -- "[$extras]" "$stamp"; then
      return
    fi
    before=$(tail -n +2 "$stamp")
  fi
  if ((DIVERSEDIT_LATEST)); then
    pip_options=(--upgrade --upgrade-strategy eager)
  else
    pip_options=(--constraint "$root/constraints.txt")
  fi
  echo "Installing into $venv (about a minute the first time)" >&2
  rm -f "$stamp"
  # Python compiles what it imports; to compile all that is installed takes half a minute.
  "$python" -m pip install --no-compile --disable-pip-version-check --progress-bar off "${pip_options[@]}" \
    --editable "$root${extras:+[$extras]}" >"$log" 2>&1 || {
    tail -n 25 "$log" >&2
    echo "The installation into $venv failed; pip's last lines are above, all of them in $log" >&2
    return 1
  }
  printf '%s\n' "$inputs" "[$extras]" ${before:+"$before"} >"$stamp"
}

environment() {
  local venv=${VIRTUAL_ENV:-$root/.venv} extras=${1:-} remedy="deactivate it" version wanted why
  yes_or_no DIVERSEDIT_LATEST || return 1
  if [[ -n ${DIVERSEDIT_EXTRAS:-} ]]; then
    extras+=${extras:+,}$DIVERSEDIT_EXTRAS
  fi
  if [[ -z ${VIRTUAL_ENV:-} ]]; then
    remedy="remove it"
    make_venv "$venv" || return 1
  fi
  python=$venv/bin/python
  version=$(python_version "$python") || {
    echo "Python 3.11 or newer is needed, but that of $venv is: $version; $remedy." >&2
    return 1
  }
  if [[ -n ${PYTHON:-} ]]; then
    wanted=$(python_version "$PYTHON") || true
    if [[ $wanted != "$version" ]]; then
      echo "PYTHON=$PYTHON ($wanted) is not the Python of $venv ($version): $remedy, or unset PYTHON." >&2
      return 1
    fi
  fi
  why=$(quietly "$python" -c "import pip") || {
    echo "$venv has no pip: run '$python -m ensurepip', or $remedy. It says: $why" >&2
    return 1
  }
  install "$venv" "$extras"
}
