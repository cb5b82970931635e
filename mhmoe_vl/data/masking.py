"""What is hidden from the model: blocks of patches and tokens of text.

All draws come from the generator that is passed in, which the caller seeds per sample: masks depend neither on the
number of workers nor on the number of ranks.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mhmoe_vl.data.text import TextTokenizer

#: Target of a position that is not predicted; the default of torch's cross entropy.
IGNORE = -100


def mask_patches(grid: tuple[int, int], num_masked: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Block-wise mask of exactly ``num_masked`` patches (BEiT, arXiv 2106.08254, algorithm 1).

    Blocks have an aspect ratio between 0.3 and 1/0.3 and cover at least 16 of 196 patches (the same share of
    smaller grids); the last block is trimmed at random so that the count is exact and shapes stay static.

    Args:
        grid: rows and columns of patches.
        num_masked: between 0 and the number of patches.

    Returns:
        bool ``[rows * columns]``, True where hidden, row by row.
    """
    rows, columns = grid
    if not 0 <= num_masked <= rows * columns:
        raise ValueError(f"num_masked={num_masked} must lie between 0 and {rows * columns}")
    mask = np.zeros((rows, columns), dtype=bool)
    smallest = max(1, round(rows * columns * 16 / 196))
    while (missing := num_masked - int(mask.sum())) > 0:
        area = rng.uniform(smallest, max(smallest, missing))
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        height = min(rows, max(1, round(math.sqrt(area * aspect))))
        width = min(columns, max(1, round(math.sqrt(area / aspect))))
        top, left = rng.integers(0, rows - height + 1), rng.integers(0, columns - width + 1)
        block = np.zeros_like(mask)
        block[top : top + height, left : left + width] = True
        new = np.flatnonzero(block & ~mask)
        if len(new) > missing:
            new = rng.permutation(new)[:missing]
        mask.flat[new] = True
    return mask.reshape(-1)


def mask_text(
    ids: list[int], ratio: float, tokenizer: TextTokenizer, rng: np.random.Generator, *, include_end: bool = False
) -> tuple[list[int], list[int]]:
    """BERT's masking: of the chosen tokens 80 % become ``<mask>``, 10 % a random token, 10 % stay.

    ``round(ratio * n)`` of the n tokens between ``<s>`` and ``</s>`` are chosen, at least one if there are any.

    Args:
        ids: ``<s> ... </s>``.
        include_end: ``</s>`` may be chosen too, as captioning needs in order to learn when to stop.

    Returns:
        The ids to feed, and the targets (:data:`IGNORE` where nothing is predicted).
    """
    last = len(ids) if include_end else len(ids) - 1
    candidates = np.arange(1, last)
    inputs, targets = list(ids), [IGNORE] * len(ids)
    if len(candidates) == 0 or ratio == 0:
        return inputs, targets
    num_chosen = max(1, round(ratio * len(candidates)))
    chosen = rng.permutation(candidates)[:num_chosen]
    kinds = rng.random(num_chosen)
    replacements = rng.integers(0, len(tokenizer.ordinary_ids), num_chosen)
    for position, kind, replacement in zip(chosen.tolist(), kinds, replacements, strict=True):
        targets[position] = ids[position]
        if kind < 0.8:
            inputs[position] = tokenizer.mask_id
        elif kind < 0.9:
            inputs[position] = tokenizer.ordinary_ids[replacement]
    return inputs, targets
