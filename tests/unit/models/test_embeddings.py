"""Pixels, positions and text embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mhmoe_vl.models.embeddings import normalize_pixels, resize_positions
from tests.unit.models.builders import images, make_encoder, texts


def cubic(distance: float) -> float:
    """Keys' cubic convolution kernel with a = -0.75."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def interpolation_matrix(size: int, new_size: int) -> np.ndarray:
    """Weights ``[new_size, size]``: pixel centres at half integers, edges repeated."""
    weights = np.zeros((new_size, size))
    for row in range(new_size):
        centre = (row + 0.5) * size / new_size - 0.5
        for place in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[row, min(max(place, 0), size - 1)] += cubic(centre - place)
    return weights


@pytest.mark.parametrize("grid", [(6, 6), (3, 5), (8, 4)])
def test_positions_are_resized_bicubically(grid: tuple[int, int]) -> None:
    positions = torch.randn(1, 17, 3)
    resized = resize_positions(positions, grid)
    rows, columns = (interpolation_matrix(4, size) for size in grid)
    square = positions[0, 1:].double().numpy().reshape(4, 4, 3)
    expected = np.einsum("ir,jc,rcd->ijd", rows, columns, square).reshape(1, -1, 3)
    assert torch.equal(resized[:, :1], positions[:, :1])
    assert_close(resized[:, 1:].double(), torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_images_of_other_sizes_and_shapes() -> None:
    embedding = make_encoder().vision_embedding
    with torch.no_grad():
        embedding.patches.weight.zero_()
        embedding.patches.bias.zero_()
        embedding.class_token.zero_()
    # Only positions are left.
    assert torch.equal(embedding(images(1)), embedding.positions)
    assert_close(embedding(images(2, size=(24, 8)))[1:], resize_positions(embedding.positions, (6, 2)))
    with pytest.raises(ValueError, match=r"image of \(16, 18\) pixels is not a multiple of 4-px patches"):
        embedding(images(1, size=(16, 18)))


def test_masked_patches_keep_their_place_and_lose_their_content() -> None:
    embedding = make_encoder().vision_embedding
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [2, 7]] = True
    first, second = embedding(images(1, seed=1), mask), embedding(images(1, seed=2), mask)
    same = (first == second).all(-1)[0].nonzero().flatten().tolist()
    assert same == [0, 3, 8]  # the class token, and both patches behind it
    assert_close(first[0, 3], embedding.mask_token[0, 0] + embedding.positions[0, 3])
    assert_close(first[0, 8], embedding.mask_token[0, 0] + embedding.positions[0, 8])


def test_imagenet_s_statistics() -> None:
    """Against torchvision, and through the encoder that is told to use them."""
    from torchvision.transforms.v2 import functional

    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = functional.normalize(image.double() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert_close(normalize_pixels(image, "imagenet").double(), expected, atol=1e-6, rtol=0)
    assert normalize_pixels(expected, "imagenet") is expected
    encoder = make_encoder(image_normalization="imagenet")
    assert_close(encoder(image).vision, encoder(expected).vision, atol=1e-5, rtol=1e-5)


def test_pixels_become_minus_one_to_one() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert_close(normalize_pixels(pixels), torch.tensor([-1.0, -0.6, 1.0]))
    scaled = torch.tensor([0.25])
    assert normalize_pixels(scaled) is scaled
    encoder = make_encoder()
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    assert_close(encoder(image).vision, encoder(image.double() / 127.5 - 1).vision, atol=1e-5, rtol=1e-5)


def test_text_positions_and_padding() -> None:
    embedding = make_encoder().text_embedding
    ids = texts(2, 4)
    valid = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    embedded = embedding(ids, valid, first_position=3)
    assert_close(embedded[1, 2], embedding.tokens.weight[ids[1, 2]] + embedding.positions[0, 5])
    assert not embedded[0, 2:].any()


def test_a_text_that_is_too_long() -> None:
    embedding = make_encoder().text_embedding
    assert embedding(texts(1, 4), first_position=8).shape == (1, 4, 16)
    with pytest.raises(ValueError, match="text of 13 tokens exceeds max_text_length=12"):
        embedding(texts(1, 4), first_position=9)
