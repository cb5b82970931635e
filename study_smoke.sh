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
"$PYTHON" -m data_prep.make_scenes --out $DATA/scenes --workers 2 --num-train-images 160 --num-val-images 40 \
  --num-train-statements 1 --num-val-statements 1 --num-train-texts 1 --num-val-texts 1
pack() {
  local split=$1
  shift
  "$PYTHON" -m data_prep.pack_pairs --coco $DATA/scenes/captions_$split.json --images $DATA/scenes/images/$split \
    --out $DATA/pairs-$split
  "$PYTHON" -m data_prep.pack_vqa --questions $DATA/scenes/vqa_${split}_questions.json \
    --annotations $DATA/scenes/vqa_${split}_annotations.json --images $DATA/scenes/images/$split \
    --image-pattern 'COCO_{data_subtype}_{image_id:012d}.png' --out $DATA/vqa-$split "$@"
}
pack train --min-answer-count 1
"$PYTHON" -m data_prep.fit_visual_codebook --shards $DATA/pairs-train --num-codes 64 --image-size 64 --patch-size 16 \
  --out $DATA/visual_codebook.safetensors &
fitting=$!
pack val --answers $DATA/vqa-train/answers.json
"$PYTHON" -m data_prep.train_text_tokenizer $DATA/pairs-train $DATA/vqa-train --vocab-size 448 --lowercase \
  --out $DATA/tokenizer.json
wait $fitting

"$PYTHON" -m mhmoe_vl.study --config configs/study/smoke.yaml --workers 2
cat $OUT/study.md
