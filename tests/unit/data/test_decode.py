"""Images of every kind come out as upright RGB; whatever is broken is one clear DataError."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mhmoe_vl.data.decode import (
    BrokenImageError,
    ImageTooLargeError,
    NotAnImageError,
    captions_of,
    clean_text,
    decode_image,
    decode_json,
    image_member,
    read_image_header,
)
from mhmoe_vl.errors import DataError
from tests.unit.data.files import encoded, image_bytes


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_an_rgb_image_keeps_its_pixels() -> None:
    original = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(original), "PNG")), original)


def test_gray_levels_are_equal_in_all_channels() -> None:
    gray = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(gray), "PNG")), np.repeat(gray[..., None], 3, axis=2))


def test_cmyk_inks_become_their_colors() -> None:
    red = pixels(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    blank = pixels(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"))
    np.testing.assert_allclose(red[8, 8], (255, 0, 0), atol=3)
    np.testing.assert_allclose(blank[8, 8], (255, 255, 255), atol=3)


def test_transparency_shows_white() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (255, 0, 0, 51)])
    # alpha 51 is one fifth: 0.2 * red + 0.8 * white
    assert pixels(encoded(image, "PNG")).tolist() == [[[255, 0, 0], [255, 255, 255], [255, 204, 204]]]


def test_gray_with_alpha_shows_white() -> None:
    image = Image.new("LA", (2, 1))
    image.putdata([(10, 255), (10, 0)])
    assert pixels(encoded(image, "PNG")).tolist() == [[[10] * 3, [255] * 3]]


@pytest.mark.parametrize(("mode", "color"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_a_transparent_color_shows_white(mode: str, color: int | tuple[int, ...]) -> None:
    image = Image.new(mode, (2, 1), color)
    image.putpixel((1, 0), 0 if mode == "L" else (0, 0, 0))
    shown = pixels(encoded(image, "PNG", transparency=color))
    assert shown.tolist() == [[[255] * 3, [0] * 3]]


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image, "PNG")).tolist() == [[[200, 100, 50], [0, 0, 255]]]
    assert pixels(encoded(image, "PNG", transparency=0)).tolist() == [[[255] * 3, [0, 0, 255]]]
    assert pixels(encoded(image, "GIF", transparency=0)).tolist() == [[[255] * 3, [0, 0, 255]]]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(format: str) -> None:  # noqa: A002
    levels = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    shown = pixels(encoded(Image.fromarray(levels), format))
    assert shown[0, :, 0].tolist() == [0, 1, 100, 255]


def test_an_image_of_unknown_range_is_refused() -> None:
    with pytest.raises(BrokenImageError, match="floating-point"):
        decode_image(encoded(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF"))


# What the camera stored, as a function of the upright picture (EXIF 2.32, table 4, orientation).
STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright(orientation: int) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    np.testing.assert_array_equal(pixels(encoded(stored, "PNG", exif=exif)), upright)


def test_broken_exif_costs_nothing() -> None:
    data = encoded(Image.new("RGB", (4, 4), "red"), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert pixels(data).shape == (4, 4, 3)


def test_only_the_first_frame_is_shown() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_image_is_refused_at_every_length(format: str) -> None:  # noqa: A002
    data = image_bytes(format=format)
    for length in range(0, len(data) - len(data) // 8, 7):
        with pytest.raises(DataError):
            decode_image(data[:length])


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\x89PNG", bytes(1000)])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(NotAnImageError, match="not an image"):
        decode_image(data)


@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damage_gives_an_image_or_a_data_error(format: str, edits: list[tuple[float, int]]) -> None:  # noqa: A002
    data = bytearray(image_bytes(format=format))
    for position, value in edits:
        data[int(position * len(data))] = value
    with contextlib.suppress(DataError):
        assert decode_image(bytes(data), max_pixels=10**6).mode == "RGB"


@pytest.mark.parametrize("size", [(12_000, 7_000), (20_001, 1), (30_000, 30_000)])
def test_decompression_bombs_are_refused_by_their_header(size: tuple[int, int]) -> None:
    bomb = encoded(Image.new("1", (1, 1)), "PNG")
    header = bytearray(bomb)
    header[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(ImageTooLargeError):
        decode_image(bytes(header))


def test_max_pixels() -> None:
    data = image_bytes(size=(10, 10))
    assert decode_image(data, max_pixels=100).size == (10, 10)
    with pytest.raises(ImageTooLargeError, match="10x10"):
        decode_image(data, max_pixels=99)


def png_of_zeros(bits: int, color_type: int, num_channels: int, side: int = 8000) -> bytes:
    """A small file of a large picture."""
    header = side.to_bytes(4, "big") * 2 + bytes([bits, color_type, 0, 0, 0])
    pixels = zlib.compress(bytes(side * (1 + side * num_channels * bits // 8)), 1)
    chunks = [b"IHDR" + header, b"IDAT" + pixels, b"IEND"]
    parts = [len(c[4:]).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


HOSTILE_IMAGES = {
    "16-bit gray": lambda: png_of_zeros(16, 0, 1),
    "gray and alpha": lambda: png_of_zeros(8, 4, 2),
    "WebP": lambda: encoded(Image.new("RGBA", (4100, 4100)), "WEBP", method=0),
    "TIFF of one strip": lambda: encoded(
        Image.new("RGB", (6000, 6000)), "TIFF", compression="tiff_lzw", strip_size=2**31 - 1
    ),
    "progressive JPEG": lambda: encoded(Image.new("RGB", (6500, 6500)), "JPEG", progressive=True, subsampling=0),
}
# The high-water mark of this program alone, which getrusage mixes up with that of the one that started it.
MEASURE = """
import sys
from mhmoe_vl.data.decode import decode_image

def megabytes():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 1024

data = open(sys.argv[1], "rb").read()
before = megabytes()
decode_image(data)
print(megabytes() - before)
"""


@pytest.mark.parametrize("name", HOSTILE_IMAGES)
def test_no_image_takes_more_than_300_megabytes(tmp_path: Path, name: str) -> None:
    (tmp_path / "image").write_bytes(HOSTILE_IMAGES[name]())
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "image")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 20 < float(result.stdout) < 300


@pytest.mark.parametrize(
    ("format", "mode", "side", "options"),
    [("WEBP", "L", 5000, {"lossless": True, "method": 0}), ("JPEG", "CMYK", 6200, {})],
)
def test_what_would_take_more_is_refused(format: str, mode: str, side: int, options: dict[str, Any]) -> None:  # noqa: A002
    data = encoded(Image.new(mode, (side, side)), format, **options)
    with pytest.raises(ImageTooLargeError, match=rf"{format} image of .*: decoding it would take \d+ MiB"):
        decode_image(data)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "I;16", "P"])
def test_large_images_come_out_smaller(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr("mhmoe_vl.data.decode._STRIP_PIXELS", 50)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (13, 22, 3), dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (13, 22), dtype=np.uint16))
    data = encoded(image.convert(mode), "PNG")
    full = Image.fromarray(pixels(data))
    monkeypatch.setattr("mhmoe_vl.data.decode.FULL_SIZE_PIXELS", 80)
    assert read_image_header(data).size == (22, 13)
    np.testing.assert_array_equal(pixels(data), np.asarray(full.reduce(2)))
    monkeypatch.setattr("mhmoe_vl.data.decode.FULL_SIZE_PIXELS", 71)
    assert pixels(data).shape == (4, 6, 3)


def test_large_jpegs_come_out_smaller_and_upright(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (0, 0, 32, 32))
    monkeypatch.setattr("mhmoe_vl.data.decode.FULL_SIZE_PIXELS", 600)
    shown = pixels(encoded(image, "JPEG", exif=exif))
    assert shown.shape == (32, 16, 3)
    np.testing.assert_allclose(shown[:10], np.broadcast_to((0, 0, 255), (10, 16, 3)), atol=3)


@pytest.mark.parametrize(
    ("format", "extension"),
    [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tif")],
)
def test_the_content_names_the_extension(format: str, extension: str) -> None:  # noqa: A002
    assert read_image_header(image_bytes(format=format)) == (extension, (24, 16))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a  man\n", "a man"),
        ("a\rman", "a man"),
        ("a\u2028man\u2029\u0085x", "a man x"),
        ("a\x00b\x1b", "a b"),
        ("\ufeffcafe\u0301", "café"),
        ("a\ud800b", "ab"),
        ("👩\u200d🍳 cooks", "👩\u200d🍳 cooks"),
        (" \n\t\u3000", ""),
    ],
)
def test_clean_text(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


@given(st.text(st.characters(codec=None)))
@example("a\ud800\u0301")
@example("\u2000x")
def test_clean_text_is_one_line_normal_and_stable(text: str) -> None:
    cleaned = clean_text(text)
    assert len(cleaned.splitlines()) <= 1
    assert cleaned == unicodedata.normalize("NFC", cleaned) == clean_text(cleaned)
    assert not {"Cc", "Cs", "Zl", "Zp"} & {unicodedata.category(character) for character in cleaned}
    cleaned.encode()


@pytest.mark.parametrize(
    "data", [b'{"a": NaN}', b'{"a": Infinity}', b"[1]", b'{"a": 1', b'{"a": "\xff"}', b"", b'{"a":' * 9999]
)
def test_only_strict_json_objects_are_read(data: bytes) -> None:
    with pytest.raises(DataError, match="JSON"):
        decode_json(data)


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"json": b'{"captions": [" a ", "", "b"]}', "txt": b"c"}, ["a", "b"]),
        ({"json": b'{"caption": "a"}', "txt": b"c"}, ["a"]),
        ({"json": b'{"caption": null}', "txt": b"c"}, ["c"]),
        ({"json": b'{"url": "x"}', "txt": b" c\n"}, ["c"]),
        ({"txt": b"\n"}, []),
        ({"jpg": b""}, []),
    ],
)
def test_captions_of(members: dict[str, bytes], captions: list[str]) -> None:
    assert captions_of(members) == captions


@pytest.mark.parametrize("members", [{"json": b'{"captions": "a"}'}, {"json": b'{"captions": [1]}'}, {"txt": b"\xff"}])
def test_captions_must_be_text(members: dict[str, bytes]) -> None:
    with pytest.raises(DataError):
        captions_of(members)


def test_image_member() -> None:
    members = {"left.png": b"l", "right.jpg": b"r", "webp": b"w", "json": b""}
    assert (image_member(members), image_member(members, "left"), image_member(members, "right")) == (b"w", b"l", b"r")
    with pytest.raises(DataError, match="no left image; its members are jpg, txt"):
        image_member({"jpg": b"", "txt": b""}, "left")
