#!/usr/bin/env bash
# A whole study in about a minute on two CPU cores, from nothing: data, learning-rate sweep, training, fine-tuning, evaluation,
# tables and page, with both controls (configs/study/smoke.yaml). Its numbers mean nothing.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
OUT=runs/study-smoke
# One thread per process: two processes on two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

rm -rf "$OUT"
SHORT=1 ONLY_DATA=data/study-smoke bash quickstart.sh
"$PYTHON" -m mhmoe_vl.study --config configs/study/smoke.yaml --workers 2 --document $OUT/RESULTS.md
cat $OUT/study.md
