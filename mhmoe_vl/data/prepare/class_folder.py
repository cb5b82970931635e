"""Folders of images in the layout of ImageNet: the first folder of an image's path is its class."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mhmoe_vl.data.prepare.image_folder import ImageFolder
from mhmoe_vl.data.prepare.json_files import read_json_object
from mhmoe_vl.data.prepare.records import Record, make_keys
from mhmoe_vl.data.shards import Skip
from mhmoe_vl.errors import DataError

CLASSES_FORMAT = "mhmoe_vl/classes/1"


def classes_of(folder: ImageFolder) -> list[str]:
    """The classes that have an image, sorted by name: as torchvision's ``ImageFolder`` numbers them."""
    return sorted({name for name in map(_class_of, folder.files) if name})


def class_records(folder: ImageFolder, classes: Collection[str]) -> list[Record | Skip]:
    """One record per image of one of ``classes``, and a skip for each of the others."""
    known = set(classes)
    records: list[Record | Skip] = [*folder.skipped]
    for key, file in zip(make_keys(folder.files), folder.files, strict=True):
        name = _class_of(file)
        if not name:
            records.append(Skip(file, "no_class", "lies in no folder of a class"))
        elif name not in known:
            records.append(Skip(file, "unknown_class", f"'{name}' is not in the list of {len(known)} classes"))
        else:
            records.append(Record(key, images={"": file}, fields={"file": file, "class": name}))
    return records


def class_list(classes: Sequence[str]) -> dict[str, Any]:
    """Content of ``classes.json``; the place in the list is the number of a class.

    Raises:
        DataError: no class.
    """
    if not classes:
        raise DataError("no image lies in a folder of its own class; --images must hold a folder for every class")
    return {"format": CLASSES_FORMAT, "num_classes": len(classes), "classes": list(classes)}


def read_class_list(path: Path) -> dict[str, Any]:
    """Read a ``classes.json``.

    Raises:
        DataError: not written by :func:`class_list`.
    """
    content = read_json_object(path)
    classes = content.get("classes")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise DataError(f"{path}: has no list 'classes' of strings; use the classes.json of a packed training set")
    return content


def _class_of(file: str) -> str:
    """The first folder of a path; empty if there is none."""
    return file.partition("/")[0] if "/" in file else ""
