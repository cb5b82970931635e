"""From pictures to tensors."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import v2

from mhmoe_vl.data.coded_views import WHOLE, ImageView
from mhmoe_vl.data.image import AugmentConfig, ImageTransform
from mhmoe_vl.data.rand_augment import RandAugment
from mhmoe_vl.errors import ConfigError

EVERYTHING = AugmentConfig(crop_scale=0.3, flip=True, color_jitter=0.4, rand_augment=True)


def picture(size: tuple[int, int] = (48, 40), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("augment", [None, AugmentConfig(), EVERYTHING])
def test_any_picture_becomes_a_square_of_bytes(augment: AugmentConfig | None) -> None:
    for size in ((48, 40), (1, 1), (3, 200), (16, 16)):
        pixels = ImageTransform(16, augment)(picture(size), 1)
        assert (pixels.shape, pixels.dtype) == ((3, 16, 16), torch.uint8)


def test_without_augmentation_it_is_pillow_s_bicubic_resize_whatever_the_seed() -> None:
    image = picture()
    expected = torch.from_numpy(np.array(image.resize((16, 16), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    for transform in (ImageTransform(16), ImageTransform(16, AugmentConfig(crop_scale=None, flip=False))):
        assert not transform.is_random
        assert torch.equal(transform(image, 1), expected)
        assert torch.equal(transform(image, 2), expected)


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    image = picture((16, 16))
    assert torch.equal(ImageTransform(16)(image, 0), torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(crop_scale=0.3, flip=False),
        AugmentConfig(crop_scale=None, flip=True),
        AugmentConfig(crop_scale=None, flip=False, color_jitter=0.5),
        AugmentConfig(crop_scale=None, flip=False, rand_augment=True),
        AugmentConfig(crop_scale=None, flip=False, auto_augment="rand-m9-mstd0.5-inc1"),
        AugmentConfig(crop_scale=None, flip=False, random_erasing=0.5),
        EVERYTHING,
    ],
)
def test_randomness_comes_from_the_seed_alone(augment: AugmentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the GPUs"))
    transform, image = ImageTransform(16, augment), picture((16, 16))
    results = []
    for state in (1, 2):
        torch.default_generator.manual_seed(state)
        random.seed(state)
        np.random.seed(state)
        results.append([transform(image, seed) for seed in range(12)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len({tuple(pixels.flatten().tolist()) for pixels in results[0]}) > 1


@pytest.mark.parametrize("crop_scale", [0.3, None])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("color_jitter", [0.0, 0.4])
@pytest.mark.parametrize("rand_augment", [True, False])
def test_it_is_what_torchvision_composes(
    crop_scale: float | None, flip: bool, color_jitter: float, rand_augment: bool
) -> None:
    """The same numbers are drawn in the same order, and views of pictures that are as large as the result too."""
    bicubic = v2.InterpolationMode.BICUBIC
    steps: list[torch.nn.Module] = [v2.Resize((16, 16), interpolation=bicubic)]
    if crop_scale:
        steps = [v2.RandomResizedCrop(16, scale=(crop_scale, 1.0), interpolation=bicubic)]
    steps += [v2.RandomHorizontalFlip()] if flip else []
    steps += [v2.ColorJitter(0.4, 0.4, 0.4)] if color_jitter else []
    steps += [RandAugment()] if rand_augment else []  # type: ignore[list-item]
    augment = AugmentConfig(crop_scale=crop_scale, flip=flip, color_jitter=color_jitter, rand_augment=rand_augment)
    transform = ImageTransform(16, augment)
    for seed in range(8):
        image = picture(((48, 40), (16, 16), (9, 70))[seed % 3])
        torch.default_generator.manual_seed(seed)
        expected = torch.from_numpy(np.array(v2.Compose(steps)(image))).permute(2, 0, 1)
        assert torch.equal(transform(image, seed), expected)
        if not color_jitter and not rand_augment:
            assert torch.equal(transform(image, 99, transform.draw_view(image, seed)), expected)


def test_a_view_can_be_given_instead_of_drawn() -> None:
    image = picture((48, 40))
    transform = ImageTransform(16, AugmentConfig())
    views = {transform.draw_view(image, seed) for seed in range(10)}
    assert len(views) == 10
    for seed, view in enumerate(views):
        assert torch.equal(transform(image, 77, view), transform(image, seed, view))
    left, top, width, height = 8, 4, 16, 16
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, top : top + height, left : left + width]
    for whose in (transform, ImageTransform(16)):
        assert torch.equal(whose(image, 0, ImageView((left, top, width, height), False)), pixels)
        assert torch.equal(whose(image, 0, ImageView((left, top, width, height), True)), pixels.flip(-1))
    assert torch.equal(transform(image, 0, WHOLE), ImageTransform(16)(image, 0))


@pytest.mark.parametrize("augment", [EVERYTHING, AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1")])
def test_the_global_generators_are_left_as_they_were(augment: AugmentConfig) -> None:
    torch.default_generator.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    ImageTransform(16, augment)(picture(), 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


@pytest.mark.parametrize("size", [(48, 40), (40, 51), (17, 16), (3, 200)])
def test_the_middle_is_cut_out_as_torchvision_does(size: tuple[int, int]) -> None:
    image = picture(size)
    expected = v2.Compose([v2.Resize(16, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(16)])(image)
    pixels = ImageTransform(16, center_crop=True)(image, 0)
    assert torch.equal(pixels, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    # In training a crop is random, or there is none.
    resize = AugmentConfig(crop_scale=None, flip=False)
    assert torch.equal(ImageTransform(16, resize, center_crop=True)(image, 0), ImageTransform(16)(image, 0))


def test_a_rectangle_of_noise() -> None:
    """Of 2 to 33 % of the area, in half of the images; the mean of unit noise is ImageNet's, 115."""
    image = Image.new("RGB", (64, 64), (250, 250, 250))
    transform = ImageTransform(64, AugmentConfig(crop_scale=None, flip=False, random_erasing=0.5))
    noise, num_erased = [], 0
    for seed in range(100):
        changed_HW = (pixels := transform(image, seed)).ne(250).any(0)
        if not changed_HW.any():
            continue
        num_erased += 1
        rows, columns = changed_HW.any(1).nonzero().flatten(), changed_HW.any(0).nonzero().flatten()
        area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1) / 64**2
        assert 0.01 < area < 0.36
        assert changed_HW.sum() > 0.99 * area * 64**2
        noise.append(pixels[:, changed_HW].float().flatten())
    assert 25 < num_erased < 75
    assert torch.cat(noise).mean().item() == pytest.approx(115, abs=2)
    assert torch.cat(noise).std().item() == pytest.approx(57, abs=3)


def test_two_policies_are_one_too_many() -> None:
    with pytest.raises(ValidationError, match="takes the place of rand_augment"):
        AugmentConfig(rand_augment=True, auto_augment="rand-m9")
    with pytest.raises(ConfigError, match=r"auto_augment: 'rand-q9' is no policy of timm's RandAugment"):
        ImageTransform(16, AugmentConfig(auto_augment="rand-q9"))


def test_flipping_mirrors_about_half() -> None:
    image = picture((16, 16))
    transform = ImageTransform(16, AugmentConfig(crop_scale=None, flip=True))
    straight = ImageTransform(16)(image, 0)
    num_straight = 0
    for seed in range(200):
        pixels = transform(image, seed)
        is_straight = torch.equal(pixels, straight)
        assert is_straight or torch.equal(pixels, straight.flip(-1))
        num_straight += is_straight
    assert 65 < num_straight < 135  # five standard deviations


@pytest.mark.parametrize("change", [{"crop_scale": 0}, {"crop_scale": 1.5}, {"color_jitter": -1}])
def test_impossible_augmentation_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig(**change)
