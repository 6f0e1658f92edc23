# Sourced by the other scripts: makes .venv in the repository root and installs requirements.txt into it once, or the files in REQUIREMENTS.
# ROMO_VENV names another folder for the environment; PYTHON another interpreter to make it with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${ROMO_VENV:-.venv}"
PYTHON_BIN="$VENV/bin/python"
for file in ${REQUIREMENTS:-requirements.txt}; do
    if ! cmp -s "$file" "$VENV/$file.installed"; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; name another with PYTHON=...") if sys.version_info < (3, 11) else None'
        echo "Installing $file into $VENV (requirements.txt: several minutes and about 5 GB the first time) ..."
        [ -x "$PYTHON_BIN" ] || "${PYTHON:-python3}" -m venv "$VENV"
        "$PYTHON_BIN" -m pip install --quiet --disable-pip-version-check -r "$file"
        cp "$file" "$VENV/$file.installed"
    fi
done
