"""Which parameters get gradients: all of them, with zero samples too, and the same ones under checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mhmoe_vl.models.encoder import MultiwayEncoder
from mhmoe_vl.moe import balance_loss
from tests.unit.models.builders import (
    KINDS_AND_POOLS,
    images,
    make_encoder,
    patch_masks,
    texts,
    weighted_sum,
)

OPTIONS: list[dict[str, Any]] = [{}, {"vl_ffn_layers": 1}, {"shared_attention": True}, {"glu": True}]


def backward(encoder: MultiwayEncoder, *, num_samples: int = 4) -> dict[str, Tensor | None]:
    """Gradients of a batch each of images, texts and pairs, balance losses included."""
    encoder.zero_grad()
    num, valid = num_samples, torch.arange(6).expand(num_samples, -1) < 5
    outputs = [
        encoder(images(num), image_mask=patch_masks(num)),
        encoder(text_ids=texts(num, 6), text_valid=valid),
        encoder(images(num, seed=1), texts(num, 6, seed=1), text_valid=valid, image_mask=patch_masks(num, seed=1)),
    ]
    loss = sum(weighted_sum(output) for output in outputs)
    for output in outputs:
        for routing in output.routings:
            loss = loss + balance_loss(routing.routing)
    loss.backward()
    return {name: parameter.grad for name, parameter in encoder.named_parameters()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("ffn", "experts"), KINDS_AND_POOLS)
def test_every_parameter_gets_a_gradient(ffn: str, experts: str, options: dict[str, Any]) -> None:
    encoder = make_encoder(ffn, moe={"experts": experts}, **options)
    assert [name for name, grad in backward(encoder).items() if grad is None or not grad.any()] == []


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("ffn", "experts"), KINDS_AND_POOLS)
def test_zero_samples_give_zero_gradients_and_not_none(ffn: str, experts: str, options: dict[str, Any]) -> None:
    """Sharded data parallelism reduces gradients in every module's backward: a rank that skips one hangs the rest."""
    encoder = make_encoder(ffn, moe={"experts": experts}, **options)
    assert [name for name, grad in backward(encoder, num_samples=0).items() if grad is None or grad.any()] == []


@pytest.mark.parametrize("batch", ["images", "texts"])
@pytest.mark.parametrize(("ffn", "experts"), KINDS_AND_POOLS)
def test_blocks_run_whole_on_one_modality(ffn: str, experts: str, batch: str) -> None:
    """The branch of the absent modality takes part with zero rows."""
    encoder = make_encoder(ffn, moe={"experts": experts}, vl_ffn_layers=1)
    weighted_sum(encoder(images(2)) if batch == "images" else encoder(text_ids=texts(2, 3))).backward()
    missing = [name for name, p in encoder.named_parameters() if name.startswith("blocks") and p.grad is None]
    assert missing == []
    absent = "text" if batch == "images" else "vision"
    touched = [
        name for name, p in encoder.named_parameters()
        if (f".{absent}." in name or ".joint." in name) and p.grad is not None and p.grad.any()
    ]  # fmt: skip
    assert touched == []


@pytest.mark.parametrize(("ffn", "experts"), [("dense", "per_modality"), ("mhmoe", "per_modality"), ("xmoe", "shared")])
def test_checkpointing_gives_the_same_gradients(ffn: str, experts: str) -> None:
    options = {"moe": {"experts": experts}, "vl_ffn_layers": 1, "drop_path": 0.5}
    plain = make_encoder(ffn, **options)
    checkpointed = make_encoder(ffn, checkpoint_activations=True, **options)
    assert checkpointed.training
    expected, found = backward(plain), backward(checkpointed)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(found[name], grad, msg=name)


def test_checkpointing_keeps_less() -> None:
    """Without this the test above would pass if the switch did nothing."""

    def num_saved(encoder: MultiwayEncoder) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            encoder(images(4), texts(4, 6))
        return sum(sizes)

    assert num_saved(make_encoder(checkpoint_activations=True)) < num_saved(make_encoder()) / 3
