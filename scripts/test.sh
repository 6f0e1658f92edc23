#!/usr/bin/env bash
# The test suite, in the same environment as the quick start. Arguments go to pytest.
source "$(dirname "$0")/environment.sh"
exec "$PYTHON_BIN" -m pytest -q "$@"
