"""From decoded pictures to fixed-size uint8 tensors; normalisation happens on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from mhmoe_vl.config import Config
from mhmoe_vl.data.coded_views import WHOLE, ImageView


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

    A view of the picture is drawn (crop and mirroring), and then perhaps coloured otherwise.

    Args:
        augment: None for the deterministic transform (bicubic resize to a square, as BEiT-3 evaluates).
    """

    def __init__(self, size: int, augment: AugmentConfig | None = None) -> None:
        self.size, self.augment = size, augment
        self.recolor = None if augment is None else _recoloring(augment)

    @property
    def is_random(self) -> bool:
        """Whether the result depends on the seed."""
        return self.recolor is not None or _draws_views(self.augment)

    def __call__(self, picture: Image.Image, seed: int, view: ImageView | None = None) -> Tensor:
        """Apply with randomness from ``seed`` alone; the global generator is left as it was.

        Args:
            view: to be taken in place of one that ``seed`` decides.
        """
        if not self.is_random:
            picture = self._look(picture, view or WHOLE)
        else:
            with _seeded(seed):
                picture = self._look(picture, view or self._draw(picture))
                if self.recolor is not None:
                    picture = self.recolor(picture)
        pixels_HWC = torch.from_numpy(np.array(picture))
        return pixels_HWC.permute(2, 0, 1)

    def draw_view(self, picture: Image.Image, seed: int) -> ImageView:
        """The view of ``picture`` that ``seed`` decides: with it or with the seed alone, a call gives the same crop."""
        if not _draws_views(self.augment):
            return WHOLE
        with _seeded(seed):
            return self._draw(picture)

    def _draw(self, picture: Image.Image) -> ImageView:
        # Takes a second or two to import, which every command would wait for.
        from torchvision.transforms import RandomResizedCrop

        assert self.augment is not None
        box = None
        if self.augment.crop_scale is not None:
            scale, ratio = [self.augment.crop_scale, 1.0], [3 / 4, 4 / 3]
            top, left, height, width = RandomResizedCrop.get_params(picture, scale, ratio)
            box = (left, top, width, height)
        return ImageView(box, bool(torch.rand(1) < 0.5) if self.augment.flip else False)

    def _look(self, picture: Image.Image, view: ImageView) -> Image.Image:
        if view.box is not None:
            left, top, width, height = view.box
            picture = picture.crop((left, top, left + width, top + height))
        if picture.size != (self.size, self.size):
            picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else picture


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the GPUs, which are not put back.
        torch.default_generator.manual_seed(seed)
        yield


def _draws_views(augment: AugmentConfig | None) -> bool:
    return augment is not None and (augment.crop_scale is not None or augment.flip)


def _recoloring(augment: AugmentConfig) -> Callable[[Image.Image], Image.Image] | None:
    """What follows the view. RandAugment also turns and shears."""
    if not (augment.color_jitter or augment.rand_augment):
        return None
    from torchvision.transforms import InterpolationMode, v2

    steps: list[torch.nn.Module] = []
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    if augment.rand_augment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=7, interpolation=InterpolationMode.BICUBIC))
    return v2.Compose(steps)
