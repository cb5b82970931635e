"""Recall on hand-worked cases, and against plain loops over a matrix of similarities."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.evaluation.retrieval_recall import (
    IMAGE_TO_TEXT,
    TEXT_TO_IMAGE,
    Rankings,
    RetrievalPredictions,
    caption_names,
    chance_recall,
    first_captions,
    fold_recall,
    load_rankings,
    rank_folds,
    rank_pairs,
    retrieval_recall,
    write_rankings,
)


def embeddings(names: Sequence[str], *, dim: int = 5, seed: int = 0) -> dict[str, Tensor]:
    rows = torch.randn(len(names), dim, generator=torch.Generator().manual_seed(seed))
    return dict(zip(names, rows / rows.norm(dim=1, keepdim=True), strict=True))


def split_of(num_captions: Sequence[int]) -> dict[str, list[str]]:
    """Image ``i`` with so many captions, all different."""
    return {f"i{image}": [f"t{image}.{n}" for n in range(number)] for image, number in enumerate(num_captions)}


def texts_of(captions: Mapping[str, Sequence[str]]) -> list[str]:
    return [text for of_image in captions.values() for text in of_image]


def brute_force(
    captions: Mapping[str, Sequence[str]], images: Mapping[str, Tensor], texts: Mapping[str, Tensor]
) -> dict[tuple[str, int], float]:
    """By the place of the best match: one more than the number of candidates that are more similar. Without ties."""
    owners = [image for image, of_image in captions.items() for _ in of_image]
    similarity = np.array([[float(images[i] @ texts[t]) for t in texts_of(captions)] for i in captions])
    image_places = []
    for row, image in zip(similarity, captions, strict=True):
        own = max(value for value, owner in zip(row, owners, strict=True) if owner == image)
        image_places.append(1 + sum(value > own for value in row))
    text_places = []
    for column, owner in zip(similarity.T, owners, strict=True):
        own = column[list(captions).index(owner)]
        text_places.append(1 + sum(value > own for value in column))
    return {
        (direction, k): sum(place <= k for place in places) / len(places)
        for direction, places in ((IMAGE_TO_TEXT, image_places), (TEXT_TO_IMAGE, text_places))
        for k in (1, 5, 10)
    }


@settings(max_examples=25, deadline=None)
@given(num_captions=st.lists(st.integers(1, 6), min_size=1, max_size=25), seed=st.integers(0, 999))
def test_against_plain_loops(num_captions: list[int], seed: int) -> None:
    captions = split_of(num_captions)
    images, texts = embeddings(list(captions), seed=seed), embeddings(texts_of(captions), seed=seed + 1000)
    found = retrieval_recall(rank_pairs(captions, images, texts), captions)
    assert (found.num_images, found.num_captions) == (len(captions), sum(num_captions))
    for (direction, k), value in brute_force(captions, images, texts).items():
        assert found.by_direction[direction][k] == pytest.approx(value), (direction, k)


def test_any_of_five_captions_counts_but_each_looks_for_its_own_image() -> None:
    """Two images, five captions each. The first image's best caption is its own fifth one, the second image's best is
    of the first, and its own comes third; of the captions, the last two of the second image choose the wrong one."""
    captions = split_of([5, 5])
    names = caption_names(captions)
    assert names[4:6] == ["i0/4", "i1/0"]
    rankings = Rankings(
        {
            "i0": ["i0/4", "i1/0", "i1/1", "i0/0", "i0/1", "i0/2", "i0/3", "i1/2", "i1/3", "i1/4"],
            "i1": ["i0/0", "i0/1", "i1/3", "i0/2", "i0/3", "i0/4", "i1/0", "i1/1", "i1/2", "i1/4"],
        },
        {
            name: ["i1", "i0"] if name.startswith("i1") and name not in ("i1/3", "i1/4") else ["i0", "i1"]
            for name in names
        },
    )
    recall = retrieval_recall(rankings, captions)
    assert recall.by_direction == {IMAGE_TO_TEXT: {1: 0.5, 5: 1, 10: 1}, TEXT_TO_IMAGE: {1: 0.8, 5: 1, 10: 1}}
    assert recall.mean_at_1 == pytest.approx(0.65)
    assert recall.mean_of_all == pytest.approx((0.5 + 0.8 + 4) / 6)
    assert recall.percent("x: ")["x: text to image, recall@1"] == pytest.approx(80)


def test_places_just_inside_and_outside() -> None:
    """Twelve images of one caption; the own caption stands at place p, for p = 1, 5, 6, 10 and 11."""
    captions = split_of([1] * 12)
    names = caption_names(captions)
    places = [1, 5, 6, 10, 11, 1, 1, 1, 1, 1, 1, 1]

    def ranking(own: str, others: Sequence[str], place: int) -> list[str]:
        rest = [name for name in others if name != own]
        return [*rest[: place - 1], own, *rest[place - 1 :]][:10]

    rankings = Rankings(
        {image: ranking(f"{image}/0", names, place) for image, place in zip(captions, places, strict=True)},
        {name: ranking(name[:-2], list(captions), 11 - n % 2) for n, name in enumerate(names)},
    )
    recall = retrieval_recall(rankings, captions)
    assert recall.by_direction[IMAGE_TO_TEXT] == pytest.approx({1: 8 / 12, 5: 9 / 12, 10: 11 / 12})
    # Half at place 11, which nobody sees, and half at 10.
    assert recall.by_direction[TEXT_TO_IMAGE] == {1: 0, 5: 0, 10: 0.5}


def test_a_model_that_sees_nothing_scores_as_chance() -> None:
    """All similarities are equal: the order of the split decides, for nobody's benefit."""
    captions = split_of([5] * 30)
    one = torch.tensor([1.0, 0.0])
    rankings = rank_pairs(captions, dict.fromkeys(captions, one), dict.fromkeys(texts_of(captions), one))
    assert rankings.captions_of["i29"][:6] == ["i0/0", "i0/1", "i0/2", "i0/3", "i0/4", "i1/0"]
    recall = retrieval_recall(rankings, captions)
    assert recall.by_direction[IMAGE_TO_TEXT] == {1: 1 / 30, 5: 1 / 30, 10: 2 / 30}
    assert recall.by_direction[TEXT_TO_IMAGE] == {1: 1 / 30, 5: 5 / 30, 10: 10 / 30}


def test_captions_of_the_same_words_are_equally_similar() -> None:
    captions = {"a": ["a dog", "x"], "b": ["y", "a dog"], "c": ["a dog"]}
    texts = embeddings(["a dog", "x", "y"], seed=3)
    rankings = rank_pairs(captions, embeddings(list(captions), seed=4), texts)
    assert rankings.images_of["a/0"] == rankings.images_of["b/1"] == rankings.images_of["c/0"]
    for ranking in rankings.captions_of.values():
        start = ranking.index("a/0")
        assert list(ranking[start : start + 3]) == ["a/0", "b/1", "c/0"]


def test_chance_is_the_mean_over_all_orders() -> None:
    captions = split_of([2, 1, 3])
    names, images = caption_names(captions), list(captions)
    for k in (1, 5):
        orders = list(permutations(names))
        hits = [
            any(name.startswith(f"{image}/") for name in order[:k]) for order in orders for image in images
        ]  # fmt: skip
        assert chance_recall(captions).by_direction[IMAGE_TO_TEXT][k] == pytest.approx(sum(hits) / len(hits))
    assert chance_recall(captions).by_direction[TEXT_TO_IMAGE] == pytest.approx({1: 1 / 3, 5: 1, 10: 1})
    # COCO: 5,000 images with five captions each.
    coco = chance_recall(split_of([5] * 500))
    assert coco.by_direction[IMAGE_TO_TEXT][1] == pytest.approx(1 / 500)
    not_found = math.prod((2495 - n) / (2500 - n) for n in range(10))
    assert coco.by_direction[IMAGE_TO_TEXT][10] == pytest.approx(1 - not_found)


def test_folds_are_scored_each_on_its_own() -> None:
    captions = split_of([5, 4, 6, 5, 5, 5])
    images, texts = embeddings(list(captions), seed=5), embeddings(texts_of(captions), seed=6)
    whole, folds = rank_pairs(captions, images, texts), rank_folds(captions, images, texts, 2)
    parts = [{name: captions[name] for name in pair} for pair in (("i0", "i1"), ("i2", "i3"), ("i4", "i5"))]
    of_parts = [retrieval_recall(rank_pairs(part, images, texts), part) for part in parts]
    found = fold_recall(folds, captions, 2)
    for direction, of_direction in found.by_direction.items():
        for k, value in of_direction.items():
            assert value == pytest.approx(sum(part.by_direction[direction][k] for part in of_parts) / 3)
    assert (found.num_images, found.num_captions) == (6, 30)
    # Fewer candidates are easier.
    assert found.mean_at_1 > retrieval_recall(whole, captions).mean_at_1
    with pytest.raises(ConfigError, match="--fold-size: 4 does not divide the 6 images of the split"):
        rank_folds(captions, images, texts, 4)


def test_the_first_captions() -> None:
    captions = split_of([5, 7])
    assert first_captions(captions, 5)["i1"] == captions["i1"][:5]
    assert first_captions(captions, None) == captions


def test_rankings_survive_the_file(tmp_path: Path) -> None:
    captions = split_of([2, 1, 1])
    images, texts = embeddings(list(captions)), embeddings(texts_of(captions))
    whole = rank_pairs(captions, images, texts)
    for predictions in (
        RetrievalPredictions(whole),
        RetrievalPredictions(whole, rank_folds(captions, images, texts, 1), 1, 5),
    ):
        write_rankings(tmp_path / "x.json", predictions)
        assert load_rankings(tmp_path / "x.json") == predictions


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"whole": {}}', '{"whole": {"captions_of": {"a": [1]}, "images_of": {}}, "fold_size": null}'],
)
def test_other_files_are_no_rankings(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=r"x\.json: not a file of rankings .*predict again$"):
        load_rankings(tmp_path / "x.json")
    with pytest.raises(DataError, match=r"y\.json: cannot be read"):
        load_rankings(tmp_path / "y.json")


def test_rankings_of_another_split() -> None:
    captions = split_of([1, 1])
    rankings = rank_pairs(captions, embeddings(list(captions)), embeddings(texts_of(captions)))
    with pytest.raises(DataError, match=r"captions of images: 2 predictions for 3 expected: 1 missing id \(i2\)"):
        retrieval_recall(rankings, split_of([1, 1, 1]))
    with pytest.raises(DataError, match=r"images of captions: .*1 missing id \(i1/1\)"):
        retrieval_recall(rankings, split_of([1, 2]))
    with pytest.raises(DataError, match=r"within folds: .*missing"):
        fold_recall(rankings, split_of([1, 2]), 1)
    with pytest.raises(DataError, match="nothing to score"):
        retrieval_recall(Rankings({}, {}), {})


def test_the_file_is_small(tmp_path: Path) -> None:
    """Ten per query, however many candidates there are."""
    captions = split_of([1] * 40)
    write_rankings(
        tmp_path / "x.json",
        RetrievalPredictions(rank_pairs(captions, embeddings(list(captions)), embeddings(texts_of(captions)))),
    )
    content = json.loads((tmp_path / "x.json").read_text())
    assert {len(ranking) for ranking in content["whole"]["captions_of"].values()} == {10}
