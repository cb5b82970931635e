"""What was found about a visual tokenizer, when that is called a collapse, and its JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mhmoe_vl.data.shards import Skip

#: A codebook has collapsed below these shares of its codes in use and of its perplexity, or if one code takes more
#: than this share of all patches. A convention of ours.
MIN_USED = 0.5
MIN_PERPLEXITY = 0.1
MAX_SHARE = 0.5
#: With fewer patches than this for each code, codes are unused by chance, and nothing is said about their use.
MIN_PATCHES_PER_CODE = 10


@dataclass(frozen=True)
class CodeExamples:
    """One code: how many patches have it, how the tokenizer decodes it, and a few of those patches.

    Attributes:
        decoded: uint8 ``[3, p, p]``.
        patches: uint8 ``[n, 3, p, p]``, the first ones that were read.
    """

    code: int
    count: int
    decoded: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Reconstruction:
    """One image, uint8 ``[3, H, W]``, its codes, int64 ``[rows, columns]``, and the image decoded from them."""

    key: str
    image: Tensor
    codes: Tensor
    decoded: Tensor


@dataclass(frozen=True)
class CodebookHealth:
    """How a tokenizer encodes a set of images.

    Attributes:
        tokenizer: its file.
        image_size: side of the square that images were made.
        counts: patches that have each code.
        perplexity: number of equally frequent codes that would be as hard to guess.
        largest_share: of the patches, those with the most frequent code.
        same_as_left: share of the patches with a left neighbour that have its code; None with one column.
        same_by_chance: what independent patches with the same frequencies would give.
        error: mean squared error of the decoded images, of pixel values in [-1, 1].
        baseline_error: the same if every patch is the mean patch of all images: a tokenizer that says nothing.
        warnings: one line for each sign of collapse.
        most, least: codes with the most and the fewest patches, of those that are used.
    """

    tokenizer: str
    num_codes: int
    patch_size: int
    image_size: int
    num_images: int
    num_patches: int
    num_used: int
    perplexity: float
    largest_share: float
    same_as_left: float | None
    same_by_chance: float
    error: float
    baseline_error: float
    warnings: list[str]
    skipped: list[Skip]
    counts: list[int]
    most: list[CodeExamples]
    least: list[CodeExamples]
    pictures: list[Reconstruction]

    @property
    def num_dead(self) -> int:
        """Codes that no patch has."""
        return self.num_codes - self.num_used

    @property
    def is_judged(self) -> bool:
        """Whether there are patches enough to say that too few codes are used."""
        return self.num_patches >= MIN_PATCHES_PER_CODE * self.num_codes

    def as_json(self) -> str:
        """All numbers; of pictures none."""
        tree: dict[str, Any] = {name: value for name, value in vars(self).items() if name not in _PICTURES}
        tree["skipped"] = [skip._asdict() for skip in self.skipped]
        tree["num_dead"], tree["is_judged"] = self.num_dead, self.is_judged
        tree["thresholds"] = {
            "min_used": MIN_USED,
            "min_perplexity": MIN_PERPLEXITY,
            "max_share": MAX_SHARE,
            "min_patches_per_code": MIN_PATCHES_PER_CODE,
        }
        return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


_PICTURES = ("most", "least", "pictures")


def signs_of_collapse(
    *, num_codes: int, num_patches: int, num_used: int, perplexity: float, largest_share: float
) -> list[str]:
    """One line for each threshold that is crossed."""
    signs = []
    if num_patches >= MIN_PATCHES_PER_CODE * num_codes:
        if num_used < MIN_USED * num_codes:
            share = num_used / num_codes
            signs.append(f"only {num_used:,} of {num_codes:,} codes are used, {share:.1%}, less than {MIN_USED:.0%}")
        if perplexity < MIN_PERPLEXITY * num_codes:
            signs.append(
                f"perplexity {perplexity:,.1f} is {perplexity / num_codes:.1%} of {num_codes:,} codes, less than "
                f"{MIN_PERPLEXITY:.0%}"
            )
    if largest_share > MAX_SHARE:
        signs.append(f"one code takes {largest_share:.1%} of all patches, more than {MAX_SHARE:.0%}")
    return signs
