"""Folders of images without annotations."""

from __future__ import annotations

import os
from pathlib import Path

from mhmoe_vl.data.decode import IMAGE_EXTENSIONS
from mhmoe_vl.data.prepare.records import Record, Records, make_key


def read_image_folder(root: Path) -> Records:
    """One record per file with an image extension below ``root``, sorted by path; hidden files are left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            stem, extension = os.path.splitext(name)
            if name.startswith(".") or extension.lower().lstrip(".") not in IMAGE_EXTENSIONS:
                continue
            file = os.path.normpath(os.path.join(os.path.relpath(folder, root), name))
            yield Record(make_key(os.path.join(os.path.dirname(file), stem)), images={"": file}, fields={"file": file})
