"""Mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899) of labelled images.

Usually the partner of a sample is another of the same batch, and what the sample becomes depends on who shares its
process. Here the sample's own seed draws the partner from the whole source, so that a run is the same on any number of
processes; the price is a second image to read and decode.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from mhmoe_vl.data.batch import Example


@dataclass(frozen=True)
class Mixing:
    """Every image is mixed with another one, by the one or the other way with equal probability if both are on.

    The share of an image is drawn from Beta(a, a), for each sample anew; timm, whose defaults these are otherwise,
    draws it once per batch.

    Args:
        mixup: a of shares that images are blended by; 0 blends none.
        cutmix: a of shares that images are left with when a rectangle of another is put into them; 0 cuts none.

    Raises:
        ValueError: neither is on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if not self.mixup and not self.cutmix:
            raise ValueError("Mixing needs mixup or cutmix above 0")

    def __call__(self, example: Example, partner: Example, rng: np.random.Generator) -> Example:
        """``example`` with some of ``partner``'s image and label."""
        assert example.image is not None
        assert partner.image is not None
        cuts = bool(self.cutmix) and (not self.mixup or rng.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        share = float(rng.beta(alpha, alpha))
        if cuts:
            center = (rng.random(), rng.random())
            image, share = cut(example.image, partner.image, share, center)
        else:
            image = blend(example.image, partner.image, share)
        return replace(
            example,
            image=image,
            other_label=partner.label,
            label_share=torch.tensor(share, dtype=torch.float32),
        )


def blend(image: Tensor, other: Tensor, share: float) -> Tensor:
    """``share`` of ``image`` and the rest of ``other``; all uint8 ``[3, H, W]``."""
    return torch.round(share * image.float() + (1 - share) * other.float()).to(torch.uint8)


def cut(image: Tensor, other: Tensor, share: float, center: tuple[float, float]) -> tuple[Tensor, float]:
    """``image`` with a rectangle of ``other`` in the same place, and the share of the pixels that are its own.

    Args:
        share: to be left; less is cut where the rectangle reaches over the edge.
        center: of the rectangle, as shares of height and width, in [0, 1).
    """
    spans = []
    for size, place in zip(image.shape[-2:], center, strict=True):
        length, middle = int(size * sqrt(1 - share)), int(size * place)
        spans.append(slice(max(0, middle - length // 2), min(size, middle + (length + 1) // 2)))
    rows, columns = spans
    mixed = image.clone()
    mixed[:, rows, columns] = other[:, rows, columns]
    taken = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - taken / (image.shape[-2] * image.shape[-1])
