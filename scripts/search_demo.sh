#!/usr/bin/env bash
# Indexes the test half of the quick start's digits with its newest run, and opens the search page on 127.0.0.1: draw a digit there.
# RUN=runs/... takes another run; PORT=7860.
REQUIREMENTS="requirements.txt requirements-search.txt"
source "$(dirname "$0")/environment.sh"
RUN="${RUN:-$(ls -td runs/quickstart-*/digits/step2/*/ 2>/dev/null | head -n 1 || true)}"
[ -n "$RUN" ] || { echo "No run yet: bash scripts/quickstart.sh trains one in minutes." >&2; exit 2; }
INDEX="runs/search/$(basename "$RUN")"
"$PYTHON_BIN" search.py build --run "$RUN" --collection dataset/digits/digits_PointCloud_test_list.txt --index "$INDEX"
echo "== Open http://127.0.0.1:${PORT:-7860} and draw a digit (Ctrl-C ends it)"
exec "$PYTHON_BIN" search.py serve "$INDEX" --port "${PORT:-7860}"
