"""Everything that an analysis has found, and its JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from mhmoe_vl.analysis.divergence import DivergenceFigures
from mhmoe_vl.analysis.fluctuation import FluctuationFigures
from mhmoe_vl.analysis.representation import Collapse


@dataclass(frozen=True)
class PoolUse:
    """Load of one pool; of one modality's part in it, if both share it.

    Attributes:
        pool: ``block3/vision``; ``block3/shared``, and ``block3/shared/vision`` for the part.
        is_part: of a pool that both modalities share; alarms are then those of the whole.
        load: share of the choices that each expert gets.
        entropy, max_violation, overload, num_dead, gate_entropy, alarms: as in :class:`mhmoe_vl.moe.RoutingStats`.
        activation: share of experts above each of :attr:`ExpertAnalysis.thresholds`.
    """

    pool: str
    is_part: bool
    num_rows: int
    load: list[float]
    entropy: float
    max_violation: float
    overload: float
    num_dead: int
    gate_entropy: float
    alarms: list[str]
    activation: list[float]


@dataclass(frozen=True)
class Affinity:
    """Whom the experts of a shared pool work for.

    Attributes:
        vision_share: share of each expert's load that image tokens bring; None for experts without load.
        mean: the same of all experts together: an expert above it prefers images.
    """

    pool: str
    vision_share: list[float | None]
    mean: float


@dataclass(frozen=True)
class ClassDivergence:
    """Distinct experts per piece of a class of words, or of a place within words.

    Attributes:
        num_pieces: tokens behind it.
        mean: over pieces and sparse layers.
        by_layer: mean over pieces, by pool.
    """

    name: str
    num_pieces: int
    mean: float
    by_layer: dict[str, float]


@dataclass(frozen=True)
class WordDivergence:
    """Distinct experts of one word: mean over occurrences, its pieces, and sparse layers."""

    word: str
    word_class: str
    count: int
    mean: float


@dataclass(frozen=True)
class PatchDivergence:
    """Distinct experts of image patches, averaged over sparse layers.

    Attributes:
        num_images: behind it.
        grid: mean over images, by row and column of the patch.
        mean: over all patches.
        class_token: mean of the class token.
        texture_correlation: Pearson's, over patches, between a patch's distinct experts and the standard deviation of
            its gray values; None if either does not vary.
    """

    num_images: int
    grid: list[list[float]]
    mean: float
    class_token: float
    texture_correlation: float | None


@dataclass(frozen=True)
class PatchPicture:
    """One image: uint8 ``[3, H, W]``, and the distinct experts of its patches, averaged over sparse layers."""

    sample_id: str
    image: Tensor
    distinct: list[list[float]]


@dataclass(frozen=True)
class SubTokenDivergence:
    """Everything about distinct experts per token.

    Attributes:
        smallest, largest: that a token can have.
        by_pool: of every pool and modality.
        most, least: words with the highest and the lowest mean, of those that occur at least ``min_word_count`` times.
    """

    smallest: int
    largest: int
    by_pool: dict[str, DivergenceFigures]
    classes: list[ClassDivergence]
    min_word_count: int
    most: list[WordDivergence]
    least: list[WordDivergence]
    patches: PatchDivergence | None
    pictures: list[PatchPicture]


@dataclass(frozen=True)
class ExpertAnalysis:
    """What the experts of one model did with held-out samples.

    Attributes:
        run, against: run directory, and the checkpoint or run that it was compared with.
        ffn, num_experts, num_heads, top_k: of the sparse layers.
        num_samples: by source.
        num_tokens: by modality, class token and ``<s>`` and ``</s>`` included.
        thresholds: loads over the mean load at which activation is counted.
        pools: whole pools, each followed by its parts.
        affinity: of pools that both modalities share.
        collapse: representation collapse, by pool.
        fluctuation: by pool and modality; None if nothing was compared.
        divergence: None if every token has the same number of distinct experts, for the reason in ``no_divergence``.
    """

    run: str
    against: str | None
    ffn: str
    num_experts: int
    num_heads: int
    top_k: int
    num_samples: dict[str, int]
    num_tokens: dict[str, int]
    thresholds: list[float]
    pools: list[PoolUse]
    affinity: list[Affinity]
    collapse: dict[str, Collapse]
    fluctuation: dict[str, FluctuationFigures] | None
    divergence: SubTokenDivergence | None
    no_divergence: str | None

    def as_json(self) -> str:
        """All numbers; of pictures the numbers of their patches."""
        tree = {name: _plain(value) for name, value in vars(self).items()}
        return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, SubTokenDivergence):
        pictures = [{"sample_id": picture.sample_id, "distinct": picture.distinct} for picture in value.pictures]
        return {name: _plain(field) for name, field in vars(value).items()} | {"pictures": pictures}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return None
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
