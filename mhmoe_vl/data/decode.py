"""Member bytes to images, captions and JSON, with every kind of broken input turned into a one-line error.

Sizes are checked from the header before a pixel is decoded: a 20 kB PNG can otherwise cost half a gigabyte.
"""

from __future__ import annotations

import io
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from PIL import Image, ImageOps

from mhmoe_vl.errors import DataError

MAX_IMAGE_PIXELS = 64_000_000
MAX_IMAGE_SIDE = 20_000

# What Pillow calls the content -> the extension that we and open_clip give it.
_EXTENSION_OF_FORMAT = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with further frames
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}
_READ_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Unicode categories Cc, Zl and Zp; and lone surrogates (Cs) with the byte-order mark.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_DELETED = re.compile("[\ud800-\udfff\ufeff]+")

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class NotAnImageError(DataError):
    """The bytes are in none of the formats that are read."""

    reason = "not_an_image"


class BrokenImageError(DataError):
    """The header is that of an image, and the rest is truncated, damaged or of an unsupported pixel type."""

    reason = "broken_image"


class ImageTooLargeError(DataError):
    """The header announces more pixels than the limit."""

    reason = "image_too_large"


def decode_image(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode the first frame to RGB, upright by its EXIF orientation.

    Transparency is composited on white, 16-bit gray is scaled to 8 bits, CMYK and palettes are converted.

    Raises:
        NotAnImageError, ImageTooLargeError, BrokenImageError: all are :class:`DataError`.
    """
    with warnings.catch_warnings(action="ignore"):  # of Pillow, about metadata that we do not read
        image = _open_image(data, max_pixels)
        try:
            image.load()
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
            raise BrokenImageError(f"broken {image.format} image: {_first_line(error)}") from None
        return _to_rgb(_upright(image))


def image_extension(data: bytes) -> str:
    """The file extension that belongs to the content, whatever the file was called.

    Raises:
        NotAnImageError, ImageTooLargeError
    """
    with warnings.catch_warnings(action="ignore"):  # as in decode_image
        return _EXTENSION_OF_FORMAT[str(_open_image(data, MAX_IMAGE_PIXELS).format)]


def clean_text(text: str) -> str:
    """``text`` on one line, in NFC, without control characters, byte-order marks and lone surrogates.

    Line separators such as ``\\r``, U+0085 and U+2028 become spaces: some caption scorers count lines, and one
    such character moves all later captions to the wrong image.
    """
    visible = _CONTROLS.sub(" ", _DELETED.sub("", text))
    return unicodedata.normalize("NFC", " ".join(visible.split()))


def decode_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object; only UTF-8 and only standard JSON (no NaN or Infinity).

    Raises:
        DataError: not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise DataError(f"JSON is not UTF-8: {_first_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise DataError(f"JSON must be an object, not {type(value).__name__}")
    return value


def decode_text(data: bytes) -> str:
    """Decode UTF-8.

    Raises:
        DataError: not UTF-8, with the position of the first wrong byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"text is not UTF-8: {_first_line(error)}") from None


def captions_of(members: Mapping[str, bytes]) -> list[str]:
    """All captions of a pair, cleaned, empty ones left out.

    They come from ``captions`` or ``caption`` in the JSON member, else from the txt member.

    Raises:
        DataError: a member that cannot be decoded, or captions that are not strings.
    """
    fields = decode_json(members["json"]) if "json" in members else {}
    captions = fields.get("captions")
    if captions is None and fields.get("caption") is not None:
        captions = [fields["caption"]]
    if captions is None:
        captions = [decode_text(members["txt"])] if "txt" in members else []
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise DataError("captions must be strings")
    return [cleaned for cleaned in map(clean_text, captions) if cleaned]


def image_name(names: Mapping[str, Any], prefix: str = "") -> str | None:
    """The member name of the image, ``jpg`` or with a prefix ``left.jpg``; None if there is none."""
    stem = f"{prefix}." if prefix else ""
    return next((f"{stem}{ext}" for ext in IMAGE_EXTENSIONS if f"{stem}{ext}" in names), None)


def image_member(members: Mapping[str, bytes], prefix: str = "") -> bytes:
    """The encoded image of a sample; ``prefix`` is ``left`` or ``right`` in NLVR2 shards.

    Raises:
        DataError: the sample has no such image.
    """
    name = image_name(members, prefix)
    if name is None:
        wanted = f"{prefix} image" if prefix else "image"
        raise DataError(f"sample has no {wanted}; its members are {', '.join(sorted(members))}")
    return members[name]


def _open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only, and refuse what is too large to decode."""
    try:
        image = Image.open(io.BytesIO(data), formats=_READ_FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(_first_line(error)) from None
    except Image.UnidentifiedImageError:
        raise NotAnImageError(f"not an image: {len(data)} bytes starting with {data[:8]!r}") from None
    except Exception as error:  # as in decode_image
        raise BrokenImageError(f"broken image header: {_first_line(error)}") from None
    width, height = image.size
    if width * height > max_pixels or max(width, height) > MAX_IMAGE_SIDE:
        raise ImageTooLargeError(
            f"image of {width}x{height} pixels; at most {max_pixels} pixels and {MAX_IMAGE_SIDE} a side are decoded"
        )
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF must not cost us a sound image
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        return _scale_16_bit(image).convert("RGB")
    if image.mode == "F":
        raise BrokenImageError("floating-point image: its value range is unknown")
    if image.has_transparency_data:
        # alpha_composite, unlike paste with a mask, is defined for RGBA alone.
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    # convert("L") would clip at 255 and turn nearly every 16-bit image white.
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise BrokenImageError("integer image with values outside 0..65535: its value range is unknown")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is out of range")
    return value


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
