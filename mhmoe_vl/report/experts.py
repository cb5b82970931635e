"""An analysis of experts as the reader of a page sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.colors import Normalize, to_hex

from mhmoe_vl.analysis.result import ExpertAnalysis, PatchPicture, PoolUse, SubTokenDivergence
from mhmoe_vl.report.figures import (
    COUNT_COLORS,
    Points,
    affinity_heat_map,
    curves,
    dots,
    grid_heat_map,
    load_heat_map,
    pool_curves,
)
from mhmoe_vl.report.pictures import tensor_data_uri
from mhmoe_vl.report.progress import Panel

#: Small images are enlarged to about this many pixels, so that the edges of patches stay sharp.
_ENLARGED = 192
#: Share of the colour in a coloured patch.
_OPACITY = 0.55
_COLOR_STOPS = 5


@dataclass(frozen=True)
class ColouredPatches:
    """An image, and the same with its patches coloured by their distinct experts; ``mean`` is over patches."""

    original: str
    coloured: str
    mean: float


@dataclass(frozen=True)
class AnalysisView:
    """Figures beside the numbers of ``analysis``.

    Attributes:
        pools: whole pools and parts of shared ones.
        mean_affinity: share of image tokens among the choices of shared pools.
        panels: small figures over blocks and thresholds.
        patch_map: distinct experts by place in the image.
        gradient: colours from the fewest to the most distinct experts, for CSS; ``scale`` are those two.
    """

    analysis: ExpertAnalysis
    pools: list[PoolUse]
    load_map: str
    affinity_map: str | None
    mean_affinity: float | None
    panels: list[Panel]
    divergence_panels: list[Panel]
    patch_map: str | None
    pictures: list[ColouredPatches]
    gradient: str
    scale: tuple[float, float]


def view_analysis(analysis: ExpertAnalysis) -> AnalysisView:
    """Draw everything; the same analysis gives the same figures."""
    parts = {use.pool.rpartition("/")[0] for use in analysis.pools if use.is_part}
    wholes = [use for use in analysis.pools if not use.is_part]
    # Of a shared pool its parts: what one modality does is more than what both do together.
    loads = {use.pool: use.load for use in analysis.pools if use.pool not in parts}
    divergence = analysis.divergence
    scale = _scale(divergence)
    shared = analysis.affinity
    mean_affinity = sum(affinity.mean for affinity in shared) / len(shared) if shared else None
    return AnalysisView(
        analysis=analysis,
        pools=analysis.pools,
        load_map=load_heat_map(loads, name="analysis/load"),
        affinity_map=_affinity_map(analysis, mean_affinity),
        mean_affinity=mean_affinity,
        panels=[
            Panel(
                "Experts active",
                pool_curves(
                    {use.pool: list(zip(analysis.thresholds, use.activation, strict=True)) for use in wholes},
                    xlabel="threshold: load / mean load",
                    ylabel="share of experts",
                    name="analysis/activation",
                ),
            ),
            *_panels_by_block(analysis),
        ],
        divergence_panels=[] if divergence is None else _divergence_panels(divergence),
        patch_map=_patch_map(divergence, scale),
        pictures=[] if divergence is None else [_coloured(picture, scale) for picture in divergence.pictures],
        gradient=", ".join(to_hex(COUNT_COLORS(stop / (_COLOR_STOPS - 1))) for stop in range(_COLOR_STOPS)),
        scale=scale,
    )


def _panels_by_block(analysis: ExpertAnalysis) -> list[Panel]:
    panels = []
    ratios = {pool: found.ratio for pool, found in analysis.collapse.items() if found.ratio is not None}
    if ratios:
        panels.append(_by_block("Representation collapse", ratios, "Tr within / Tr between", "collapse"))
    if analysis.fluctuation:
        changed = {name: figures.choices for name, figures in analysis.fluctuation.items()}
        panels.append(_by_block("Routing fluctuation", changed, "changed choices, share", "fluctuation"))
    return panels


def _divergence_panels(divergence: SubTokenDivergence) -> list[Panel]:
    means = {name: figures.mean for name, figures in divergence.by_pool.items()}
    panels = [_by_block("Distinct experts per token", means, "mean over tokens", "distinct")]
    if divergence.classes:
        classes = {of_class.name: of_class.mean for of_class in divergence.classes}
        figure = dots(classes, xlabel="distinct experts, mean over pieces", name="analysis/classes")
        panels.append(Panel("By class of words, and by place in the word", figure))
    return panels


def _by_block(title: str, values: Mapping[str, float], ylabel: str, name: str) -> Panel:
    """A line for everything that pools of several blocks have in common: ``vision``, ``text``, ``shared/text``."""
    series: dict[str, list[tuple[float, float]]] = {}
    for pool, value in values.items():
        block, _, kind = pool.partition("/")
        series.setdefault(kind, []).append((int(block.removeprefix("block")), value))
    lines: dict[str, Points] = {kind: sorted(points) for kind, points in series.items()}
    return Panel(title, curves(lines, xlabel="block", ylabel=ylabel, name=f"analysis/{name}"))


def _affinity_map(analysis: ExpertAnalysis, mean: float | None) -> str | None:
    if mean is None:
        return None
    known = {
        affinity.pool: [share for share in affinity.vision_share if share is not None] for affinity in analysis.affinity
    }
    return affinity_heat_map(known, mean=mean, name="analysis/affinity")


def _scale(divergence: SubTokenDivergence | None) -> tuple[float, float]:
    """The fewest and the most distinct experts of any patch that is shown."""
    if divergence is None or not divergence.pictures:
        return (0.0, 1.0)
    values = [value for picture in divergence.pictures for row in picture.distinct for value in row]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low, low + 1)


def _patch_map(divergence: SubTokenDivergence | None, scale: tuple[float, float]) -> str | None:
    if divergence is None or divergence.patches is None:
        return None
    return grid_heat_map(divergence.patches.grid, limits=scale, name="analysis/patches")


def _coloured(picture: PatchPicture, scale: tuple[float, float]) -> ColouredPatches:
    distinct = np.array(picture.distinct)
    image = picture.image.permute(1, 2, 0).numpy()
    factor = max(1, _ENLARGED // max(image.shape[:2]))
    image = image.repeat(factor, 0).repeat(factor, 1)
    height, width = (side // number for side, number in zip(image.shape[:2], distinct.shape, strict=True))
    color_of: Callable[[np.ndarray], np.ndarray] = COUNT_COLORS
    colors = color_of(Normalize(*scale)(distinct))[..., :3].repeat(height, 0).repeat(width, 1) * 255
    blended = ((1 - _OPACITY) * image + _OPACITY * colors).round().astype(np.uint8)
    return ColouredPatches(
        original=_uri(image),
        coloured=_uri(blended),
        mean=float(distinct.mean()),
    )


def _uri(image_HW3: np.ndarray) -> str:
    return tensor_data_uri(torch.from_numpy(np.ascontiguousarray(image_HW3)).permute(2, 0, 1))
