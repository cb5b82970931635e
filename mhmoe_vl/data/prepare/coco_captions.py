"""Official COCO caption files, ``captions_{train,val}{2014,2017}.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mhmoe_vl.data.prepare.json_files import id_of, objects_of, read_json_object, text_of
from mhmoe_vl.data.prepare.pairs import pair_record
from mhmoe_vl.data.prepare.records import ImageRoot, Records, numeric_key
from mhmoe_vl.data.shards import Skip


def read_coco_captions(path: Path, images: ImageRoot) -> Records:
    """Records in the order of the file's ``images``, with captions in the order of its ``annotations``.

    Raises:
        DataError: the file is not of that format.
    """
    content = read_json_object(path)
    entries = objects_of(path, content, "images")
    captions: dict[Any, list[Any]] = {id_of(path, entry, "id"): [] for entry in entries}
    for annotation in objects_of(path, content, "annotations"):
        image_id = id_of(path, annotation, "image_id")
        if image_id in captions:
            captions[image_id].append(annotation.get("caption"))
        else:
            place = f"{path.name}: annotation {annotation.get('id')}"
            yield Skip(place, "annotation_without_image", f"there is no image {image_id}")
    for entry in entries:
        image_id, file = entry["id"], text_of(path, entry, "file_name")
        if image_id in captions:
            yield from pair_record(numeric_key(image_id), image_id, file, captions.pop(image_id), images)
        else:
            yield Skip(f"{path.name}: image {image_id}", "duplicate_id", "an earlier image has this id")
