#!/usr/bin/env bash
# Data of configs/study/targets.yaml: the scenes of the quickstart, their classes (how many objects), and visual tokenizers.
# What is there already is left as it is.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
DATA=data/targets
SCENES=data/quickstart
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ "$(cat $SCENES/complete 2>/dev/null)" != full ]; then
  ONLY_DATA=$SCENES SHORT= bash quickstart.sh
fi
if [ ! -f $DATA/classes-val/classes.json ]; then
  rm -rf "$DATA"
  # The folder layout of ImageNet.
  "$PYTHON" - $SCENES/scenes $DATA/scenes <<'END'
import json, shutil, sys
from pathlib import Path

scenes, out = map(Path, sys.argv[1:])
for split in ("train", "val"):
    for scene in json.loads((scenes / f"scenes_{split}.json").read_text()):
        folder = out / split / f"{len(scene['objects'])} objects"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"COCO_scenes_{split}_{scene['image_id']:012d}.png"
        shutil.copy(scenes / "images" / split / name, folder)
END
  "$PYTHON" -m data_prep.pack_classes --images $DATA/scenes/train --out $DATA/classes-train
  "$PYTHON" -m data_prep.pack_classes --images $DATA/scenes/val --classes $DATA/classes-train/classes.json --out $DATA/classes-val
fi
if [ ! -f $DATA/kmeans.safetensors ]; then
  "$PYTHON" -m data_prep.fit_visual_codebook --shards $SCENES/images-train --num-codes 512 --image-size 64 --patch-size 16 \
    --max-images 4000 --out $DATA/kmeans.safetensors
fi
for teacher in hog clip; do
  if [ ! -f $DATA/vqkd_$teacher.safetensors ]; then
    "$PYTHON" -m mhmoe_vl.train --config configs/tokenizer/quickstart_$teacher.yaml out=runs/study/targets/tokenizer_$teacher
    cp runs/study/targets/tokenizer_$teacher/visual_tokenizer.safetensors $DATA/vqkd_$teacher.safetensors
  fi
done
