"""Masks of patches and of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from mhmoe_vl.data.masking import IGNORE, mask_patches, mask_text
from tests.unit.data.builders import word_tokenizer

TOKENIZER = word_tokenizer(num_words=200)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sentence(num_words: int) -> list[int]:
    words = TOKENIZER.ordinary_ids
    return [TOKENIZER.bos_id, *(words[i % len(words)] for i in range(num_words)), TOKENIZER.eos_id]


@given(rows=st.integers(1, 16), columns=st.integers(1, 16), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_exactly_so_many_patches_are_hidden(rows: int, columns: int, share: float, seed: int) -> None:
    num_masked = round(share * rows * columns)
    mask = mask_patches((rows, columns), num_masked, rng(seed))
    assert mask.shape == (rows * columns,)
    assert mask.dtype == bool
    assert mask.sum() == num_masked


@pytest.mark.parametrize("num_masked", [-1, 17])
def test_more_patches_than_there_are_cannot_be_hidden(num_masked: int) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 16"):
        mask_patches((4, 4), num_masked, rng())


def test_patches_are_hidden_in_blocks() -> None:
    """BEiT's grid and ratio: few connected regions, and few borders, against independent draws of the same count."""
    num_regions, num_borders, of_independent = [], [], []
    for seed in range(100):
        mask = mask_patches((14, 14), 78, rng(seed)).reshape(14, 14)
        num_regions.append(ndimage.label(mask)[1])
        num_borders.append((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())
        scattered = rng(seed).permutation(np.arange(196) < 78).reshape(14, 14)
        of_independent.append((scattered[1:] != scattered[:-1]).sum() + (scattered[:, 1:] != scattered[:, :-1]).sum())
    assert np.mean(num_regions) < 6
    assert np.mean(num_borders) < 0.5 * np.mean(of_independent)


class Scripted:
    """Gives out prepared draws and keeps the limits that were asked for."""

    def __init__(self, uniform: list[float], integers: list[int]) -> None:
        self.draws = {"uniform": uniform, "integers": integers}
        self.limits: dict[str, list[tuple[float, float]]] = {"uniform": [], "integers": []}

    def uniform(self, low: float, high: float) -> float:
        return self._draw("uniform", low, high)

    def integers(self, low: int, high: int) -> float:
        return self._draw("integers", low, high)

    def permutation(self, items: np.ndarray) -> np.ndarray:
        return items

    def _draw(self, kind: str, low: float, high: float) -> float:
        self.limits[kind].append((low, high))
        return self.draws[kind].pop(0)


def test_two_blocks_worked_by_hand() -> None:
    """Area 8 at aspect 2 is 4 rows of 2; area 3 at aspect 1 is 2 rows of 2, of which two patches are still wanted."""
    draws = Scripted(uniform=[8, np.log(2), 3, 0], integers=[1, 2, 0, 1])
    mask = mask_patches((6, 6), 10, draws)  # type: ignore[arg-type]
    expected = [
        ". # # . . .",
        ". . # # . .",
        ". . # # . .",
        ". . # # . .",
        ". . # # . .",
        ". . . . . .",
    ]
    assert [" ".join(".#"[int(hidden)] for hidden in row) for row in mask.reshape(6, 6)] == expected
    log_limit = pytest.approx(np.log(1 / 0.3))
    # The least area is 16 of 196 patches, here 3 of 36.
    areas, aspects = draws.limits["uniform"][::2], draws.limits["uniform"][1::2]
    assert areas == [(3, 10), (3, 3)]
    assert [(-low, high) for low, high in aspects] == [(log_limit, log_limit)] * 2
    # Corners may lie wherever the block still fits: 6 - 4 + 1 rows and 6 - 2 + 1 columns.
    assert draws.limits["integers"] == [(0, 3), (0, 5), (0, 5), (0, 5)]


def test_a_mask_depends_on_its_generator_alone() -> None:
    masks = [mask_patches((14, 14), 78, rng(seed)) for seed in (3, 3, 4)]
    assert (masks[0] == masks[1]).all()
    assert (masks[0] != masks[2]).any()


def test_every_patch_is_hidden_about_equally_often_near_the_centre() -> None:
    share = np.mean([mask_patches((14, 14), 78, rng(seed)) for seed in range(300)], axis=0).reshape(14, 14)
    assert share.mean() == pytest.approx(78 / 196)
    assert (share[2:-2, 2:-2] > 0.25).all()
    assert (share > 0.03).all()


@given(num_words=st.integers(0, 40), ratio=st.floats(0, 1), include_end=st.booleans(), seed=st.integers(0, 100))
def test_exactly_so_many_tokens_are_chosen(num_words: int, ratio: float, include_end: bool, seed: int) -> None:
    ids = sentence(num_words)
    inputs, targets = mask_text(list(ids), ratio, TOKENIZER, rng(seed), include_end=include_end)
    num_candidates = num_words + include_end
    chosen = [position for position, target in enumerate(targets) if target != IGNORE]
    assert len(inputs) == len(targets) == len(ids)
    assert len(chosen) == (max(1, round(ratio * num_candidates)) if ratio > 0 and num_candidates else 0)
    assert all(targets[position] == ids[position] for position in chosen)
    assert all(inputs[position] == ids[position] for position in set(range(len(ids))) - set(chosen))
    assert 0 not in chosen
    if not include_end:
        assert len(ids) - 1 not in chosen


def test_the_end_is_chosen_like_any_token_in_captioning() -> None:
    chosen = [mask_text(sentence(9), 0.5, TOKENIZER, rng(seed), include_end=True)[1][-1] for seed in range(400)]
    share = np.mean([target == TOKENIZER.eos_id for target in chosen])
    assert share == pytest.approx(0.5, abs=0.125)  # five standard deviations
    assert set(chosen) == {TOKENIZER.eos_id, IGNORE}


def test_eighty_percent_masks_ten_percent_random_ten_percent_kept() -> None:
    ids = sentence(400)
    num = {"mask": 0, "random": 0, "kept": 0}
    drawn = set()
    for seed in range(50):
        inputs, targets = mask_text(list(ids), 0.5, TOKENIZER, rng(seed))
        for fed, target in zip(inputs, targets, strict=True):
            if target == IGNORE:
                continue
            num["mask" if fed == TOKENIZER.mask_id else "kept" if fed == target else "random"] += 1
            if fed not in (TOKENIZER.mask_id, target):
                drawn.add(fed)
    assert sum(num.values()) == 50 * 200
    # Standard deviations of 10,000 draws: 0.004 and 0.003. One random token in 200 is the token itself.
    assert num["mask"] / 10_000 == pytest.approx(0.8, abs=0.02)
    assert num["random"] / 10_000 == pytest.approx(0.1 * 199 / 200, abs=0.015)
    assert num["kept"] / 10_000 == pytest.approx(0.1 + 0.1 / 200, abs=0.015)
    assert drawn <= set(TOKENIZER.ordinary_ids)
    assert len(drawn) > 150


@pytest.mark.parametrize("num_words", [0, 1])
def test_tiny_texts(num_words: int) -> None:
    inputs, targets = mask_text(sentence(num_words), 0.15, TOKENIZER, rng())
    assert len(inputs) == num_words + 2
    assert [target != IGNORE for target in targets] == [False, *[True] * num_words, False]


def test_ratio_zero_hides_nothing_and_the_input_is_left_alone() -> None:
    ids = sentence(5)
    assert mask_text(ids, 0.0, TOKENIZER, rng()) == (ids, [IGNORE] * 7)
    mask_text(ids, 1.0, TOKENIZER, rng())
    assert ids == sentence(5)


def test_token_masks_depend_on_their_generator_alone() -> None:
    masked = [mask_text(sentence(40), 0.4, TOKENIZER, rng(seed)) for seed in (3, 3, 4)]
    assert masked[0] == masked[1] != masked[2]
