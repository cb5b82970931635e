"""Small images and tars for the tests of this folder and of data_prep."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def image_bytes(seed: int = 0, *, size: tuple[int, int] = (24, 16), format: str = "JPEG") -> bytes:  # noqa: A002
    """A small picture that differs for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), format)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:  # noqa: A002
    """``image`` as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_images(folder: Path, numbers: Iterable[int]) -> None:
    """``000000000007.jpg`` for number 7, and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number:012d}.jpg").write_bytes(image_bytes(number))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar with the members in the given order, names repeated where asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def pair_members(key: str, seed: int = 0) -> list[tuple[str, bytes]]:
    """A sample of kind ``pair``."""
    return [(f"{key}.jpg", image_bytes(seed)), (f"{key}.txt", f"caption of {key}".encode())]
