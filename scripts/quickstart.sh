#!/usr/bin/env bash
# Both stages of RoMo on scikit-learn's handwritten digits, on the CPU: environment, data, step 1, step 2, evaluation.
# SEED=1 bash scripts/quickstart.sh repeats it with another seed.
source "$(dirname "$0")/environment.sh"
SEED="${SEED:-0}"
RUNS="runs/quickstart-$(date -u +%Y%m%dT%H%M%SZ)-seed$SEED"
SETTINGS=(run.seed="$SEED" run.device=cpu run.output="$RUNS")
started=$SECONDS

"$PYTHON_BIN" -m datasets.prepare_digits

echo "== Step 1: pseudo-label annotation"
"$PYTHON_BIN" train_step1.py --config configs/digits/step1.yaml --set "${SETTINGS[@]}"

echo "== Step 2: robust learning from the pseudo-labels"
"$PYTHON_BIN" train_step2.py --config configs/digits/step2.yaml --set "${SETTINGS[@]}"

echo "== Evaluation: test scores of the last epochs, label-free training"
"$PYTHON_BIN" evaluate.py --device cpu --run "$RUNS"/digits/step1/* "$RUNS"/digits/step2/*
echo "Figures:"
ls "$RUNS"/digits/step*/*/figures/*.png
echo "Finished in $(( (SECONDS - started) / 60 )) min $(( (SECONDS - started) % 60 )) s (installation not counted)."
