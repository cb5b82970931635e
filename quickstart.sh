#!/usr/bin/env bash
# From nothing to a report on two CPU cores: sample data, shards, tokenizers, pretraining, three fine-tunings, three
# evaluations. Every line is the command that real data take too (docs/real_data.md).
#
#   bash quickstart.sh          5.8 to 7.7 minutes, in other hours up to a third more, 2.8 GB on two cores (docs/EXPERIMENTS.md)
#   SHORT=1 bash quickstart.sh  every step, a few training steps each: for CI, scores mean nothing
#   ONLY_DATA=FOLDER bash quickstart.sh  stops when the data are in FOLDER, which is made anew
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
DATA=${ONLY_DATA:-data/quickstart}
RUNS=runs/quickstart
PROCESSES=${PROCESSES:-2}
# One thread per process: two processes on two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ -n "${SHORT:-}" ]; then
  scene_options=(--num-train-images 300 --num-val-images 40 --num-train-statements 60 --num-val-statements 20 --num-train-texts 400 --num-val-texts 40)
  step_options=(max_steps=12 optimizer.warmup_steps=2 log_every=4 data.batch_size=48 validate_every=6)
  codes=64 size=short
else
  scene_options=()
  step_options=()
  codes=256 size=full
fi

say() { printf '\n== %s\n' "$*" >&2; }
# train PROCESSES CONFIG OVERRIDES...
train() {
  local processes=$1 config=$2
  shift 2
  # One process needs no torchrun, which takes seconds to start.
  local launch=(-m)
  if [ "$processes" -gt 1 ]; then
    launch=(-m torch.distributed.run --standalone --nproc-per-node "$processes" -m)
  fi
  "$PYTHON" "${launch[@]}" mhmoe_vl.train \
    --config "configs/quickstart/$config.yaml" model.num_visual_codes=$codes "$@" "${step_options[@]}"
}

rm -rf "$DATA"
say "sample data: rendered scenes in the official COCO, VQAv2 and NLVR2 file formats"
"$PYTHON" -m data_prep.make_scenes --out $DATA/scenes --num-colors 5 --workers 2 "${scene_options[@]}"

say "shards"
pack_images() {
  "$PYTHON" -m data_prep.pack_images --images $DATA/scenes/images/$1 --out $DATA/images-$1
}
pack_text() {
  "$PYTHON" -m data_prep.pack_text $DATA/scenes/text_$1.txt --out $DATA/text-$1
}
pack_pairs() {
  "$PYTHON" -m data_prep.pack_pairs --coco $DATA/scenes/captions_$1.json --images $DATA/scenes/images/$1 --out $DATA/pairs-$1
}
pack_nlvr2() {
  "$PYTHON" -m data_prep.pack_nlvr2 --examples $DATA/scenes/nlvr2_$1.json --images $DATA/scenes/images --out $DATA/nlvr2-$1
}
pack_vqa() {
  local split=$1
  shift
  "$PYTHON" -m data_prep.pack_vqa --questions $DATA/scenes/vqa_${split}_questions.json \
    --annotations $DATA/scenes/vqa_${split}_annotations.json --images $DATA/scenes/images/$split \
    --image-pattern 'COCO_{data_subtype}_{image_id:012d}.png' --out $DATA/vqa-$split "$@"
}
# Two at a time, on two cores.
{
  pack_vqa train --min-answer-count 1
  pack_vqa val --answers $DATA/vqa-train/answers.json
  pack_pairs train
  pack_images val
} &
packing=$!
pack_nlvr2 train
pack_nlvr2 val
pack_images train
pack_text train
pack_text val
pack_pairs val
wait $packing

say "tokenizers"
"$PYTHON" -m data_prep.fit_visual_codebook --shards $DATA/images-train --num-codes $codes --image-size 64 --patch-size 16 \
  --out $DATA/visual_codebook.safetensors &
fitting=$!
"$PYTHON" -m data_prep.train_text_tokenizer $DATA/pairs-train $DATA/text-train $DATA/vqa-train $DATA/nlvr2-train \
  --vocab-size 448 --lowercase --out $DATA/tokenizer.json
"$PYTHON" -m data_prep.verify_shards $DATA/pairs-train $DATA/vqa-train $DATA/nlvr2-train
wait $fitting
# Others use these data too, and need all of them (study_data.sh).
echo "$size" > $DATA/complete
if [ -n "${ONLY_DATA:-}" ]; then
  exit
fi
rm -rf "$RUNS"

say "pretraining on $PROCESSES processes"
train "$PROCESSES" pretrain

# Updates, not samples, are what a tiny model lacks: small batches on one process each, side by side.
say "fine-tuning: vqa; beside it captioning"
train 1 vqa &
vqa=$!
train 1 captioning
wait $vqa
say "fine-tuning: nlvr2; beside it a text-only twin for the blind baseline, and the evaluations of the others"
train 1 nlvr2 &
nlvr2=$!
# Without the image there is little to learn; the score card takes the better of this twin and the counted prior.
train 1 vqa task.blind=true out=$RUNS/vqa-blind max_steps=300 validate_every=null
"$PYTHON" -m eval.captioning --run $RUNS/captioning --data $DATA/pairs-val
"$PYTHON" -m eval.vqa --run $RUNS/vqa --blind-run $RUNS/vqa-blind --data $DATA/vqa-val
wait $nlvr2
"$PYTHON" -m eval.nlvr2 --run $RUNS/nlvr2 --data $DATA/nlvr2-val

say "report"
"$PYTHON" -m mhmoe_vl.report --title "mhmoe_vl quickstart" --pretrain $RUNS/pretrain --vqa $RUNS/vqa --nlvr2 $RUNS/nlvr2 \
  --captioning $RUNS/captioning --out $RUNS/report.html --scores $RUNS/scores.json
say "done: open $RUNS/report.html"
