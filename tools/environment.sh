# Sourced by run.sh and tests/run.sh from the repository's root: sets PYTHON to an interpreter that has the requirements.
#
# An active virtual environment, or a PYTHON that lies in one, is used as it is and gets the requirements only if some are
# missing. Otherwise .venv is made here, with PYTHON or python3, and filled once.

in_environment() { "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; }

has_requirements() {
    "$1" -c 'import accelerate, datasets, gguf, huggingface_hub, jinja2, lm_eval, matplotlib, numpy, pyarrow, pytest, ruff, xdist, safetensors, setuptools.command.bdist_wheel, tensorboard, torch, tqdm, transformers, wandb' 2>/dev/null
}

install_requirements() {
    echo "installing requirements.txt into $1 (once; torch is large)"
    "$2" -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
}

if [ -n "${VIRTUAL_ENV:-}" ] && [ -z "${PYTHON:-}" ]; then
    PYTHON="$VIRTUAL_ENV/bin/python"
fi
if [ -n "${PYTHON:-}" ] && in_environment "$PYTHON"; then
    has_requirements "$PYTHON" || install_requirements "the environment of $PYTHON" "$PYTHON"
else
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    PYTHON="$PWD/.venv/bin/python"
    if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
        install_requirements .venv "$PYTHON"
        cp requirements.txt .venv/installed-requirements.txt
    fi
fi
export PYTHON
