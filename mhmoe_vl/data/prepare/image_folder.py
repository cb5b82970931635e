"""Folders of images without annotations."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mhmoe_vl.data.decode import IMAGE_EXTENSIONS
from mhmoe_vl.data.prepare.records import Record, make_keys
from mhmoe_vl.data.shards import Skip

# Why something below the folder is not even looked at -> what to call it.
_IGNORED = {
    "hidden": "hidden",
    "other_extension": f"of another extension than {', '.join(IMAGE_EXTENSIONS)}",
    "folder_read_elsewhere": "a link to a folder that is read elsewhere, or that holds this one",
}


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder.

    Attributes:
        files: paths relative to the folder, folder by folder, sorted by name.
        skipped: what has the name of an image and is none, and folders that cannot be read.
        num_ignored: reason -> number of files and folders that are passed over.
        examples: reason -> the first of them.
    """

    files: tuple[str, ...]
    skipped: tuple[Skip, ...]
    num_ignored: Mapping[str, int]
    examples: Mapping[str, str]

    def records(self) -> list[Record | Skip]:
        """One record per image."""
        keys = make_keys(self.files)
        records = [Record(key, images={"": f}, fields={"file": f}) for key, f in zip(keys, self.files, strict=True)]
        return [*self.skipped, *records]

    def ignored_line(self) -> str:
        """What was passed over and why, in one line; empty if nothing was."""
        parts = [
            f"{count} {_IGNORED[reason]} (first {self.examples[reason]})" for reason, count in self.num_ignored.items()
        ]
        return f"ignored: {'; '.join(parts)}" if parts else ""


def list_images(root: Path, *, exclude: Collection[Path] = ()) -> ImageFolder:
    """Find the files with an image extension below ``root``.

    Links to folders are followed, but no folder is read twice, so that links in a circle end.

    Args:
        exclude: folders to pass over without a word, such as the one that is packed to.
    """
    top = os.path.realpath(root)
    excluded = {os.path.realpath(path) for path in exclude}
    seen = {top}
    files: list[str] = []
    skipped: list[Skip] = []
    ignored: dict[str, list[str]] = {reason: [] for reason in _IGNORED}
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(root / folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            skipped.append(Skip(folder or root.name, "folder_unreadable", str(error.strerror)))
            continue
        subfolders = []
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                ignored["hidden"].append(path)
            elif os.path.isdir(entry.path):
                target = os.path.realpath(entry.path)
                if target in excluded:
                    continue
                if target in seen or (entry.is_symlink() and _overlap(top, target)):
                    ignored["folder_read_elsewhere"].append(path)
                else:
                    seen.add(target)
                    subfolders.append(path)
            elif os.path.splitext(entry.name)[1].lower().lstrip(".") not in IMAGE_EXTENSIONS:
                ignored["other_extension"].append(path)
            elif os.path.isfile(entry.path):
                files.append(path)
            else:
                # Opening a pipe would wait for a writer for ever.
                skipped.append(Skip(path, "not_a_file", "a broken link, pipe, socket or device"))
        pending += reversed(subfolders)
    num_ignored = {reason: len(paths) for reason, paths in ignored.items() if paths}
    return ImageFolder(
        tuple(files), tuple(skipped), num_ignored, {reason: ignored[reason][0] for reason in num_ignored}
    )


def _overlap(first: str, second: str) -> bool:
    """Whether one of two folders is in the other."""
    return os.path.commonpath([first, second]) in (first, second)
