"""Recall of image-text retrieval, both ways, by the usual rule: an image finds any of its captions among the k best, a
caption finds its one image.

Predictions are rankings: the best ten captions of every image and the best ten images of every caption, over the whole
split and, if asked for, within folds (COCO's 1k protocol: the mean over five folds of 1,000 of the 5,000 test images).
A caption is called ``IMAGE/NUMBER`` by its place among those of its image.

Shape suffixes: I images, T captions, Q queries, C candidates, D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.evaluation.results_files import check_same_ids, write_text

FORMAT = "mhmoe_vl/rankings/1"

#: How far a ranking goes; recall is counted at these places.
RECALL_AT = (1, 5, 10)
_DEPTH = max(RECALL_AT)

#: Queries whose candidates are sorted at once.
_CHUNK = 256

IMAGE_TO_TEXT, TEXT_TO_IMAGE = "image to text", "text to image"


@dataclass(frozen=True)
class Rankings:
    """Best first: captions of every image, and images of every caption."""

    captions_of: Mapping[str, Sequence[str]]
    images_of: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class RetrievalPredictions:
    """What a model makes of a split.

    Attributes:
        whole: every image and every caption of the split are candidates.
        folds: only those of the same fold are; None without folds.
        fold_size: images in a fold.
        captions_per_image: only so many captions of an image were used; None uses all.
    """

    whole: Rankings
    folds: Rankings | None = None
    fold_size: int | None = None
    captions_per_image: int | None = None


@dataclass(frozen=True)
class Recall:
    """Share of queries with a match among the first k: direction -> k -> 0 to 1."""

    by_direction: Mapping[str, Mapping[int, float]]
    num_images: int
    num_captions: int

    @property
    def mean_at_1(self) -> float:
        """Of both directions."""
        return mean(of_direction[1] for of_direction in self.by_direction.values())

    @property
    def mean_of_all(self) -> float:
        """Of both directions and all k, as BEiT-3 selects checkpoints by."""
        return mean(value for of_direction in self.by_direction.values() for value in of_direction.values())

    def percent(self, prefix: str = "") -> dict[str, float]:
        """``image to text, recall@1`` and so on."""
        return {
            f"{prefix}{direction}, recall@{k}": 100 * value
            for direction, of_direction in self.by_direction.items()
            for k, value in of_direction.items()
        }


def caption_names(captions: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of all captions, image by image."""
    return [f"{image}/{number}" for image, of_image in captions.items() for number in range(len(of_image))]


def first_captions(captions: Mapping[str, Sequence[str]], number: int | None) -> dict[str, Sequence[str]]:
    """The first ``number`` captions of every image; all if None."""
    return {image: of_image[:number] for image, of_image in captions.items()}


def folds_of(captions: Mapping[str, Sequence[str]], fold_size: int) -> Iterator[dict[str, Sequence[str]]]:
    """Images and their captions in folds of consecutive images.

    Raises:
        ConfigError: the size does not divide the number of images.
    """
    images = list(captions)
    if not images or len(images) % fold_size:
        raise ConfigError(f"--fold-size: {fold_size} does not divide the {len(images)} images of the split")
    for start in range(0, len(images), fold_size):
        yield {image: captions[image] for image in images[start : start + fold_size]}


def rank_pairs(
    captions: Mapping[str, Sequence[str]], image_embeddings: Mapping[str, Tensor], text_embeddings: Mapping[str, Tensor]
) -> Rankings:
    """Rank by cosine similarity; what is equally similar, by its place in ``captions``.

    Args:
        captions: of every image.
        image_embeddings: ``[D]`` of length 1 per image.
        text_embeddings: ``[D]`` of length 1 per caption's text: captions of the same words are exactly as similar.
    """
    images, names = list(captions), caption_names(captions)
    texts = [text for of_image in captions.values() for text in of_image]
    place_of = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    place_T = torch.tensor([place_of[text] for text in texts])
    images_ID = torch.stack([image_embeddings[image] for image in images])
    # One row per text.
    texts_UD = torch.stack([text_embeddings[text] for text in place_of])
    captions_IK = _best(images_ID, texts_UD, place_T)
    images_UK = _best(texts_UD, images_ID, torch.arange(len(images)))
    return Rankings(
        {image: [names[t] for t in row] for image, row in zip(images, captions_IK, strict=True)},
        {name: [images[i] for i in images_UK[place]] for name, place in zip(names, place_T.tolist(), strict=True)},
    )


def rank_folds(
    captions: Mapping[str, Sequence[str]],
    image_embeddings: Mapping[str, Tensor],
    text_embeddings: Mapping[str, Tensor],
    fold_size: int,
) -> Rankings:
    """:func:`rank_pairs` within each of :func:`folds_of`."""
    captions_of: dict[str, Sequence[str]] = {}
    images_of: dict[str, Sequence[str]] = {}
    for fold in folds_of(captions, fold_size):
        rankings = rank_pairs(fold, image_embeddings, text_embeddings)
        captions_of |= rankings.captions_of
        images_of |= rankings.images_of
    return Rankings(captions_of, images_of)


def _best(queries_QD: Tensor, embeddings_UD: Tensor, place_C: Tensor) -> list[list[int]]:
    """The first candidates of every query, of which candidate c is row ``place_C[c]`` of the embeddings."""
    best: list[list[int]] = []
    for some_QD in queries_QD.split(_CHUNK):
        similarity_QC = (some_QD @ embeddings_UD.T)[:, place_C]
        best += similarity_QC.sort(dim=1, descending=True, stable=True).indices[:, :_DEPTH].tolist()
    return best


def retrieval_recall(rankings: Rankings, captions: Mapping[str, Sequence[str]]) -> Recall:
    """Score rankings against which captions are whose.

    Raises:
        DataError: missing or unknown images or captions, or none at all.
    """
    owner = {f"{image}/{number}": image for image, texts in captions.items() for number in range(len(texts))}
    if not owner:
        raise DataError("retrieval: there are no captions, so there is nothing to score")
    check_same_ids(rankings.captions_of, captions, what="captions of images")
    check_same_ids(rankings.images_of, owner, what="images of captions")
    hits: dict[str, dict[int, list[bool]]] = {IMAGE_TO_TEXT: {}, TEXT_TO_IMAGE: {}}
    for k in RECALL_AT:
        hits[IMAGE_TO_TEXT][k] = [
            any(owner.get(name) == image for name in rankings.captions_of[image][:k]) for image in captions
        ]
        hits[TEXT_TO_IMAGE][k] = [image in rankings.images_of[name][:k] for name, image in owner.items()]
    by_direction = {
        direction: {k: sum(of_k) / len(of_k) for k, of_k in of_direction.items()}
        for direction, of_direction in hits.items()
    }
    return Recall(by_direction, len(captions), len(owner))


def fold_recall(rankings: Rankings, captions: Mapping[str, Sequence[str]], fold_size: int) -> Recall:
    """Mean over the folds.

    Raises:
        ConfigError, DataError: as :func:`folds_of` and :func:`retrieval_recall`.
    """
    check_same_ids(rankings.captions_of, captions, what="captions of images within folds")
    check_same_ids(rankings.images_of, caption_names(captions), what="images of captions within folds")
    of_folds = []
    for fold in folds_of(captions, fold_size):
        own = Rankings(
            {image: rankings.captions_of[image] for image in fold},
            {name: rankings.images_of[name] for name in caption_names(fold)},
        )
        of_folds.append(retrieval_recall(own, fold))
    return Recall(
        {
            direction: {k: mean(one.by_direction[direction][k] for one in of_folds) for k in RECALL_AT}
            for direction in (IMAGE_TO_TEXT, TEXT_TO_IMAGE)
        },
        len(captions),
        sum(one.num_captions for one in of_folds),
    )


def chance_recall(captions: Mapping[str, Sequence[str]]) -> Recall:
    """What a random order is expected to reach.

    Of T captions, m of which are an image's own, the first k have none of them with probability C(T - m, k) / C(T, k).
    """
    num_images, num_captions = len(captions), sum(map(len, captions.values()))

    def found(num_own: int, k: int) -> float:
        return 1 - math.comb(num_captions - num_own, k) / math.comb(num_captions, k)

    at = {k: min(k, num_captions) for k in RECALL_AT}
    return Recall(
        {
            IMAGE_TO_TEXT: {k: mean(found(len(own), n) for own in captions.values()) for k, n in at.items()},
            TEXT_TO_IMAGE: {k: min(1.0, k / num_images) for k in RECALL_AT},
        },
        num_images,
        num_captions,
    )


def write_rankings(path: str | Path, predictions: RetrievalPredictions) -> None:
    """Write what :func:`load_rankings` reads.

    Raises:
        OutputError: the file cannot be written.
    """
    parts = {"whole": predictions.whole, "folds": predictions.folds}
    content = {
        "format": FORMAT,
        "captions_per_image": predictions.captions_per_image,
        "fold_size": predictions.fold_size,
        **{name: vars(rankings) for name, rankings in parts.items() if rankings is not None},
    }
    write_text(path, json.dumps(content, separators=(",", ":")) + "\n")


def load_rankings(path: str | Path) -> RetrievalPredictions:
    """Read a file of :func:`write_rankings`.

    Raises:
        DataError: unreadable, or something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        folds = content.get("folds")
        return RetrievalPredictions(
            _rankings(content["whole"]),
            None if folds is None else _rankings(folds),
            content["fold_size"],
            content["captions_per_image"],
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a file of rankings ({type(error).__name__}: {error}); predict again") from None


def _rankings(content: Mapping[str, Any]) -> Rankings:
    for of_query in (content["captions_of"], content["images_of"]):
        if not all(isinstance(name, str) for ranking in of_query.values() for name in ranking):
            raise TypeError("every ranking must be a list of names")
    return Rankings(content["captions_of"], content["images_of"])
