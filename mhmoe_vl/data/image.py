"""From decoded pictures to fixed-size uint8 tensors; normalisation happens on the device."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from mhmoe_vl.config import Config
from mhmoe_vl.data.coded_views import WHOLE, ImageView
from mhmoe_vl.data.rand_augment import RandAugment
from mhmoe_vl.errors import ConfigError

Augmentation = Callable[[Image.Image], Image.Image]


class AugmentConfig(Config):
    """Training-time augmentation; validation and evaluation only resize.

    Attributes:
        crop_scale: smallest share of the area that a random crop keeps; None resizes without cropping.
        flip: mirror half of the images. Wrong for data that speaks of left and right.
        color_jitter: strength of brightness, contrast and saturation changes.
        rand_augment: RandAugment with 2 operations of magnitude 7, as BEiT-3 fine-tunes VQA and captioning with.
        auto_augment: timm's RandAugment by its name there instead, such as ``rand-m9-mstd0.5-inc1``, with which BEiT-3
            fine-tunes ImageNet.
        random_erasing: probability of a rectangle of noise in the image (arXiv 1708.04896).
    """

    crop_scale: Annotated[float, Field(gt=0, le=1)] | None = 0.2
    flip: bool = True
    color_jitter: Annotated[float, Field(ge=0)] = 0.0
    rand_augment: bool = False
    auto_augment: Annotated[str, Field(pattern="^rand-")] | None = None
    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rand_augment and self.auto_augment is not None:
            raise ValueError(f"auto_augment: '{self.auto_augment}' takes the place of rand_augment; set one of them")
        return self


class ImageTransform:
    """Picture to uint8 ``[3, size, size]``.

    A view of the picture is drawn (crop and mirroring), and then perhaps coloured otherwise.

    Args:
        augment: None for the deterministic transform.
        center_crop: the deterministic transform resizes the short side and cuts the middle out, as ImageNet is scored;
            else it resizes the whole picture to a square, as BEiT-3 evaluates everything else. Bicubic.

    Raises:
        ConfigError: timm has no such ``auto_augment``.
    """

    def __init__(self, size: int, augment: AugmentConfig | None = None, *, center_crop: bool = False) -> None:
        self.size, self.augment = size, augment
        self.recolor = None if augment is None else _recoloring(size, augment)
        self.erasing = None if augment is None else _erasing(augment)
        self.center_crop = center_crop and augment is None

    @property
    def is_random(self) -> bool:
        """Whether the result depends on the seed."""
        return self.recolor is not None or self.erasing is not None or _draws_views(self.augment)

    def __call__(self, picture: Image.Image, seed: int, view: ImageView | None = None) -> Tensor:
        """Apply with randomness from ``seed`` alone; the global generators are left as they were.

        Args:
            view: to be taken in place of one that ``seed`` decides.
        """
        if not self.is_random:
            if self.center_crop and view is None:
                picture = _middle(picture, self.size)
            return _to_pixels(self._look(picture, view or WHOLE))
        with _seeded(seed):
            picture = self._look(picture, view or self._draw(picture))
            pixels = _to_pixels(picture if self.recolor is None else self.recolor(picture))
            return pixels if self.erasing is None else self.erasing(pixels)

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
    """Torch's generator and, for timm's policies, those of Python and NumPy."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the GPUs, which are not put back.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _to_pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _middle(picture: Image.Image, size: int) -> Image.Image:
    """The square in the middle, once the short side is ``size``; sizes and edges rounded as torchvision does."""
    width, height = picture.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _draws_views(augment: AugmentConfig | None) -> bool:
    return augment is not None and (augment.crop_scale is not None or augment.flip)


def _recoloring(size: int, augment: AugmentConfig) -> Augmentation | None:
    """What follows the view. RandAugment also turns and shears."""
    if not (augment.color_jitter or augment.rand_augment or augment.auto_augment):
        return None
    from torchvision.transforms import v2

    steps: list[Augmentation] = []
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    if augment.rand_augment:
        steps.append(RandAugment())
    if augment.auto_augment is not None:
        steps.append(_policy(size, augment.auto_augment))
    return v2.Compose(steps)


def _policy(size: int, name: str) -> Augmentation:
    """With the options that timm's own ``create_transform`` gives it; shifts are by up to 0.45 of the picture."""
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.constants import IMAGENET_DEFAULT_MEAN

    options = {
        "translate_const": int(0.45 * size),
        "img_mean": tuple(min(255, round(255 * value)) for value in IMAGENET_DEFAULT_MEAN),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        return rand_augment_transform(name, options)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"data.augment.auto_augment: '{name}' is no policy of timm's RandAugment: {error}") from None


def _erasing(augment: AugmentConfig) -> Callable[[Tensor], Tensor] | None:
    """Noise for 2 to 33 % of the area, as timm's mode ``pixel`` does. There it is Gaussian in normalised values; bytes
    end at black and white, and have the mean 0.45 and deviation 0.225 that ImageNet's statistics come to."""
    if augment.random_erasing == 0:
        return None
    from torchvision.transforms import v2

    erase = v2.RandomErasing(augment.random_erasing, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")

    def erased(pixels: Tensor) -> Tensor:
        noisy = erase((pixels / 255 - 0.45) / 0.225)
        return ((noisy * 0.225 + 0.45) * 255).round().clamp(0, 255).to(torch.uint8)

    return erased
