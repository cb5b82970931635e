"""Views of an image with the codes of a visual tokenizer, beside it in its shard: ``KEY.visual_codes.json``.

A code belongs to pixels, so what is stored are views of the image (a crop, mirrored or not), each with its codes.
Training then takes a stored view in place of drawing one: epoch e takes view e mod V. Needs no torch: shards are packed
and verified without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mhmoe_vl.data.shards import encode_json
from mhmoe_vl.errors import DataError

#: Member of a sample that holds its codes.
MEMBER = "visual_codes.json"
FORMAT = "mhmoe_vl/visual-codes/1"

#: Kinds of shard whose samples may have it: those that masked image modeling reads.
CODED_KINDS = ("image", "pair", "class")


class ImageView(NamedTuple):
    """What is looked at of a picture, and how.

    Attributes:
        box: left, top, width and height in pixels of the decoded picture; None for all of it.
        flip: mirrored.
    """

    box: tuple[int, int, int, int] | None
    flip: bool


#: All of a picture, as evaluation sees it.
WHOLE = ImageView(None, False)


@dataclass(frozen=True)
class CodesOrigin:
    """What codes were made with; those of another origin are no targets for a run.

    Attributes:
        tokenizer: SHA-256 of the visual tokenizer's file.
        image_size: side in pixels that views were resized to.
        crop_scale, flip: how views were drawn, as in :class:`mhmoe_vl.data.image.AugmentConfig`; None and False for the
            whole image.
    """

    tokenizer: str
    image_size: int
    crop_scale: float | None
    flip: bool


@dataclass(frozen=True)
class CodedView:
    """One view with the codes of all its patches, row by row."""

    view: ImageView
    codes: tuple[int, ...]


def dump_codes(origin: CodesOrigin, views: Sequence[CodedView]) -> bytes:
    """The content of the member."""
    fields = [{"box": coded.view.box, "flip": coded.view.flip, "codes": coded.codes} for coded in views]
    return encode_json({"format": FORMAT, **asdict(origin), "views": fields})


def parse_codes(data: bytes) -> tuple[CodesOrigin, list[CodedView]]:
    """The inverse of :func:`dump_codes`.

    Raises:
        DataError: something else, or views that do not have the same number of codes.
    """
    origin, fields = _parse(data)
    views = [_parse_view(view) for view in fields]
    if len({len(coded.codes) for coded in views}) != 1:
        raise DataError(f"{MEMBER}: views have different numbers of codes; make the shards again with {PROGRAM}")
    return origin, views


def parse_view_of(data: bytes, epoch: int) -> tuple[CodesOrigin, CodedView]:
    """As :func:`parse_codes`, but only the view of an epoch.

    Raises:
        DataError: something else.
    """
    origin, fields = _parse(data)
    return origin, _parse_view(fields[epoch % len(fields)])


#: What writes the member.
PROGRAM = "python -m data_prep.tokenize_images"


def _parse(data: bytes) -> tuple[CodesOrigin, list[Any]]:
    try:
        fields = json.loads(data)
        if fields["format"] != FORMAT:
            raise ValueError(f"format is {fields['format']!r}, expected {FORMAT!r}")
        origin = CodesOrigin(*(fields[name] for name in ("tokenizer", "image_size", "crop_scale", "flip")))
        views = fields["views"]
        if not isinstance(views, list) or not views:
            raise ValueError("needs at least one view")
        if not isinstance(origin.tokenizer, str) or type(origin.image_size) is not int:
            raise ValueError("tokenizer or image_size is of another type")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise _malformed(error) from None
    return origin, views


def _parse_view(fields: Mapping[str, Any]) -> CodedView:
    try:
        box, codes, flip = fields["box"], tuple(fields["codes"]), fields["flip"]
        if not codes or any(type(number) is not int or number < 0 for number in (*codes, *(box or ()))):
            raise ValueError("codes and boxes are whole numbers from 0 on")
        if type(flip) is not bool or (box is not None and (len(box) != 4 or 0 in box[2:])):
            raise ValueError(f"box is {box} and flip {flip!r}; expected left, top, width and height, and true or false")
        return CodedView(ImageView(None if box is None else (box[0], box[1], box[2], box[3]), flip), codes)
    except (ValueError, TypeError, LookupError) as error:
        raise _malformed(error) from None


def _malformed(error: Exception) -> DataError:
    return DataError(f"{MEMBER}: not codes of a visual tokenizer ({type(error).__name__}: {error})")
