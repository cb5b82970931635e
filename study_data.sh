#!/usr/bin/env bash
# Data of configs/study/main.yaml: shards, tokenizers and a codebook from public texts and images, and the scenes of the quickstart.
# What is there already is left as it is. docs/study.md says where the public data come from.
#
#   PUBLIC=/path/to/data bash study_data.sh      three minutes on two CPU cores, the scenes included
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
DATA=data/study
SCENES=data/quickstart
PUBLIC=${PUBLIC:?set PUBLIC to the folder of the public data (docs/study.md)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The last two are of the Bible, the others of XQuAD.
LANGUAGES=(en de es hi ru zh swh ukr)

if [ "$(cat $SCENES/complete 2>/dev/null)" != full ]; then
  ONLY_DATA=$SCENES SHORT= bash quickstart.sh
fi
LAST=$DATA/visual_codebook.safetensors
if [ -f $LAST ]; then
  exit
fi
rm -rf "$DATA"
mkdir -p "$DATA"

"$PYTHON" -m data_prep.pack_text "$PUBLIC/text_en/wikitext2_valid.txt" --documents paragraphs --deduplicate --holdout 0.04 \
  --out $DATA/wikitext
"$PYTHON" -m data_prep.pack_text "$PUBLIC/text_en/tinyshakespeare.txt" --documents paragraphs --deduplicate --holdout 0.04 \
  --out $DATA/shakespeare
"$PYTHON" -m data_prep.train_text_tokenizer $DATA/wikitext $DATA/shakespeare --vocab-size 2000 --out $DATA/tokenizer-en.json

"$PYTHON" -m data_prep.pack_text "$PUBLIC/text_multi/xquad_contexts" "$PUBLIC/text_multi/bible_cc0" --per-language \
  --languages "${LANGUAGES[@]}" --deduplicate --holdout 0.05 --out $DATA/languages
"$PYTHON" -m data_prep.train_text_tokenizer "${LANGUAGES[@]/#/$DATA/languages/}" --sampling-alpha 0.5 --vocab-size 3000 \
  --out $DATA/tokenizer-multi.json

PHOTOS="$PUBLIC/coco_cc/annotations/dataset_coco_mini_karpathy.json"
# A caption per line, those of every fiftieth image held out: the five of an image say the same. So are those of held-out photos.
"$PYTHON" - "$PUBLIC/coco_annotations/captions_val2017.json" "$PHOTOS" $DATA <<'END'
import json, sys
from pathlib import Path

captions = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["annotations"]
images = sorted({caption["image_id"] for caption in captions})
photos = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))["images"]
held_out = {*images[::50], *(photo["cocoid"] for photo in photos if photo["split"] != "train")}
for name, is_held_out in (("train", False), ("val", True)):
    lines = [" ".join(c["caption"].split()) for c in captions if (c["image_id"] in held_out) == is_held_out]
    Path(sys.argv[3], f"captions-{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
END
for split in train val; do
  "$PYTHON" -m data_prep.pack_text $DATA/captions-$split.txt --out $DATA/captions-$split
done

# Shapes on one colour, and photos; 250 shapes are held out, which is enough to tell whether their words are learnt.
"$PYTHON" -m data_prep.pack_pairs --coco "$PUBLIC/easy_vqa/captions_train.json" --images "$PUBLIC/easy_vqa/train/images" --out $DATA/shapes-train
"$PYTHON" -m data_prep.pack_pairs --coco "$PUBLIC/easy_vqa/captions_test.json" --images "$PUBLIC/easy_vqa/test/images" --limit 250 --out $DATA/shapes-val
for part in train:train val+test:val; do
  "$PYTHON" -m data_prep.pack_pairs --karpathy "$PHOTOS" --split ${part%:*} \
    --images "$PUBLIC/coco_cc/images" --image-size 128 --out $DATA/photos-${part#*:}
done
"$PYTHON" -m data_prep.train_text_tokenizer $SCENES/pairs-train $SCENES/vqa-train $SCENES/nlvr2-train $DATA/captions-train \
  $DATA/shapes-train $DATA/photos-train --vocab-size 1000 --lowercase --out $DATA/tokenizer-multimodal.json
"$PYTHON" -m data_prep.fit_visual_codebook --shards $SCENES/images-train $DATA/shapes-train $DATA/photos-train --num-codes 256 --image-size 64 \
  --patch-size 16 --out $LAST
