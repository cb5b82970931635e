"""BEiT-3's RandAugment: its operations at magnitude 7, one at a time, against what they are by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from mhmoe_vl.data import rand_augment
from mhmoe_vl.data.rand_augment import RandAugment

IDENTITY, AUTOCONTRAST, EQUALIZE, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y, SHIFT_X, SHIFT_Y, TURN = range(10)


def apply(number: int, pixels: NDArray[np.uint8], sign: float = 1.0) -> NDArray[np.uint8]:
    return np.array(rand_augment._OPERATIONS[number](Image.fromarray(pixels), 0.7, sign))


def grey(rows: int, columns: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(40, 200, (rows, columns, 3), dtype=np.uint8)


def test_there_are_ten_and_none_changes_a_colour() -> None:
    assert len(rand_augment._OPERATIONS) == 10
    assert np.array_equal(apply(IDENTITY, grey(4, 6)), grey(4, 6))
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 0] = 100
    for number in (BRIGHTNESS, SHARPNESS):
        assert (apply(number, red)[..., 1:] == 0).all()


def test_brightness_by_hand() -> None:
    """0.7 * 1.8 + 0.1 = 1.36-fold."""
    found = apply(BRIGHTNESS, grey(5, 5)).astype(float)
    np.testing.assert_allclose(found, np.minimum(255, grey(5, 5) * 1.36), atol=1)


def test_contrast_and_equalisation_by_hand() -> None:
    """Stretched to all of 0 to 255, in every channel; four values that are equally frequent lie equally far apart."""
    pixels = grey(9, 9)
    assert apply(AUTOCONTRAST, pixels).min(axis=(0, 1)).tolist() == [0, 0, 0]
    assert apply(AUTOCONTRAST, pixels).max(axis=(0, 1)).tolist() == [255, 255, 255]
    steps = np.repeat(np.array([10, 11, 12, 13], dtype=np.uint8), 2550)[:, None, None].repeat(3, -1)
    assert np.unique(apply(EQUALIZE, np.ascontiguousarray(steps))).tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_shifts_are_seven_pixels_whatever_the_size(sign: float) -> None:
    pixels = grey(20, 30)
    for number, axis in ((SHIFT_X, 1), (SHIFT_Y, 0)):
        found = apply(number, pixels, sign)
        expected = np.roll(pixels, -int(7 * sign), axis=axis)
        fresh = [slice(None), slice(None)]
        fresh[axis] = slice(-7, None) if sign > 0 else slice(0, 7)
        expected[tuple(fresh)] = 128
        assert np.array_equal(found, expected)


def test_shears_and_turns_by_a_bright_point() -> None:
    """A shear by 0.21 moves the row 20 below the first by 4.2 pixels; a turn by 21 degrees moves a point on the middle
    line, 20 pixels right of the centre, by 20 sin(21) = 7.2 up and 20 (1 - cos(21)) = 1.3 back."""

    def moved(number: int, row: int, column: int) -> tuple[float, float]:
        pixels = np.zeros((61, 61, 3), dtype=np.uint8)
        pixels[row, column] = 250
        found = apply(number, pixels)[..., 0].astype(float)
        found[found == 128] = 0  # what came in from outside
        total = found.sum()
        rows, columns = np.indices(found.shape)
        return (rows * found).sum() / total - row, (columns * found).sum() / total - column

    assert moved(SHEAR_X, 20, 30) == (pytest.approx(0, abs=0.2), pytest.approx(-4.2, abs=0.3))
    assert moved(SHEAR_Y, 30, 20) == (pytest.approx(-4.2, abs=0.3), pytest.approx(0, abs=0.2))
    assert moved(TURN, 30, 50) == (pytest.approx(-7.2, abs=0.7), pytest.approx(-1.3, abs=0.7))


def test_two_are_drawn_and_each_is_done_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, float, float]] = []

    def operation(number: int) -> rand_augment.Operation:
        def note(picture: Image.Image, level: float, sign: float) -> Image.Image:
            done.append((number, level, sign))
            return picture

        return note

    monkeypatch.setattr(rand_augment, "_OPERATIONS", tuple(operation(number) for number in range(10)))
    torch.manual_seed(0)
    numbers_done = []
    for _ in range(2000):
        before = len(done)
        RandAugment()(Image.new("RGB", (2, 2)))
        numbers_done.append(len(done) - before)
    shares = np.bincount(numbers_done) / 2000
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.06)
    np.testing.assert_allclose(np.bincount([number for number, _, _ in done]) / len(done), 0.1, atol=0.04)
    assert {level for _, level, _ in done} == {0.7}
    assert np.mean([sign for _, _, sign in done]) == pytest.approx(0, abs=0.12)
