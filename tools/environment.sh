# Sourced by run.sh and tests/run.sh from the repository's root: sets PYTHON to an interpreter that has the requirements,
# and those of the extras of pyproject.toml that EXTRAS names.
#
# An active virtual environment, or a PYTHON that lies in one, is used as it is and gets what is missing. Otherwise .venv
# is made here, with PYTHON or python3, and has what requirements.txt says, in the versions it says.

in_environment() { "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; }

install_missing() { # python, flags of tools/requirements.py
    local python=$1 missing
    missing=$("$python" tools/requirements.py "${@:2}" ${EXTRAS:-})
    [ -n "$missing" ] || return 0
    echo "installing into $("$python" -c 'import sys; print(sys.prefix)') (once; torch is large):" $missing
    if "$python" -m pip --version > /dev/null 2>&1; then
        "$python" -m pip install --quiet --disable-pip-version-check --requirement /dev/stdin <<< "$missing"
    else # an environment that uv made
        uv pip install --quiet --python "$python" --requirement - <<< "$missing"
    fi
}

if [ -n "${VIRTUAL_ENV:-}" ] && [ -z "${PYTHON:-}" ]; then
    PYTHON="$VIRTUAL_ENV/bin/python"
fi
if [ -n "${PYTHON:-}" ] && in_environment "$PYTHON"; then
    install_missing "$PYTHON"
else
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    PYTHON="$PWD/.venv/bin/python"
    install_missing "$PYTHON" --exact
fi
export PYTHON
