"""RandAugment (arXiv 1909.13719) as the released BEiT-3 fine-tunes with it, which is not torchvision's: without the
operations that change colours, since texts speak of them, and three times as strong at the same magnitude."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image, ImageEnhance, ImageOps

Operation = Callable[[Image.Image, float, float], Image.Image]

#: What moves into the picture from outside.
_GREY = (128, 128, 128)


class RandAugment:
    """Picture to picture of the same size; draws from torch's generator.

    ``num_operations`` are drawn with replacement, and each is then carried out with a probability of one half.

    Args:
        magnitude: from 0 to 10: of 10, shears are by 0.3, shifts by 10 pixels and turns by 30 degrees, in either
            direction, and brightness and sharpness are 1.9-fold.
    """

    def __init__(self, num_operations: int = 2, magnitude: float = 7.0) -> None:
        self.num_operations, self.level = num_operations, magnitude / 10

    def __call__(self, picture: Image.Image) -> Image.Image:
        for number in torch.randint(len(_OPERATIONS), (self.num_operations,)).tolist():
            is_carried_out, is_positive = (torch.rand(2) < 0.5).tolist()
            if is_carried_out:
                picture = _OPERATIONS[number](picture, self.level, 1.0 if is_positive else -1.0)
        return picture


def _affine(picture: Image.Image, *coefficients: float) -> Image.Image:
    """Take output pixel (x, y) from (a x + b y + c, d x + e y + f)."""
    return picture.transform(
        picture.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=_GREY
    )


#: Of a picture, a level from 0 to 1, and a direction.
_OPERATIONS: tuple[Operation, ...] = (
    lambda picture, level, sign: picture,
    lambda picture, level, sign: ImageOps.autocontrast(picture),
    lambda picture, level, sign: ImageOps.equalize(picture),
    lambda picture, level, sign: ImageEnhance.Brightness(picture).enhance(1.8 * level + 0.1),
    lambda picture, level, sign: ImageEnhance.Sharpness(picture).enhance(1.8 * level + 0.1),
    lambda picture, level, sign: _affine(picture, 1, sign * 0.3 * level, 0, 0, 1, 0),
    lambda picture, level, sign: _affine(picture, 1, 0, 0, sign * 0.3 * level, 1, 0),
    lambda picture, level, sign: _affine(picture, 1, 0, sign * 10 * level, 0, 1, 0),
    lambda picture, level, sign: _affine(picture, 1, 0, 0, 0, 1, sign * 10 * level),
    lambda picture, level, sign: picture.rotate(30 * sign * level, Image.Resampling.BILINEAR, fillcolor=_GREY),
)
