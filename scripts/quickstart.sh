#!/usr/bin/env bash
# Both stages of RoMo on scikit-learn's handwritten digits, on the CPU: environment, data, step 1, step 2, evaluation.
source "$(dirname "$0")/environment.sh"
SEED="${SEED:-0}"
RUNS="runs/quickstart-$(date -u +%Y%m%dT%H%M%SZ)-seed$SEED"
COMMON=("run.seed=$SEED" "run.output=$RUNS")
started=$SECONDS

"$PYTHON_BIN" -m datasets.prepare_digits

echo "== Baseline: step 1 with lambda_1 = 0, the modality-invariance loss (MLM) alone"
"$PYTHON_BIN" train_step1.py --config configs/digits/step1.yaml \
    --set "${COMMON[@]}" "run.output=$RUNS/mlm_only" "run.pseudo_labels=$RUNS/mlm_only/pseudo_labels" pla.lambda_1=0 run.eval_every=0 run.figures=false
echo "== Step 1: pseudo-label annotation"
"$PYTHON_BIN" train_step1.py --config configs/digits/step1.yaml --set "${COMMON[@]}" "run.pseudo_labels=$RUNS/pseudo_labels"
echo "== Step 2: robust learning from the pseudo-labels"
"$PYTHON_BIN" train_step2.py --config configs/digits/step2.yaml --set "${COMMON[@]}" "rdl.pseudo_labels=$RUNS/pseudo_labels"

echo "== Evaluation of the last epochs"
"$PYTHON_BIN" evaluate.py --run "$RUNS"/mlm_only/digits/step1/* "$RUNS"/digits/step1/* "$RUNS"/digits/step2/*
echo "Figures:"
ls "$RUNS"/digits/step*/*/figures/*.png
echo "Finished in $(( (SECONDS - started) / 60 )) min $(( (SECONDS - started) % 60 )) s (installation not counted)."
