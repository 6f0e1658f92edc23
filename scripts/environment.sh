# Sourced by the other scripts: makes .venv in the repository root and installs requirements.txt into it once.
# ROMO_VENV names another folder for the environment; PYTHON another interpreter to make it with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${ROMO_VENV:-.venv}"
STAMP="$VENV/requirements.installed"
if ! cmp -s requirements.txt "$STAMP"; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; name another with PYTHON=...") if sys.version_info < (3, 11) else None'
    echo "Installing requirements.txt into $VENV (several minutes and about 5 GB the first time) ..."
    [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$STAMP"
fi
PYTHON_BIN="$VENV/bin/python"
