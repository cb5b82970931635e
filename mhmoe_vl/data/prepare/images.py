"""Image files to shard members: checked by decoding them, kept byte for byte or made smaller."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from mhmoe_vl.data.decode import decode_image, read_image_header
from mhmoe_vl.data.shards import MAX_MEMBER_BYTES
from mhmoe_vl.errors import DataError

_JPEG_QUALITY = 92


class FileTooLargeError(DataError):
    """An image file of more bytes than a member of a shard may have."""

    reason = "too_large"


def load_image(path: Path, *, image_size: int | None = None) -> tuple[str, bytes]:
    """Read an image file.

    Args:
        image_size: largest length of the shorter side in pixels; a larger image becomes a smaller RGB JPEG.

    Returns:
        The extension that the content calls for, and the encoded image (the bytes of the file unless made smaller).

    Raises:
        OSError: the file cannot be read.
        DataError: it is too large or cannot be decoded; the class has a ``reason``.
    """
    num_bytes = path.stat().st_size
    if num_bytes > MAX_MEMBER_BYTES:
        raise FileTooLargeError(f"file of {num_bytes} bytes; at most {MAX_MEMBER_BYTES} are read")
    data = path.read_bytes()
    header = read_image_header(data)
    image = decode_image(data)
    if image_size is None or min(header.size) <= image_size:
        return header.extension, data
    scale = min(1.0, image_size / min(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    smaller = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(smaller, "JPEG", quality=_JPEG_QUALITY)
    return "jpg", smaller.getvalue()
