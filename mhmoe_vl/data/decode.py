"""Member bytes to images, captions and JSON, with every kind of broken input turned into a one-line error.

Sizes are checked from the header before a pixel is decoded, and large pictures are made smaller while they are
converted: a 20 kB PNG can otherwise cost more than a gigabyte.
"""

from __future__ import annotations

import io
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from mhmoe_vl.errors import DataError

MAX_IMAGE_PIXELS = 64_000_000
MAX_IMAGE_SIDE = 20_000
MAX_DECODING_BYTES = 280 * 2**20
# Larger images come out at a half, a quarter or an eighth of their sides: no model looks at more.
FULL_SIZE_PIXELS = 12_500_000

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
_JPEG_FORMATS = ("JPEG", "MPO")
_READ_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Memory of a decoded pixel by Pillow's mode, 4 for all others; and while a WebP is decoded, measured.
_PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
_WEBP_PIXEL_BYTES = 16

_STRIP_PIXELS = 2**18

_EXIF_ORIENTATION = 0x0112
_TIFF_BITS, _TIFF_SAMPLES, _TIFF_ROWS_PER_STRIP, _TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 258, 277, 278, 322, 323

# EXIF orientation -> what makes the image upright.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Unicode categories Cc, Zl and Zp; and lone surrogates (Cs) with the byte-order mark.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_DELETED = re.compile("[\ud800-\udfff\ufeff]+")

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class ImageHeader(NamedTuple):
    """The file extension that belongs to the content, whatever the file was called, and the size as stored."""

    extension: str
    size: tuple[int, int]


class NotAnImageError(DataError):
    """The bytes are in none of the formats that are read."""

    reason = "not_an_image"


class BrokenImageError(DataError):
    """The header is that of an image, and the rest is truncated, damaged or of an unsupported pixel type."""

    reason = "broken_image"


class ImageTooLargeError(DataError):
    """The header announces more pixels than the limit, or the image would take too much memory to decode."""

    reason = "image_too_large"


def decode_image(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode the first frame to RGB, upright by its EXIF orientation.

    Transparency is composited on white, 16-bit gray is scaled to 8 bits, CMYK and palettes are converted. An image of
    more than :data:`FULL_SIZE_PIXELS` comes out smaller. Takes at most about :data:`MAX_DECODING_BYTES` of memory.

    Raises:
        NotAnImageError, ImageTooLargeError, BrokenImageError: all are :class:`DataError`.
    """
    with warnings.catch_warnings(action="ignore"):  # of Pillow, about metadata that we do not read
        image, scale = _open_image(data, max_pixels)
        full_size = image.size
        try:
            if image.format in _JPEG_FORMATS and scale > 1:
                # The decoder itself makes it smaller, and only so needs less memory.
                image.draft(None, (max(1, full_size[0] // scale), max(1, full_size[1] // scale)))
            image.load()
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
            raise BrokenImageError(f"broken {image.format} image: {_first_line(error)}") from None
        transposition = _transposition(image)
        shown = _to_rgb(image, 1 if image.size != full_size else scale)
        del image  # before it is needed twice
        return shown if transposition is None else shown.transpose(transposition)


def read_image_header(data: bytes) -> ImageHeader:
    """What can be known without decoding a pixel.

    Raises:
        NotAnImageError, ImageTooLargeError, BrokenImageError: all are :class:`DataError`.
    """
    with warnings.catch_warnings(action="ignore"):  # as in decode_image
        image, _ = _open_image(data, MAX_IMAGE_PIXELS)
        return ImageHeader(_EXTENSION_OF_FORMAT[str(image.format)], image.size)


def clean_text(text: str) -> str:
    """``text`` on one line, in NFC, without control characters, byte-order marks and lone surrogates.

    Line separators such as ``\\r``, U+0085 and U+2028 become spaces: some caption scorers count lines, and one
    such character moves all later captions to the wrong image.
    """
    visible = _CONTROLS.sub(" ", _DELETED.sub("", text))
    return unicodedata.normalize("NFC", " ".join(visible.split()))


def clean_document(text: str) -> str:
    """``text`` with every line cleaned by :func:`clean_text`: line breaks stay, as verse and code need them."""
    return "\n".join(clean_text(line) for line in text.replace("\r\n", "\n").strip().split("\n"))


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


def _open_image(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """Read the header only, and find the scale at which to decode; refuse what is too large at any."""
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
    for scale in (1, 2, 4, 8):
        try:
            num_bytes = _decoding_bytes(image, scale)
        except Exception as error:  # as in decode_image
            raise BrokenImageError(f"broken image header: {_first_line(error)}") from None
        if width * height <= FULL_SIZE_PIXELS * scale**2 and num_bytes <= MAX_DECODING_BYTES:
            return image, scale
    raise ImageTooLargeError(
        f"{image.format} image of {width}x{height} pixels: decoding it would take {num_bytes // 2**20} MiB of memory; "
        f"the limit is {MAX_DECODING_BYTES // 2**20}"
    )


def _decoding_bytes(image: Any, scale: int) -> int:
    """Upper bound of the memory that decoding takes, from the header."""
    width, height = image.size
    num_shown = -(-width // scale) * -(-height // scale)
    if image.format in _JPEG_FORMATS:
        # A JPEG of several scans, and the header does not tell, keeps 16 bits of each coefficient until the last one.
        areas = [horizontal * vertical for _, horizontal, vertical, _ in image.layer]
        return 2 * width * height * sum(areas) // max(1, *areas) + 8 * num_shown
    pixel_bytes = _WEBP_PIXEL_BYTES if image.format == "WEBP" else _PIXEL_BYTES.get(image.mode, 4)
    num_bytes = width * height * pixel_bytes + 4 * num_shown
    if image.format == "TIFF":
        # A strip or tile is decompressed as a whole; it may be as large as the image, a tile even larger.
        tags = image.tag_v2
        bits = max(tags.get(_TIFF_BITS, (1,))) * tags.get(_TIFF_SAMPLES, 1)
        num_rows = tags.get(_TIFF_TILE_LENGTH, min(height, tags.get(_TIFF_ROWS_PER_STRIP, height)))
        num_bytes += bits * tags.get(_TIFF_TILE_WIDTH, width) * num_rows // 8
    return num_bytes


def _transposition(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TRANSPOSITIONS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF must not cost us a sound image
        return None


def _to_rgb(image: Image.Image, scale: int) -> Image.Image:
    """Convert, and make the sides ``scale`` times smaller, strip by strip: no copy of the whole in another mode."""
    if image.mode == "RGB" and "transparency" not in image.info and scale == 1:
        return image
    if image.mode == "I":
        lowest, highest = image.getextrema()
        if lowest < 0 or highest > 65535:  # type: ignore[operator]
            raise BrokenImageError("integer image with values outside 0..65535: its value range is unknown")
    width, height = image.size
    shown = Image.new("RGB", (-(-width // scale), -(-height // scale)))
    num_rows = max(1, _STRIP_PIXELS // width // scale) * scale
    for top in range(0, height, num_rows):
        strip = _strip_to_rgb(image.crop((0, top, width, min(top + num_rows, height))))
        shown.paste(strip if scale == 1 else strip.reduce(scale), (0, top // scale))
    return shown


def _strip_to_rgb(image: Image.Image) -> Image.Image:
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
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is out of range")
    return value


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
