#!/usr/bin/env bash
# Data of configs/study/main.yaml: shards and tokenizers from public texts, and the scenes of the quickstart. What is there already
# is left as it is. docs/study.md says where the texts come from.
#
#   TEXT=/path/to/texts bash study_data.sh      two minutes on two CPU cores
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
DATA=data/study
SCENES=data/quickstart
TEXT=${TEXT:?set TEXT to the folder of the texts (docs/study.md)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The last two are of the Bible, the others of XQuAD.
LANGUAGES=(en de es hi ru zh swh ukr)

if [ "$(cat $SCENES/complete 2>/dev/null)" != full ]; then
  ONLY_DATA=$SCENES SHORT= bash quickstart.sh
fi
LAST=$DATA/tokenizer-multimodal.json
if [ -f $LAST ]; then
  exit
fi
rm -rf "$DATA"
mkdir -p "$DATA"

"$PYTHON" -m data_prep.pack_text "$TEXT/text_en/wikitext2_valid.txt" --documents paragraphs --deduplicate --holdout 0.04 \
  --out $DATA/wikitext
"$PYTHON" -m data_prep.pack_text "$TEXT/text_en/tinyshakespeare.txt" --documents paragraphs --deduplicate --holdout 0.04 \
  --out $DATA/shakespeare
"$PYTHON" -m data_prep.train_text_tokenizer $DATA/wikitext $DATA/shakespeare --vocab-size 2000 --out $DATA/tokenizer-en.json

"$PYTHON" -m data_prep.pack_text "$TEXT/text_multi/xquad_contexts" "$TEXT/text_multi/bible_cc0" --per-language \
  --languages "${LANGUAGES[@]}" --deduplicate --holdout 0.05 --out $DATA/languages
"$PYTHON" -m data_prep.train_text_tokenizer "${LANGUAGES[@]/#/$DATA/languages/}" --sampling-alpha 0.5 --vocab-size 3000 \
  --out $DATA/tokenizer-multi.json

# A caption per line, those of every fiftieth image held out: the five of an image say the same.
"$PYTHON" - "$TEXT/coco_annotations/captions_val2017.json" $DATA <<'END'
import json, sys
from pathlib import Path

captions = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["annotations"]
images = sorted({caption["image_id"] for caption in captions})
held_out = set(images[::50])
for name, is_held_out in (("train", False), ("val", True)):
    lines = [" ".join(c["caption"].split()) for c in captions if (c["image_id"] in held_out) == is_held_out]
    Path(sys.argv[2], f"captions-{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
END
for split in train val; do
  "$PYTHON" -m data_prep.pack_text $DATA/captions-$split.txt --out $DATA/captions-$split
done
"$PYTHON" -m data_prep.train_text_tokenizer $SCENES/pairs-train $SCENES/vqa-train $SCENES/nlvr2-train $DATA/captions-train \
  --vocab-size 1000 --lowercase --out $LAST
