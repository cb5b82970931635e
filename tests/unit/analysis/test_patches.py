from __future__ import annotations

import numpy as np
import pytest
import torch

from mhmoe_vl.analysis.patches import PatchSums, texture
from mhmoe_vl.data.batch import Batch


def images(num: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    contrast = torch.rand(num, 1, 8, 12, generator=generator)
    return (255 * contrast * torch.rand(num, 3, 8, 12, generator=generator)).to(torch.uint8)


def batch_of(image: torch.Tensor, name: str) -> Batch:
    num = image.shape[0]
    return Batch(tuple(f"{name}{i}" for i in range(num)), torch.zeros(num, dtype=torch.long), image=image)


def test_texture_by_hand() -> None:
    """Patches of 2 x 2: flat, and half black, half white."""
    row = torch.tensor([[7, 7, 0, 255], [7, 7, 0, 255]], dtype=torch.uint8)
    assert texture(row.expand(1, 3, 2, 4), 2).tolist() == [[0.0, 127.5]]


def test_sums_equal_what_all_images_give_at_once() -> None:
    generator = torch.Generator().manual_seed(3)
    sums = PatchSums(patch_size=4, num_pictures=3)
    whole, all_distinct, all_texture = [], [], []
    for number, size in enumerate((2, 4)):
        image = images(size, number)
        layers = {f"block{i}/vision": torch.randint(1, 5, (size, 1 + 6), generator=generator) for i in (1, 3)}
        sums.add(batch_of(image, f"{number}-"), layers)
        mean = np.mean([of_layer.numpy() for of_layer in layers.values()], axis=0)
        whole.append(mean)
        all_distinct.append(mean[:, 1:].reshape(-1))
        gray = image.double().mean(1).numpy()
        patches = gray.reshape(size, 2, 4, 3, 4).transpose(0, 1, 3, 2, 4).reshape(size, 6, 16)
        all_texture.append(patches.std(-1).reshape(-1))
    found = sums.figures()
    assert found is not None
    expected = np.concatenate(whole)
    assert found.num_images == 6
    np.testing.assert_allclose(np.array(found.grid), expected[:, 1:].mean(0).reshape(2, 3))
    assert found.class_token == pytest.approx(expected[:, 0].mean())
    assert found.mean == pytest.approx(expected[:, 1:].mean())
    correlation = np.corrcoef(np.concatenate(all_distinct), np.concatenate(all_texture))[0, 1]
    assert found.texture_correlation == pytest.approx(correlation)
    assert [picture.sample_id for picture in sums.pictures] == ["0-0", "0-1", "1-0"]
    np.testing.assert_allclose(np.array(sums.pictures[2].distinct), expected[2, 1:].reshape(2, 3))
    assert torch.equal(sums.pictures[2].image, images(4, 1)[0])


def test_what_does_not_vary_does_not_correlate() -> None:
    sums = PatchSums(patch_size=4, num_pictures=0)
    sums.add(batch_of(images(2, 0), "a"), {"block1/vision": torch.full((2, 7), 2)})
    found = sums.figures()
    assert found is not None
    assert found.texture_correlation is None
    assert sums.pictures == []


def test_a_blind_run_has_no_patches() -> None:
    sums = PatchSums(patch_size=4, num_pictures=2)
    sums.add(batch_of(images(2, 0), "a"), {"block1/vision": torch.full((2, 1), 2)})
    assert sums.figures() is None
