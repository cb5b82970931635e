"""Members of a shard's sample to examples, one builder per kind."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from mhmoe_vl.data.decode import decode_image
from mhmoe_vl.data.image import AugmentConfig, ImageTransform
from mhmoe_vl.data.masking import IGNORE
from mhmoe_vl.data.samples import (
    ClassSamples,
    ImageSamples,
    Nlvr2Samples,
    PairSamples,
    PatchMasking,
    SampleBuilder,
    TextSamples,
    VqaSamples,
)
from mhmoe_vl.errors import DataError
from tests.unit.data.builders import json_bytes, pair_sample, word_tokenizer, words
from tests.unit.data.files import image_bytes

TOKENIZER = word_tokenizer()
RESIZE = ImageTransform(16)


def build(builder: SampleBuilder, members: dict[str, bytes], *, item: int = 0, seed: int = 0) -> Any:
    return builder(members, item, key="k", seed=seed)


def resized(number: int) -> torch.Tensor:
    return RESIZE(decode_image(image_bytes(number)), 0)


def unmasked(example: Any) -> list[int]:
    """The ids before masking."""
    return [
        fed if target == IGNORE else target for fed, target in zip(example.text_ids, example.text_targets, strict=True)
    ]


def test_an_image_with_hidden_patches() -> None:
    example = build(ImageSamples(RESIZE, PatchMasking(4, 0.4)), {"jpg": image_bytes(3)})
    assert (example.sample_id, example.seed, example.text_ids) == ("k", 0, None)
    assert torch.equal(example.image, resized(3))
    assert example.image_mask.shape == (16,)
    assert example.image_mask.sum() == round(0.4 * 16)


def test_a_short_text_is_kept_whole() -> None:
    example = build(TextSamples(TOKENIZER, 8, 0.5), {"txt": words(3, 8).encode()})
    assert unmasked(example) == TOKENIZER.encode(words(3, 8), 8)
    assert sum(target != IGNORE for target in example.text_targets) == round(0.5 * 5)


def test_of_a_long_document_every_window_may_come() -> None:
    """40 tokens, of which 6 are shown: windows may start at 0 to 34."""
    starts: Counter[int] = Counter()
    for seed in range(700):
        first, *window, last = unmasked(
            build(TextSamples(TOKENIZER, 8, 0.3), {"txt": words(0, 40).encode()}, seed=seed)
        )
        assert (first, last) == (TOKENIZER.bos_id, TOKENIZER.eos_id)
        assert window == list(range(window[0], window[0] + 6))
        starts[window[0] - 5] += 1
    assert set(starts) == set(range(35))


def test_a_text_is_cleaned_and_must_not_be_empty() -> None:
    builder = TextSamples(TOKENIZER, 8, 0.0)
    assert unmasked(build(builder, {"txt": " w1\r\n w2\ufeff ".encode()})) == TOKENIZER.encode("w1 w2", 8)
    for members, message in (
        ({"txt": b" \n"}, "text is empty"),
        ({"txt": b"\xff"}, "text is not UTF-8"),
        ({"jpg": b""}, "the sample has no .txt member"),
    ):
        with pytest.raises(DataError, match=message):
            build(builder, members)


def test_each_caption_of_a_pair_has_its_turn() -> None:
    builder = PairSamples(RESIZE, TOKENIZER, 8, 0.5, PatchMasking(4, 0.4))
    seen = Counter(unmasked(build(builder, pair_sample(3, num_captions=5), seed=seed))[2] - 5 for seed in range(500))
    assert set(seen) == set(range(5))
    assert min(seen.values()) > 55  # 100 less five standard deviations
    example = build(builder, pair_sample(3))
    assert example.sample_id == "1003"
    assert torch.equal(example.image, resized(3))
    assert example.image_mask.sum() == 6


def test_a_pair_for_captioning_may_hide_its_end_but_no_patch() -> None:
    builder = PairSamples(RESIZE, TOKENIZER, 8, 1.0, None, include_end=True)
    example = build(builder, {"jpg": image_bytes(3), "txt": b"w3 w4"})
    assert example.image_mask is None
    assert example.text_targets == [IGNORE, 8, 9, TOKENIZER.eos_id]
    assert example.sample_id == "k"
    with pytest.raises(DataError, match="the image has no caption"):
        build(builder, {"jpg": image_bytes(3), "txt": b" "})


def test_a_question_with_soft_scores() -> None:
    questions = [
        {"question_id": 7, "question": "w1 w2", "labels": {"no": 0.3, "yes": 1.0, "never seen": 0.6}},
        {"question_id": 8, "question": "w3"},
    ]
    members = {"jpg": image_bytes(1), "json": json_bytes(questions=questions)}
    builder = VqaSamples(RESIZE, TOKENIZER, 8, ["yes", "maybe", "no"])
    example = build(builder, members)
    assert (example.sample_id, example.text_ids) == ("7", TOKENIZER.encode("w1 w2", 8))
    assert example.answer_scores.tolist() == pytest.approx([1.0, 0.0, 0.3])
    assert build(builder, members, item=1).answer_scores.tolist() == [0, 0, 0]
    with pytest.raises(DataError, match=r"no questions\[2\]"):
        build(builder, members, item=2)


def test_a_statement_about_two_images() -> None:
    examples = [
        {"identifier": "dev-0-0-0", "sentence": "w1 w2", "label": True},
        {"identifier": "dev-0-0-1", "sentence": "w3", "label": False},
        {"identifier": "test-0-0-0", "sentence": "w4", "label": None},
    ]
    members = {
        "left.jpg": image_bytes(1),
        "right.jpg": image_bytes(2),
        "json": json_bytes(examples=examples),
    }
    builder = Nlvr2Samples(RESIZE, TOKENIZER, 8)
    built = [build(builder, members, item=item) for item in range(3)]
    assert [(example.sample_id, example.label) for example in built] == [
        ("dev-0-0-0", 1),
        ("dev-0-0-1", 0),
        ("test-0-0-0", -1),
    ]
    assert torch.equal(built[0].image, resized(1))
    assert torch.equal(built[0].right_image, resized(2))
    with pytest.raises(DataError, match="sample has no right image"):
        build(builder, {name: data for name, data in members.items() if name != "right.jpg"})


def test_an_image_with_its_class() -> None:
    builder = ClassSamples(RESIZE, ["cat", "dog"])
    example = build(builder, {"jpg": image_bytes(3), "json": json_bytes(file="dog/3.jpg", **{"class": "dog"})})
    assert (example.sample_id, example.label, example.text_ids) == ("k", 1, None)
    assert torch.equal(example.image, resized(3))
    for members, message in (
        ({"json": json_bytes(**{"class": "cow"})}, "class 'cow' is not in the list of classes"),
        ({"json": json_bytes(label=1)}, "the sample's json has no string 'class'"),
        ({}, "the sample has no .json member"),
    ):
        with pytest.raises(DataError, match=message):
            build(builder, {"jpg": image_bytes(3)} | members)
    # Labelled images are images too.
    assert "class" in ImageSamples.shard_kinds


@pytest.mark.parametrize(
    "builder",
    [
        ImageSamples(ImageTransform(16, AugmentConfig()), PatchMasking(4, 0.4)),
        PairSamples(ImageTransform(16, AugmentConfig()), TOKENIZER, 8, 0.5, PatchMasking(4, 0.4)),
    ],
)
def test_an_example_depends_on_its_seed_alone(builder: SampleBuilder) -> None:
    members = pair_sample(3, num_captions=5)
    same, again, other = (build(builder, members, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(same.image, again.image)
    assert torch.equal(same.image_mask, again.image_mask)
    assert (same.text_ids, same.text_targets) == (again.text_ids, again.text_targets)
    assert not torch.equal(same.image, other.image)
