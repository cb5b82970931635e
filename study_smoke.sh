#!/usr/bin/env bash
# A whole study in two minutes on two CPU cores, from nothing: data, learning-rate sweep, training, fine-tuning, evaluation,
# tables and page, with both controls (configs/study/smoke.yaml). Its numbers mean nothing.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
DATA=data/study-smoke
OUT=runs/study-smoke
# One thread per process: two processes on two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

rm -rf "$DATA" "$OUT"
"$PYTHON" -m data_prep.make_scenes --out $DATA/scenes --num-train-images 120 --num-val-images 20 \
  --num-train-statements 1 --num-val-statements 1 --num-train-texts 1 --num-val-texts 1
pack_pairs() {
  local split=$1
  "$PYTHON" -m data_prep.pack_pairs --coco $DATA/scenes/captions_$split.json --images $DATA/scenes/images/$split \
    --out $DATA/pairs-$split
}
pack_vqa() {
  local split=$1
  shift
  "$PYTHON" -m data_prep.pack_vqa --questions $DATA/scenes/vqa_${split}_questions.json \
    --annotations $DATA/scenes/vqa_${split}_annotations.json --images $DATA/scenes/images/$split \
    --image-pattern 'COCO_{data_subtype}_{image_id:012d}.png' --out $DATA/vqa-$split "$@"
}
# Side by side: most of the time is that of starting Python.
{
  pack_vqa train --min-answer-count 1
  pack_vqa val --answers $DATA/vqa-train/answers.json
  pack_pairs val
} &
packing=$!
pack_pairs train
"$PYTHON" -m data_prep.fit_visual_codebook --shards $DATA/pairs-train --num-codes 64 --image-size 64 --patch-size 16 \
  --out $DATA/visual_codebook.safetensors
wait $packing
"$PYTHON" -m data_prep.train_text_tokenizer $DATA/pairs-train $DATA/vqa-train --vocab-size 448 --lowercase \
  --out $DATA/tokenizer.json

"$PYTHON" -m mhmoe_vl.study --config configs/study/smoke.yaml --workers 2 --document $OUT/RESULTS.md
cat $OUT/study.md
