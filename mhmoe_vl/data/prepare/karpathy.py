"""Karpathy's splits: ``dataset_coco.json``, ``dataset_flickr8k.json`` and ``dataset_flickr30k.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mhmoe_vl.data.prepare.json_files import id_of, objects_of, read_json_object, text_of
from mhmoe_vl.data.prepare.pairs import pair_record
from mhmoe_vl.data.prepare.records import ImageRoot, Records, numeric_key
from mhmoe_vl.errors import DataError, suggest

KARPATHY_SPLITS = ("train", "restval", "val", "test")


def read_karpathy(path: Path, splits: Sequence[str], images: ImageRoot) -> Records:
    """Records of the given splits; train and restval together are the usual training set of COCO.

    Raises:
        DataError: unknown split, a split without images, or a file that is not of that format.
    """
    unknown = next((split for split in splits if split not in KARPATHY_SPLITS), None)
    if unknown is not None:
        near = suggest(unknown, list(KARPATHY_SPLITS))
        raise DataError(f"unknown split '{unknown}'{near}; known are {', '.join(KARPATHY_SPLITS)}, joined by '+'")
    entries = objects_of(path, read_json_object(path), "images")
    absent = sorted(set(splits) - {text_of(path, entry, "split") for entry in entries})
    if absent:
        raise DataError(f"{path}: has no image in split '{absent[0]}'")
    for entry in entries:
        if entry["split"] not in splits:
            continue
        # The Flickr files have neither a folder nor a COCO id.
        image_id = id_of(path, entry, "cocoid" if "cocoid" in entry else "imgid")
        folder = text_of(path, entry, "filepath") if "filepath" in entry else ""
        name = text_of(path, entry, "filename")
        captions = [sentence.get("raw") for sentence in objects_of(path, entry, "sentences")]
        yield from pair_record(numeric_key(image_id), image_id, f"{folder}/{name}".lstrip("/"), captions, images)
