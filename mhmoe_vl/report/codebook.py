"""The health of a visual tokenizer as the reader of a page sees it."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhmoe_vl.analysis.codebook.health import CodebookHealth, CodeExamples, Reconstruction
from mhmoe_vl.report.figures import Points, curves
from mhmoe_vl.report.pictures import tensor_data_uri
from mhmoe_vl.report.progress import Panel, points

#: Patches are enlarged to about this many pixels, so that their own pixels can be seen.
_ENLARGED = 32
_SAMPLE_ROWS = 2
_GRAY = 128
#: Of a curve over the codes, which may be thousands.
_MAX_POINTS = 200
#: Steps on the colour wheel that come back to no colour for long.
_GOLDEN_RATIO = 0.618034

#: What a tokenizer's training tells of: name of the figure -> heading and unit.
_OF_TRAINING = {
    "cosine": ("Cosine similarity with the teacher", "cosine"),
    "codes_perplexity": ("Perplexity of the codes", "perplexity"),
    "codes_used": ("Codes used", "codes"),
    "codes_revived": ("Codes revived", "codes"),
}


@dataclass(frozen=True)
class CodeMontage:
    """A code, how often it is used, and as data URIs how it is decoded and some of its patches."""

    code: int
    count: int
    share: float
    decoded: str
    samples: str


@dataclass(frozen=True)
class CodedPicture:
    """An image, its codes in colours that mean nothing but sameness, and the image decoded from them."""

    key: str
    original: str
    codes: str
    decoded: str


@dataclass(frozen=True)
class CodebookView:
    """Figures beside the numbers of ``health``.

    Attributes:
        frequencies: share of the patches by rank of the code.
        panels: curves of the tokenizer's own training, if there was one.
    """

    health: CodebookHealth
    frequencies: str
    most: list[CodeMontage]
    least: list[CodeMontage]
    pictures: list[CodedPicture]
    panels: list[Panel]


def view_codebook(
    health: CodebookHealth, *, training: Sequence[Mapping[str, Any]] = (), held_out: Sequence[Mapping[str, Any]] = ()
) -> CodebookView:
    """Draw everything.

    Args:
        training, held_out: records of the ``metrics.jsonl`` that lies beside a trained tokenizer.
    """
    return CodebookView(
        health=health,
        frequencies=_frequencies(health),
        most=[_montage(code, health) for code in health.most],
        least=[_montage(code, health) for code in health.least],
        pictures=[_coded(picture) for picture in health.pictures],
        panels=_training_panels({"training": training, "held out": held_out}),
    )


def _frequencies(health: CodebookHealth) -> str:
    shares = [count / health.num_patches for count in sorted(health.counts, reverse=True) if count]
    step = max(1, len(shares) // _MAX_POINTS)
    ranks = sorted({1, *range(1, len(shares) + 1, step), len(shares)})
    all_ranks = sorted({*ranks, *range(1, health.num_codes + 1, max(1, health.num_codes // 20)), health.num_codes})
    series: dict[str, Points] = {
        "codes": [(rank, shares[rank - 1]) for rank in ranks],
        "uniform": [(rank, 1 / health.num_codes) for rank in all_ranks],
    }
    return curves(
        series,
        xlabel="codes, the most frequent first",
        ylabel="share of patches",
        log=True,
        name="codebook/frequencies",
    )


def _training_panels(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    panels = []
    for name, (title, unit) in _OF_TRAINING.items():
        found = {split: points(of_split, name) for split, of_split in records.items()}
        series = {split: of_split for split, of_split in found.items() if of_split}
        if series:
            panels.append(Panel(title, curves(series, ylabel=unit, name=f"codebook/{name}")))
    return panels


def _montage(examples: CodeExamples, health: CodebookHealth) -> CodeMontage:
    side = examples.decoded.shape[-1]
    num_rows = min(_SAMPLE_ROWS, len(examples.patches))
    num_columns = -(-len(examples.patches) // num_rows)
    grid = torch.full((num_rows * num_columns, 3, side, side), _GRAY, dtype=torch.uint8)
    grid[: len(examples.patches)] = examples.patches
    # [rows, columns, 3, side, side] -> one picture.
    samples = grid.unflatten(0, (num_rows, num_columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return CodeMontage(
        code=examples.code,
        count=examples.count,
        share=examples.count / health.num_patches,
        decoded=tensor_data_uri(_enlarged(examples.decoded, _SAMPLE_ROWS * _ENLARGED)),
        samples=tensor_data_uri(_enlarged(samples, _SAMPLE_ROWS * _ENLARGED)),
    )


def _enlarged(image_3HW: Tensor, height: int) -> Tensor:
    factor = max(1, height // image_3HW.shape[1])
    return image_3HW.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def _coded(picture: Reconstruction) -> CodedPicture:
    side = picture.image.shape[-1] // picture.codes.shape[-1]
    colors = torch.tensor([_color_of(code) for code in picture.codes.flatten().tolist()], dtype=torch.uint8)
    code_map = colors.view(*picture.codes.shape, 3).permute(2, 0, 1)
    return CodedPicture(
        key=picture.key,
        original=tensor_data_uri(picture.image),
        codes=tensor_data_uri(_enlarged(code_map, side * code_map.shape[1])),
        decoded=tensor_data_uri(picture.decoded),
    )


def _color_of(code: int) -> tuple[int, int, int]:
    """Different for codes of near numbers; in three brightnesses, since there are more codes than hues."""
    red, green, blue = colorsys.hsv_to_rgb(code * _GOLDEN_RATIO % 1, 0.65, (0.95, 0.7, 0.45)[code % 3])
    return round(255 * red), round(255 * green), round(255 * blue)
