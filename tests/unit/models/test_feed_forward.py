"""Which expert pool each token goes through, and how routings are told apart by modality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from mhmoe_vl.models.feed_forward import LayerRouting, MultiwayFeedForward, build_feed_forward
from mhmoe_vl.models.streams import Streams
from mhmoe_vl.moe import FeedForward, MoE, MultiHeadMoE
from tests.unit.models.builders import images, make_config, make_encoder, randomize, texts

VALID = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()


def make(ffn: str = "mhmoe", *, layer: int = 1, **changes: Any) -> MultiwayFeedForward:
    module = MultiwayFeedForward(make_config(ffn, **changes), layer).double()
    randomize(module)
    return module


def streams() -> Streams:
    generator = torch.Generator().manual_seed(0)
    return Streams(*(torch.randn(2, length, 16, generator=generator, dtype=torch.float64) for length in (5, 3)))


def pools(routings: list[LayerRouting]) -> dict[str, tuple[int, int]]:
    """Name -> rows, of which image tokens."""
    return {item.name: (item.routing.experts_NK.shape[0], item.num_vision_tokens) for item in routings}


def test_a_pool_per_modality() -> None:
    module = make()
    output, routings = module(streams(), VALID, is_pair=True)
    assert_close(output.vision, module.pools["vision"](streams().vision)[0])
    assert_close(output.text, module.pools["text"](streams().text, VALID)[0])
    # Two samples of 5 and 3 tokens, four heads each.
    assert pools(routings) == {"block1/vision": (40, 10), "block1/text": (24, 0)}


def test_a_shared_pool() -> None:
    module = make(moe={"experts": "shared"})
    output, routings = module(streams(), VALID, is_pair=True)
    assert_close(output.vision, module.pools["shared"](streams().vision)[0])
    assert_close(output.text, module.pools["shared"](streams().text, VALID)[0])
    assert pools(routings) == {"block1/shared": (64, 10)}


def test_a_dense_block_is_never_shared() -> None:
    assert list(make(layer=0, moe={"experts": "shared"}).pools) == ["vision", "text"]


@pytest.mark.parametrize("experts", ["per_modality", "shared"])
def test_pairs_go_through_the_joint_pool_and_others_do_not(experts: str) -> None:
    module = make(vl_ffn_layers=1, moe={"experts": experts})
    output, routings = module(streams(), VALID, is_pair=True)
    assert_close(output.vision, module.pools["joint"](streams().vision)[0])
    assert_close(output.text, module.pools["joint"](streams().text, VALID)[0])
    others = {"block1/shared": (0, 0)} if experts == "shared" else {"block1/vision": (0, 0), "block1/text": (0, 0)}
    assert pools(routings) == {"block1/joint": (64, 10), **others}
    alone, routings = module(streams(), VALID, is_pair=False)
    expected, _ = make(moe={"experts": experts})(streams(), VALID, is_pair=False)
    assert alone.vision.shape == expected.vision.shape
    assert_close(alone.text, module.pools["shared" if experts == "shared" else "text"](streams().text, VALID)[0])
    assert pools(routings)["block1/joint"] == (0, 0)


def test_every_nth_block_is_sparse() -> None:
    encoder = make_encoder(depth=7, moe={"every": 3})
    assert {type(pool) for block in encoder.blocks for pool in block.ffn.pools.values()} == {FeedForward}
    encoder = make_encoder("smoe", depth=7, moe={"every": 3})
    sparse = [n for n, block in enumerate(encoder.blocks) if isinstance(block.ffn.pools["text"], MoE)]
    assert sparse == [2, 5]
    assert [item.layer for item in encoder(text_ids=texts(1, 3)).routings if item.pool == "text"] == [2, 5]


def test_options_reach_the_layer() -> None:
    moe = {
        "num_heads": 2, "choices": 3, "gate": "sigmoid", "renormalize": True, "inner_residual": True,
        "capacity_factor": 1.5, "backend": "grouped_mm", "router": "cosine",
    }  # fmt: skip
    layer = build_feed_forward(make_config("mhmoe", moe=moe, glu=True), sparse=True)
    assert isinstance(layer, MultiHeadMoE)
    router = layer.moe.router
    assert (layer.num_heads, router.top_k, router.gate, router.renormalize) == (2, 3, "sigmoid", True)
    assert hasattr(router, "log_temperature")
    assert layer.moe.inner_residual
    assert layer.moe.experts.glu
    assert layer.moe.experts.backend == "grouped_mm"
    assert "1.5" in repr(layer.moe.dispatcher)
    # X-MoE means the cosine router unless it is told otherwise.
    cosine = build_feed_forward(make_config("xmoe"), sparse=True)
    linear = build_feed_forward(make_config("xmoe", moe={"router": "linear"}), sparse=True)
    assert [hasattr(layer.router, "log_temperature") for layer in (cosine, linear)] == [True, False]


@pytest.mark.parametrize("ffn", ["smoe", "mhmoe"])
def test_routings_by_modality(ffn: str) -> None:
    """The shares of a shared pool are what each modality alone would get from the same layer."""
    module = make(ffn, moe={"experts": "shared"})
    (item,) = module(streams(), VALID, is_pair=True)[1]
    shares = item.by_modality()
    layer = module.pools["shared"]
    expected = {"vision": layer(streams().vision)[1], "text": layer(streams().text, VALID)[1]}
    assert shares.keys() == expected.keys()
    for modality, routing in expected.items():
        share = shares[modality]
        assert torch.equal(share.experts_NK, routing.experts_NK)
        assert_close(share.weights_NK, routing.weights_NK)
        assert_close(share.logits_NE, routing.logits_NE)
        assert_close(share.balance_probs_NE, routing.balance_probs_NE)
        assert share.num_heads == routing.num_heads
    assert shares["vision"].valid_N.all()
    assert torch.equal(shares["text"].valid_N, expected["text"].valid_N)


def test_dropped_choices_by_modality() -> None:
    module = make("smoe", moe={"experts": "shared", "capacity_factor": 0.5})
    (item,) = module(streams(), None, is_pair=True)[1]
    shares = item.by_modality()
    assert item.routing.kept_NK is not None
    assert torch.equal(torch.cat([shares["vision"].kept_NK, shares["text"].kept_NK]), item.routing.kept_NK)
    assert shares["vision"].kept_NK.shape[0] == 10
    assert not item.routing.kept_NK.all()


def test_a_pool_of_one_modality_is_that_modality() -> None:
    routings = make_encoder("mhmoe")(images(1), texts(1, 3)).routings
    assert [list(item.by_modality()) for item in routings] == [["vision"], ["text"]]
    assert routings[0].by_modality()["vision"] is routings[0].routing


def test_a_shared_pool_without_images_has_an_empty_share() -> None:
    encoder = make_encoder("mhmoe", moe={"experts": "shared"})
    (item,) = encoder(text_ids=texts(2, 3)).routings
    assert [share.experts_NK.shape[0] for share in item.by_modality().values()] == [0, 24]
