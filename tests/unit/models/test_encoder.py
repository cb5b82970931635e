"""The encoder against a token-by-token reference: attention patterns, padding, joint layers, shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.unit.models.builders import (
    KINDS_AND_POOLS,
    VOCAB_SIZE,
    images,
    make_encoder,
    patch_masks,
    texts,
)
from tests.unit.models.reference import Reference

NUM_VISION = 5  # a class token and 2 x 2 patches
SMALL_GRID = {"image_size": 8}


def captioning(query: int, key: int) -> bool:
    """Image at image; text at the image and at text up to itself."""
    return key < NUM_VISION if query < NUM_VISION else key <= query


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_attention": True},
        {"vl_ffn_layers": 1},
        {"sub_ln": False},
        {"final_norm": False},
        {"num_heads": 1},
        {"depth": 3},
    ],
    ids=str,
)
def test_pairs_equal_the_reference(options: dict[str, Any]) -> None:
    encoder = make_encoder(**SMALL_GRID, **options)
    reference = Reference(encoder)
    image, ids = images(2, size=(8, 8)), texts(2, 4)
    # The second text has three tokens; what stands behind them must not matter.
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    for pattern, allowed in (("full", lambda query, key: True), ("captioning", captioning)):
        output = encoder(image, ids, text_valid=valid, pattern=pattern)
        for sample, length in enumerate((4, 3)):
            vision, text = reference(image[sample], ids[sample, :length].tolist(), allowed)
            assert_close(output.vision[sample], vision)
            assert_close(output.text[sample, :length], text)


@pytest.mark.parametrize("options", [{}, {"vl_ffn_layers": 1}], ids=str)
def test_one_modality_equals_the_reference(options: dict[str, Any]) -> None:
    encoder = make_encoder(**SMALL_GRID, **options)
    reference = Reference(encoder)
    image, ids = images(1, size=(8, 8)), texts(1, 5)
    masks = torch.tensor([[False, True, False, True]])
    alone = encoder(image, image_mask=masks)
    assert_close(alone.vision[0], reference(image[0], None, hidden_patches={1, 3})[0])
    assert alone.text.shape == (1, 0, 16)
    alone = encoder(text_ids=ids)
    assert_close(alone.text[0], reference(None, ids[0].tolist())[1])
    assert alone.vision.shape == (1, 0, 16)
    # Without an image the captioning pattern is causal language modeling.
    causal = encoder(text_ids=ids, pattern="captioning")
    assert_close(causal.text[0], reference(None, ids[0].tolist(), lambda query, key: key <= query)[1])


@pytest.mark.parametrize(("ffn", "experts"), KINDS_AND_POOLS)
@pytest.mark.parametrize("vl_ffn_layers", [0, 1])
def test_padding_changes_nothing(ffn: str, experts: str, vl_ffn_layers: int) -> None:
    encoder = make_encoder(ffn, moe={"experts": experts}, vl_ffn_layers=vl_ffn_layers)
    image, ids = images(3), texts(3, 6)
    for text_only in (False, True):
        arguments = {} if text_only else {"image": image, "image_mask": patch_masks(3)}
        plain = encoder(text_ids=ids, **arguments)
        for seed in (1, 2):
            padded_ids = torch.cat([ids, texts(3, 4, seed=seed)], dim=1)
            valid = torch.arange(10).expand(3, -1) < 6
            padded = encoder(text_ids=padded_ids, text_valid=valid, **arguments)
            assert_close(padded.text[:, :6], plain.text)
            assert_close(padded.vision, plain.vision)


@pytest.mark.parametrize(("ffn", "experts"), KINDS_AND_POOLS)
def test_every_sample_is_computed_on_its_own(ffn: str, experts: str) -> None:
    encoder = make_encoder(ffn, moe={"experts": experts}, vl_ffn_layers=1)
    image, ids = images(3), texts(3, 5)
    together = encoder(image, ids)
    for sample in range(3):
        alone = encoder(image[sample : sample + 1], ids[sample : sample + 1])
        assert_close(together.vision[sample], alone.vision[0])
        assert_close(together.text[sample], alone.text[0])


@pytest.mark.parametrize(("ffn", "experts"), KINDS_AND_POOLS)
def test_captioning_images_do_not_see_the_text_and_text_not_its_future(ffn: str, experts: str) -> None:
    encoder = make_encoder(ffn, moe={"experts": experts})
    image, ids = images(1), texts(1, 6)
    changed = ids.clone()
    changed[0, 3:] = (ids[0, 3:] + 1) % VOCAB_SIZE
    before, after = encoder(image, ids, pattern="captioning"), encoder(image, changed, pattern="captioning")
    assert_close(before.vision, after.vision)
    assert_close(before.text[:, :3], after.text[:, :3])
    assert not torch.isclose(before.text[:, 3:], after.text[:, 3:]).all(-1).any()
    # The test could not fail if text had no influence: in the full pattern it reaches every token.
    before, after = encoder(image, ids), encoder(image, changed)
    assert not torch.isclose(before.vision, after.vision).all(-1).any()


@pytest.mark.parametrize(("ffn", "experts"), [("dense", "per_modality"), ("mhmoe", "per_modality"), ("xmoe", "shared")])
@pytest.mark.parametrize("vl_ffn_layers", [0, 1])
@pytest.mark.parametrize("blind", [False, True])
def test_decoding_step_by_step_equals_one_pass(ffn: str, experts: str, vl_ffn_layers: int, blind: bool) -> None:
    encoder = make_encoder(ffn, moe={"experts": experts}, vl_ffn_layers=vl_ffn_layers)
    image, ids = images(2), texts(2, 6)
    whole = encoder(image, ids, pattern="captioning", blind=blind)
    step = encoder(image, blind=blind, with_cache=True, is_pair=True)
    assert_close(step.vision, whole.vision)
    cache = step.cache
    for start, end in ((0, 1), (1, 2), (2, 5), (5, 6)):
        step = encoder(
            text_ids=ids[:, start:end], pattern="captioning", past=cache, first_position=start, with_cache=True,
            is_pair=True,
        )  # fmt: skip
        assert_close(step.text, whole.text[:, start:end])
        cache = [old.extended(new) for old, new in zip(cache, step.cache, strict=True)]
    assert [layer.keys.shape[2] for layer in cache] == [whole.vision.shape[1] + 6] * 2


def test_is_pair_decides_about_the_joint_layer() -> None:
    encoder = make_encoder(vl_ffn_layers=1)
    image = images(1)
    alone, as_pair = encoder(image), encoder(image, is_pair=True)
    assert not torch.isclose(alone.vision, as_pair.vision).all(-1).any()


def test_blind_keeps_the_class_token_only() -> None:
    encoder = make_encoder("mhmoe")
    ids = texts(2, 4)
    blind = encoder(images(2, seed=1), ids, image_mask=patch_masks(2), blind=True)
    assert blind.vision.shape == (2, 1, 16)
    other = encoder(images(2, seed=2), ids, blind=True)
    assert torch.equal(blind.vision, other.vision)
    assert torch.equal(blind.text, other.text)


def test_an_encoder_of_texts_alone() -> None:
    encoder = make_encoder("mhmoe", modalities=("text",))
    assert not any("vision" in name for name, _ in encoder.named_parameters())
    output = encoder(text_ids=texts(2, 5))
    assert output.text.shape == (2, 5, 16)
    assert {routing.pool for routing in output.routings} == {"text"}
    with pytest.raises(ValueError, match="this encoder has no vision branch"):
        encoder(images(2), texts(2, 5))


def test_an_encoder_of_images_alone() -> None:
    encoder = make_encoder("smoe", modalities=("vision",), moe={"experts": "shared"}, shared_attention=True)
    assert encoder(images(2)).vision.shape == (2, 17, 16)
    with pytest.raises(ValueError, match="this encoder has no text branch"):
        encoder(images(2), texts(2, 5))


def test_nothing_to_encode() -> None:
    with pytest.raises(ValueError, match="needs an image, a text, or both"):
        make_encoder()()


def test_one_unit_of_sharding_per_block() -> None:
    encoder = make_encoder(depth=3)
    assert [id(unit) for unit in encoder.shard_units()] == [id(block) for block in encoder.blocks]
