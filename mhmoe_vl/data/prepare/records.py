"""What the readers of source formats hand to the packer: one record per sample, or a skip with its reason."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mhmoe_vl.data.shards import Skip
from mhmoe_vl.errors import DataError

_MAX_KEY_LENGTH = 80


@dataclass(frozen=True)
class Record:
    """One sample to be packed.

    Attributes:
        key: its name in the shard, made by :func:`make_key`.
        images: member prefix (``""``, ``left``, ``right``) -> path relative to the images root.
        text: content of the txt member.
        fields: content of the JSON member.
    """

    key: str
    images: Mapping[str, str] = field(default_factory=dict)
    text: str | None = None
    fields: Mapping[str, Any] | None = None

    def digest(self) -> bytes:
        """Identifies the record's content (but not that of its image files)."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()


Records = Iterator[Record | Skip]


def make_key(name: str) -> str:
    """``name`` as a sample key: ASCII letters, digits, ``_`` and ``-``; different names get different keys."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    if safe == name and 0 < len(name) <= _MAX_KEY_LENGTH:
        return name
    # An undecodable file name has lone surrogates.
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
    return f"{safe[: _MAX_KEY_LENGTH - 17]}-{digest[:16]}"


def make_keys(files: Sequence[str]) -> list[str]:
    """A key for each path: the path without its extension, or with it where paths differ in nothing else."""
    stems = [os.path.splitext(file)[0] for file in files]
    num_files = Counter(stems)
    return [make_key(stem if num_files[stem] == 1 else file) for stem, file in zip(stems, files, strict=True)]


def numeric_key(number: int | str) -> str:
    """Image id as a key, zero-padded as in COCO's file names."""
    return make_key(str(number).zfill(12))


class ImageRoot:
    """The folder that image paths are relative to; knows which files exist without one ``stat`` per image."""

    def __init__(self, path: Path) -> None:
        """Raises: DataError: not a folder."""
        if not path.is_dir():
            raise DataError(f"{path}: images folder does not exist")
        self.path = path
        self._names_in = cache(self._list_folder)

    def has(self, relative: Any) -> bool:
        """Whether ``relative`` is the path of a file that is there, and stays inside the root."""
        if not isinstance(relative, str):
            return False
        folder, _, name = os.path.normpath(relative).rpartition(os.sep)
        return folder.split(os.sep)[0] != ".." and not os.path.isabs(relative) and name in self._names_in(folder)

    def first_existing(self, candidates: Sequence[str]) -> str | None:
        """The first of several possible places at which there is a file."""
        return next((candidate for candidate in candidates if self.has(candidate)), None)

    def _list_folder(self, folder: str) -> frozenset[str]:
        try:
            with os.scandir(self.path / folder) as entries:
                return frozenset(entry.name for entry in entries if entry.is_file())
        except (OSError, ValueError):  # ValueError: a zero byte or a lone surrogate in the path
            return frozenset()
