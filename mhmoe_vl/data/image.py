"""From decoded pictures to fixed-size uint8 tensors; normalisation happens on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from mhmoe_vl.config import Config


class AugmentConfig(Config):
    """Training-time augmentation; validation and evaluation only resize.

    Attributes:
        crop_scale: smallest share of the area that a random crop keeps; None resizes without cropping.
        flip: mirror half of the images. Wrong for data that speaks of left and right.
        color_jitter: strength of brightness, contrast and saturation changes.
        rand_augment: RandAugment with 2 operations of magnitude 7, as BEiT-3 fine-tunes with.
    """

    crop_scale: Annotated[float, Field(gt=0, le=1)] | None = 0.2
    flip: bool = True
    color_jitter: Annotated[float, Field(ge=0)] = 0.0
    rand_augment: bool = False


class ImageTransform:
    """Picture to uint8 ``[3, size, size]``.

    Args:
        augment: None for the deterministic transform (bicubic resize to a square, as BEiT-3 evaluates).
    """

    def __init__(self, size: int, augment: AugmentConfig | None = None) -> None:
        self.size = size
        self.augmentation = None if augment is None else _augmentation(size, augment)

    def __call__(self, picture: Image.Image, seed: int) -> Tensor:
        """Apply with randomness from ``seed`` alone; the global generator is left as it was."""
        if self.augmentation is not None:
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would also seed the GPUs, which are not put back.
                torch.default_generator.manual_seed(seed)
                picture = self.augmentation(picture)
        if picture.size != (self.size, self.size):
            picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels_HWC = torch.from_numpy(np.array(picture))
        return pixels_HWC.permute(2, 0, 1)


def _augmentation(size: int, augment: AugmentConfig) -> Callable[[Image.Image], Image.Image] | None:
    """What is random, if anything is."""
    if not (augment.crop_scale or augment.flip or augment.color_jitter or augment.rand_augment):
        return None
    # Takes a second or two to import, which every command would wait for.
    from torchvision.transforms import InterpolationMode, v2

    bicubic = InterpolationMode.BICUBIC
    steps: list[torch.nn.Module] = []
    if augment.crop_scale is not None:
        steps.append(v2.RandomResizedCrop(size, scale=(augment.crop_scale, 1.0), interpolation=bicubic))
    else:
        steps.append(v2.Resize((size, size), interpolation=bicubic))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    if augment.rand_augment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=7, interpolation=bicubic))
    return v2.Compose(steps)
