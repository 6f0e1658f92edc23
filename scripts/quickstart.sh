#!/usr/bin/env bash
# Both stages of RoMo on scikit-learn's handwritten digits, on the CPU: environment, data, step 1, step 2, evaluation.
# SEED=1 bash scripts/quickstart.sh repeats it with another seed.
source "$(dirname "$0")/environment.sh"
SEED="${SEED:-0}"
RUNS="runs/quickstart-$(date -u +%Y%m%dT%H%M%SZ)-seed$SEED"
mkdir -p "$RUNS"
started=$SECONDS

"$PYTHON_BIN" -m datasets.prepare_digits

# One thread each: the baseline runs beside step 1 on the second core.
echo "== Step 1: pseudo-label annotation; beside it, its baseline with lambda_1 = 0 (modality-invariance loss alone)"
"$PYTHON_BIN" train_step1.py --config configs/digits/step1.yaml --set run.seed="$SEED" run.threads=1 run.device=cpu \
    run.output="$RUNS/mlm_alone" pla.lambda_1=0 run.figures=false \
    > "$RUNS/mlm_alone.log" 2>&1 &
baseline=$!
trap 'kill "$baseline" 2>/dev/null || true' EXIT
"$PYTHON_BIN" train_step1.py --config configs/digits/step1.yaml --set run.seed="$SEED" run.threads=1 run.device=cpu \
    run.output="$RUNS"
wait "$baseline" || { cat "$RUNS/mlm_alone.log"; exit 1; }

echo "== Step 2: robust learning from the pseudo-labels"
"$PYTHON_BIN" train_step2.py --config configs/digits/step2.yaml --set run.seed="$SEED" run.device=cpu \
    run.output="$RUNS"

echo "== Evaluation: test scores of the last epochs, label-free training"
"$PYTHON_BIN" evaluate.py --device cpu --run "$RUNS"/mlm_alone/digits/step1/* "$RUNS"/digits/step1/* "$RUNS"/digits/step2/*
echo "Figures:"
ls "$RUNS"/digits/step*/*/figures/*.png
echo "Finished in $(( (SECONDS - started) / 60 )) min $(( (SECONDS - started) % 60 )) s (installation not counted)."
