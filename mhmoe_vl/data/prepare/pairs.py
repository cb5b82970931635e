"""One image with its captions, checked, as a record of kind ``pair``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mhmoe_vl.data.decode import clean_text
from mhmoe_vl.data.prepare.json_files import json_type
from mhmoe_vl.data.prepare.records import ImageRoot, Record, Records
from mhmoe_vl.data.shards import Skip


def pair_record(key: str, image_id: Any, file: str, captions: Sequence[Any], images: ImageRoot) -> Records:
    """A record of all usable captions, the first also as text, and a skip for each of the others."""
    if not images.has(file):
        yield Skip(file, "image_missing", f"no such file in the images folder '{images.path.name}'")
        return
    usable = []
    for caption in captions:
        problem = _caption_problem(caption)
        if problem:
            yield Skip(f"{file}: caption", *problem)
        else:
            usable.append(clean_text(caption))
    if usable:
        fields = {"image_id": image_id, "file": file, "captions": usable}
        yield Record(key, images={"": file}, text=usable[0], fields=fields)
    else:
        yield Skip(file, "no_caption", f"none of {len(captions)} captions can be used")


def _caption_problem(caption: Any) -> tuple[str, str] | None:
    if not isinstance(caption, str):
        return "bad_caption", f"is {json_type(caption)}, not a string"
    if any("\udc80" <= character <= "\udcff" for character in caption):
        return "not_utf8", f"{caption[:80]!r}"
    if not clean_text(caption):
        return "empty_caption", f"{caption[:80]!r} has no visible character"
    return None
