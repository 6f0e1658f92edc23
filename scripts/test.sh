#!/usr/bin/env bash
# Lint rules, import directions and the test suite, in the same environment as the quick start. Arguments go to pytest.
REQUIREMENTS="requirements.txt requirements-test.txt"
source "$(dirname "$0")/environment.sh"
"$PYTHON_BIN" -m ruff check .
"$VENV/bin/lint-imports" --no-cache
export OMP_NUM_THREADS=1 # the processes share the cores
exec "$PYTHON_BIN" -m pytest -q -n 2 --dist loadfile "$@"
