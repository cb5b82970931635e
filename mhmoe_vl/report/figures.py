"""Figures as SVG to be put inside the page, where they take their colours and fonts from its style sheet.

matplotlib writes plain colours. Here each colour that should follow the page's light or dark theme is a stand-in that
no data uses, and is replaced by a CSS variable in the finished SVG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from mhmoe_vl.evaluation.score_card import ScoreCard

Points = Sequence[tuple[float, float]]

_INK, _GRID, _BASELINE = "#010101", "#020202", "#030303"
_SERIES = ("#040401", "#040402", "#040403", "#040404", "#040405", "#040406")
_THEME = {_INK: "currentColor", _GRID: "var(--line)", _BASELINE: "var(--baseline)"} | {
    stand_in: f"var(--series-{number})" for number, stand_in in enumerate(_SERIES, start=1)
}
#: The light theme, for pictures without a page.
_PLAIN = {
    "currentColor": "#22252a",
    "var(--line)": "#dfe1e0",
    "var(--baseline)": "#b4b8bc",
    "var(--series-1)": "#2f6690",
    "var(--series-2)": "#b5632a",
    "var(--series-3)": "#3f8a76",
    "var(--series-4)": "#7d5a9b",
    "var(--series-5)": "#8c6d1f",
    "var(--series-6)": "#a04668",
}
#: Colours of the modalities wherever they are told apart.
_MODALITY_COLORS = {"vision": _SERIES[0], "text": _SERIES[1]}

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}
_LOAD_COLORS = LinearSegmentedColormap.from_list("load", ["#2f6690", "#e9e6df", "#b5532a"])
#: From text to vision, in the light theme's colours of the modalities.
_AFFINITY_COLORS = LinearSegmentedColormap.from_list("affinity", ["#b5632a", "#e9e6df", "#2f6690"])
#: From few to many, also of patches drawn over a picture.
COUNT_COLORS = LinearSegmentedColormap.from_list("count", ["#1f3f6e", "#2f8f9d", "#f2d14b"])
_MAX_COLUMNS_WITH_NUMBERS = 16

#: Width and height in inches of a figure that stands beside others; in CSS an inch is 96 pixels.
_PANEL = (3.5, 2.3)
_PIXELS_PER_INCH = 96


def score_bars(card: ScoreCard) -> str:
    """The score beside its baselines, as horizontal bars."""
    constant = {"majority": "majority answer"}.get(card.constant, card.constant)
    rows = [("model", card.score, _SERIES[0]), ("blind", card.blind, _BASELINE), (constant, card.majority, _BASELINE)]
    known = [(name, value, color) for name, value, color in rows if value is not None]

    def draw(axes: Axes) -> None:
        names, values, colors = zip(*reversed(known), strict=True)
        bars = axes.barh(names, values, color=colors, height=0.62)
        axes.bar_label(bars, fmt="%.1f", padding=4)
        axes.margins(x=0.14)
        axes.grid(axis="y", visible=False)
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel({"captioning": "CIDEr x 100", "retrieval": "recall@1, %"}.get(card.task, "accuracy, %"))

    return _draw(draw, size=(_PANEL[0], 0.7 + 0.32 * len(known)), name=f"scores/{card.task}")


def curves(
    series: Mapping[str, Points],
    *,
    ylabel: str,
    name: str,
    xlabel: str = "step",
    log: bool = False,
    from_zero: bool = False,
) -> str:
    """Lines over training steps, or what else ``xlabel`` says; a series of few points has markers.

    Args:
        log: logarithmic values.
        from_zero: let the axis of values start at 0.
        name: of the figure, unlike every other's on the page.
    """

    def draw(axes: Axes) -> None:
        for number, (label, points) in enumerate(series.items()):
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) <= 12 else None
            axes.plot(steps, values, label=label, color=_SERIES[number % len(_SERIES)], marker=marker, markersize=3.5)
        if log:
            _log_values(axes)
        if from_zero:
            # A margin of the whole axis: Matplotlib's, of the range of values, would cut the highest one in half.
            axes.set_ylim(0, 1.06 * axes.dataLim.y1)
        if len(series) > 1:
            _legend_above(axes)
        _label(axes, xlabel, ylabel)

    return _draw(draw, size=_PANEL, name=name)


@dataclass(frozen=True)
class Band:
    """A line with the range that it was drawn from: ``low <= y <= high`` at every ``x``."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def bands(series: Mapping[str, Band], *, xlabel: str, ylabel: str, name: str, log: bool = False) -> str:
    """Lines with the range of the runs behind each of them; behind the last colour they are dashed.

    Args:
        log: logarithmic values.
    """

    def draw(axes: Axes) -> None:
        for number, (label, band) in enumerate(series.items()):
            color = _SERIES[number % len(_SERIES)]
            dashes = "-" if number < len(_SERIES) else "--"
            marker = "o" if len(band.x) <= 12 else None
            axes.fill_between(band.x, band.low, band.high, color=color, alpha=0.18, linewidth=0)
            axes.plot(band.x, band.y, dashes, label=label, color=color, marker=marker, markersize=2.5)
        if log:
            _log_values(axes)
        _legend_above(axes)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)

    num_rows = -(-len(series) // 2)
    return _draw(draw, size=(_PANEL[0], _PANEL[1] + 0.17 * num_rows), name=name)


@dataclass(frozen=True)
class Interval:
    """A value between ``low`` and ``high``.

    Attributes:
        is_marked: drawn in colour; otherwise grey.
        other: somebody else's value, drawn as a ring.
    """

    label: str
    value: float
    low: float
    high: float
    is_marked: bool
    other: float | None = None


def forest(intervals: Sequence[Interval], *, xlabel: str, name: str, other_label: str = "") -> str:
    """Values with their intervals, one below the other, against 0.

    Args:
        intervals: from top to bottom.
        other_label: what the rings are.
    """

    def draw(axes: Axes) -> None:
        rows = range(len(intervals))[::-1]
        axes.axvline(0, color=_INK, linewidth=0.8)
        for row, interval in zip(rows, intervals, strict=True):
            color = _SERIES[0] if interval.is_marked else _BASELINE
            axes.plot([interval.low, interval.high], [row, row], color=color, linewidth=1.8, solid_capstyle="butt")
            axes.plot([interval.value], [row], "o", color=color, markersize=5)
        others = [(i.other, row) for i, row in zip(intervals, rows, strict=True) if i.other is not None]
        if others:
            x, y = zip(*others, strict=True)
            axes.plot(
                x, y, "o", color=_SERIES[1], markerfacecolor="none", markersize=6, label=other_label, linestyle=""
            )
            _legend_above(axes)
        axes.set_yticks(list(rows), [interval.label for interval in intervals])
        axes.set_ylim(-0.6, len(intervals) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(xlabel)

    return _draw(draw, size=(6.5, 0.9 + 0.23 * len(intervals)), name=name)


def standalone(svg: str) -> str:
    """A figure of a page as a file of its own: in the colours of the light theme, on white, at the size of the page."""
    for color, plain in _PLAIN.items():
        svg = svg.replace(color, plain)
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert found is not None
    width, height = (round(float(points) * _PIXELS_PER_INCH / 72) for points in found.groups())
    svg = re.sub(r' style="max-width: \d+px"', f' width="{width}" height="{height}"', svg, count=1)
    end = svg.index(">") + 1
    return svg[:end] + '\n <rect width="100%" height="100%" fill="#ffffff"/>' + svg[end:]


def pool_curves(series: Mapping[str, Points], *, ylabel: str, name: str, xlabel: str = "step") -> str:
    """Lines over training steps, or what else ``xlabel`` says, one for each expert pool, in the colour of the pool's
    modality."""

    def draw(axes: Axes) -> None:
        modalities: dict[str, None] = {}
        for pool, points in series.items():
            modality = modality_of(pool)
            steps, values = zip(*points, strict=True)
            label = None if modality in modalities else modality
            axes.plot(steps, values, label=label, color=_MODALITY_COLORS.get(modality, _SERIES[2]), linewidth=1.2)
            modalities[modality] = None
        if all(isinstance(value, int) for of_pool in series.values() for _, value in of_pool):
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        _legend_above(axes)
        _label(axes, xlabel, ylabel)

    return _draw(draw, size=_PANEL, name=name)


def load_heat_map(load: Mapping[str, Sequence[float]], *, name: str) -> str:
    """Load of every expert over the mean load of its pool; a row per pool, experts sorted by load.

    Args:
        load: share of the choices that each expert gets, by pool.
    """
    rows = {pool: sorted((share * len(shares) for share in shares), reverse=True) for pool, shares in load.items()}
    highest = max(2.0, max(max(row) for row in rows.values()))
    return _heat_map(
        rows,
        colors=_LOAD_COLORS,
        norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=highest),
        ticks=[0, 1, round(highest, 1)],
        xlabel="experts, busiest first",
        name=name,
    )


def affinity_heat_map(vision_share: Mapping[str, Sequence[float]], *, mean: float, name: str) -> str:
    """Share of each expert's load that image tokens bring; a row per pool, experts sorted by it.

    Args:
        mean: share of image tokens among all, where the colours change.
    """
    middle = min(max(mean, 0.01), 0.99)
    return _heat_map(
        {pool: sorted(shares, reverse=True) for pool, shares in vision_share.items()},
        colors=_AFFINITY_COLORS,
        norm=TwoSlopeNorm(middle, vmin=0.0, vmax=1.0),
        ticks=[0, round(middle, 2), 1],
        xlabel="experts, most for images first",
        name=name,
    )


def grid_heat_map(grid: Sequence[Sequence[float]], *, limits: tuple[float, float], name: str) -> str:
    """Values by row and column of an image's patches.

    Args:
        limits: of the colours.
    """
    low, high = limits
    return _heat_map(
        {str(number): row for number, row in enumerate(grid, start=1)},
        colors=COUNT_COLORS,
        norm=Normalize(low, high),
        ticks=[low, high],
        xlabel="column of the patch",
        name=name,
        digits=2,
    )


def dots(values: Mapping[str, float], *, xlabel: str, name: str) -> str:
    """A value for each of a few names, as points on horizontal lines: their axis need not start at 0."""

    def draw(axes: Axes) -> None:
        names = list(values)[::-1]
        numbers = [values[label] for label in names]
        axes.plot(numbers, names, "o", color=_SERIES[0], markersize=5)
        for place, number in enumerate(numbers):
            axes.annotate(f"{number:.2f}", (number, place), xytext=(7, -3), textcoords="offset points")
        axes.margins(x=0.2, y=0.08)
        axes.grid(axis="x", visible=False)
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.set_xlabel(xlabel)

    return _draw(draw, size=(_PANEL[0], 0.7 + 0.28 * len(values)), name=name)


def _heat_map(
    rows: Mapping[str, Sequence[float]],
    *,
    colors: LinearSegmentedColormap,
    norm: Normalize,
    ticks: Sequence[float],
    xlabel: str,
    name: str,
    digits: int = 1,
) -> str:
    """Rows of coloured cells, which may differ in length; with numbers in them unless they are long."""
    num_columns = max(map(len, rows.values()))
    grid = [[*row, *[float("nan")] * (num_columns - len(row))] for row in rows.values()]

    def draw(axes: Axes) -> None:
        mesh = axes.pcolormesh(grid, cmap=colors, norm=norm, edgecolors="face", linewidth=0.3)
        axes.set_yticks([row + 0.5 for row in range(len(rows))], list(rows))
        axes.set_xticks([0.5, num_columns - 0.5], ["1", str(num_columns)])
        axes.set_xlabel(xlabel)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        for spine in axes.spines.values():
            spine.set_visible(False)
        if num_columns <= _MAX_COLUMNS_WITH_NUMBERS:
            _write_numbers(axes, grid, colors, norm, digits)
        color_bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.03, pad=0.02, ticks=list(ticks))
        color_bar.outline.set_visible(False)
        color_bar.ax.tick_params(length=0)

    size = (max(4.5, min(9.0, 1.8 + 0.45 * num_columns)), 0.7 + 0.32 * len(rows))
    return _draw(draw, size=size, name=name)


def modality_of(pool: str) -> str:
    """``block3/vision`` and ``block3/shared/vision`` -> ``vision``."""
    return pool.rpartition("/")[2]


def _write_numbers(
    axes: Axes, grid: Sequence[Sequence[float]], colors: LinearSegmentedColormap, norm: Normalize, digits: int
) -> None:
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if value == value:  # not a place beyond the end of a shorter row
                red, green, blue, _ = colors(float(norm(value)))
                ink = "#1c1c1c" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "#ffffff"
                axes.text(
                    column + 0.5, row + 0.5, f"{value:.{digits}f}", ha="center", va="center", color=ink, fontsize=7.5
                )


def _log_values(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))


def _legend_above(axes: Axes) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(loc="outside upper left", ncols=2, columnspacing=1.2, handlelength=1.2, borderpad=0, labelspacing=0.2)


def _label(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=xlabel in ("step", "block")))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)


def _draw(draw: Callable[[Axes], None], *, size: tuple[float, float], name: str) -> str:
    # The name salts the ids of clip paths and markers, so that figures on one page do not take each other's.
    style: Any = _STYLE | {"svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _for_page(buffer.getvalue(), max_width=size[0])


def _for_page(svg: str, *, max_width: float) -> str:
    """The ``<svg>`` element with the colours of the page, at most as wide as it was drawn."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # would hold for the whole page
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    # Other ids (figure_1, axes_1, text_3) name nothing and are the same in every figure.
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for stand_in, color in _THEME.items():
        svg = svg.replace(stand_in, color)
    return svg.replace("<svg ", f'<svg role="img" style="max-width: {max_width * _PIXELS_PER_INCH:.0f}px" ', 1)
