#!/usr/bin/env bash
# Lint, formatting and the test suite; further arguments go to pytest. Installs what they need, trackers included.
# Tests marked slow (the pages' long commands, a real language model from PyPI) wait for `-m slow`, or `-m ""` with the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="dev track export"
source tools/environment.sh

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal -m "not slow" "$@"
