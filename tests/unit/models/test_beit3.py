"""Released BEiT-3 checkpoints in our encoder and heads: names, shapes, and hidden states against three other
implementations: a plain one (``released.py``), timm's image tower, and torchscale's encoder where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from mhmoe_vl.errors import CheckpointError
from mhmoe_vl.models.beit3 import (
    ReleasedModel,
    from_released,
    kind_of_ours,
    places,
    recognize,
    require_expressible,
    to_released,
)
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.encoder import MultiwayEncoder
from mhmoe_vl.models.heads import Nlvr2Head, TokenHead, VqaHead
from tests.unit.models.builders import make_config
from tests.unit.models.released import BASE, LARGE, RELEASED, TINY, Plain, fabricate, released_shapes


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def convert(tensors: dict[str, Tensor]) -> tuple[ReleasedModel, dict[str, Tensor], dict[str, Tensor]]:
    released = recognize(shapes_of(tensors), "file")
    return released, *from_released(tensors, released, "file")


def build(tensors: dict[str, Tensor]) -> MultiwayEncoder:
    """Our encoder with the weights of a released checkpoint."""
    released, weights, _ = convert(tensors)
    encoder = MultiwayEncoder(released.model).to(next(iter(weights.values())).dtype)
    prefix = "encoder."
    encoder.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    )
    return encoder.eval()


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("kind", RELEASED)
def test_names_and_shapes_of_the_release(kind: str, size: str) -> None:
    """Every tensor of every released file has a place, and every tensor of ours comes from one."""
    shapes = released_shapes(kind, **(BASE if size == "base" else LARGE))
    released = recognize(shapes, "file")
    assert (released.kind, released.size) == (kind, size)
    assert {name: place.shape for name, place in places(released).items()} == shapes
    with torch.device("meta"):
        encoder = MultiwayEncoder(released.model)
    ours = {place.name for place in places(released).values()}
    assert {name for name in ours if name.startswith("encoder.")} == {f"encoder.{n}" for n in encoder.state_dict()}
    assert released.model.image_size == RELEASED[kind][1]
    assert released.model.max_text_length == 1022
    assert released.num_outputs == {"vqa": 3129, "classification": 1000}.get(kind, 0)


@pytest.mark.parametrize(
    ("kind", "size", "published"),
    [
        ("pretrain", BASE, 276), ("pretrain", LARGE, 746), ("retrieval", BASE, 222), ("retrieval", LARGE, 675),
        ("vqa", BASE, 228), ("vqa", LARGE, 683), ("nlvr2", BASE, 226), ("nlvr2", LARGE, 681),
        ("captioning", BASE, 271), ("captioning", LARGE, 739),
    ],
)  # fmt: skip
def test_names_and_shapes_add_up_to_the_published_parameters(kind: str, size: dict[str, int], published: int) -> None:
    """In millions, as the README of unilm/beit3 has them."""
    assert sum(torch.Size(shape).numel() for shape in released_shapes(kind, **size).values()) / 1e6 == pytest.approx(
        published, abs=1.7
    )


@pytest.mark.parametrize("branches", ["AB", "A"])
@pytest.mark.parametrize("kind", RELEASED)
def test_there_and_back_is_bit_exact(kind: str, branches: str) -> None:
    if branches == "A" and kind != "classification":
        pytest.skip("only image classification can do without text")
    tensors = fabricate(kind, branches=branches, dtype=torch.float16 if kind == "vqa" else torch.float32)
    released, weights, unread = convert(tensors)
    assert kind_of_ours(weights) == kind
    assert all(tensor.shape[0] == 2 for tensor in unread.values())
    back = to_released(weights, released, unread, "run")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name
    # Without the rows that nothing reads they are zero, and nothing else changes.
    for name, tensor in to_released(weights, released, {}, "run").items():
        expected = tensors[name].clone()
        if "embed_positions" in name:
            expected[:2] = 0
        assert torch.equal(tensor, expected)


def inputs(num: int, size: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([length, length // 2, 1])[:num]
    return {
        "image": torch.rand(num, 3, size, size, generator=generator, dtype=dtype) * 2 - 1,
        "text_ids": torch.randint(0, TINY["vocab_size"], (num, length), generator=generator),
        "padding": torch.arange(length) >= lengths[:, None],
        "masked_patches": torch.rand(num, (size // 16) ** 2, generator=generator) < 0.4,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["pretrain", "vqa"])
@pytest.mark.parametrize("size", [32, 48, 80])
def test_hidden_states_equal_a_plain_implementation(kind: str, size: int, dtype: torch.dtype) -> None:
    """Images, texts, pairs; with padding and masked patches; with and without a final norm."""
    tensors = fabricate(kind, image_size=size, dtype=dtype)
    plain, encoder = Plain(tensors), build(tensors)
    given = inputs(3, size, 12, dtype)
    image, ids, padding, masked = given.values()
    tolerance = {"atol": 1e-5, "rtol": 0} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 0}
    with torch.no_grad():
        for mask in (None, masked):
            assert_close(encoder(image, image_mask=mask).vision, plain(image, masked_patches=mask), **tolerance)
        for valid in (None, ~padding):
            hidden = None if valid is None else ~valid
            assert_close(encoder(text_ids=ids, text_valid=valid).text, plain(None, ids, padding=hidden), **tolerance)
            for mask in (None, masked):
                for pattern, causal in (("full", False), ("captioning", True)):
                    pair = encoder(image, ids, text_valid=valid, image_mask=mask, pattern=pattern)
                    expected = plain(image, ids, padding=hidden, masked_patches=mask, causal_text=causal)
                    assert_close(torch.cat([pair.vision, pair.text], dim=1), expected, **tolerance)


def test_the_plain_implementation_reads_every_tensor() -> None:
    """What the comparison above would not notice if it were wrong: the two rows, and the heads."""
    tensors = fabricate("encoder", dtype=torch.float64)
    for tensor in tensors.values():
        tensor.requires_grad_()
    image, ids, padding, masked = inputs(2, 32, 12, torch.float64).values()
    Plain(tensors)(image, ids, padding=padding, masked_patches=masked).square().sum().backward()
    assert [name for name, tensor in tensors.items() if tensor.grad is None] == []
    for branch in "AB":
        gradient = tensors[f"beit3.encoder.embed_positions.{branch}.weight"].grad
        assert gradient is not None
        assert not gradient[:2].any()
        assert gradient[2:].any(-1).all()


def load_head(head: torch.nn.Module, weights: Mapping[str, Tensor], prefix: str) -> torch.nn.Module:
    head.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)})
    return head.double()


def test_heads_of_tasks() -> None:
    """Their logits from the released names, by hand."""
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tensors = fabricate("vqa", dtype=torch.float64)
    plain, (_, weights, _) = Plain(tensors), convert(tensors)
    pooled = plain.linear("pooler.dense", plain.layer_norm("pooler.norm", x)).tanh()
    scores = plain.linear("head.3", F.gelu(plain.layer_norm("head.1", plain.linear("head.0", pooled))))
    assert_close(load_head(VqaHead(128, 7), weights, "vqa_head.")(x), scores)

    tensors = fabricate("nlvr2", dtype=torch.float64)
    plain, (_, weights, _) = Plain(tensors), convert(tensors)
    left, right = torch.randn(2, 3, 2, 128, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    joined = torch.cat([left[:, 0], left[:, 1], right[:, 0], right[:, 1]], dim=-1)
    hidden = plain.linear("head.dense1", plain.layer_norm("head.norm1", joined))
    scores = plain.linear("head.dense2", F.gelu(plain.layer_norm("head.norm2", hidden)))
    assert_close(load_head(Nlvr2Head(128, input_norm=True), weights, "nlvr2_head.")(left, right), scores)

    tensors = fabricate("pretrain", dtype=torch.float64)
    plain, (_, weights, _) = Plain(tensors), convert(tensors)
    for name, num in (("mlm_head", 40), ("mim_head", 9)):
        assert_close(load_head(TokenHead(128, num), weights, f"{name}.")(x), plain.linear(name, x))


def test_timm_s_image_tower_agrees() -> None:
    """timm reads released files too, for images alone: 3 sizes of image, and its mean over patches and head."""
    timm = pytest.importorskip("timm")
    from timm.models.vision_transformer import checkpoint_filter_fn

    for size in (32, 48, 80):
        tensors = fabricate("classification", image_size=size)
        sizes = {"img_size": size, "embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 0.75}
        tower = timm.create_model("beit3_base_patch16_224", **sizes, num_classes=5).eval()
        tower.load_state_dict(checkpoint_filter_fn(dict(tensors), tower))
        image = inputs(2, size, 4, torch.float32)["image"]
        encoder, (_, weights, _) = build(tensors), convert(tensors)
        with torch.no_grad():
            vision = encoder(image).vision
            assert_close(vision, tower.norm(tower.forward_features(image)), atol=1e-5, rtol=0)
            mean = F.layer_norm(
                vision[:, 1:].mean(1), (128,),
                weights["classification_head.norm.weight"], weights["classification_head.norm.bias"],
            )  # fmt: skip
            scores = mean @ weights["classification_head.linear.weight"].T + weights["classification_head.linear.bias"]
            assert_close(scores, tower(image), atol=1e-5, rtol=0)


@pytest.fixture
def torchscale(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package that the release was written with. Its own requirements clash with ours, so it comes without them;
    of fairscale only two names are imported, and not used."""
    fairscale, fairscale_nn = ModuleType("fairscale"), ModuleType("fairscale.nn")
    fairscale_nn.checkpoint_wrapper = fairscale_nn.wrap = lambda module: module  # type: ignore[attr-defined]
    if "fairscale" not in sys.modules:
        monkeypatch.setitem(sys.modules, "fairscale", fairscale)
        monkeypatch.setitem(sys.modules, "fairscale.nn", fairscale_nn)
    pytest.importorskip(
        "torchscale.model.BEiT3",
        reason="torchscale is not installed: pip install --no-deps torchscale einops (its pins clash with ours)",
        exc_type=ImportError,
    )
    import torchscale.architecture.config
    import torchscale.model.BEiT3

    return torchscale


@pytest.mark.parametrize("size", [32, 48, 80])
def test_torchscale_agrees(torchscale: Any, size: int) -> None:
    """The original encoder with random weights: images, texts and pairs, padding, masks, both attention patterns."""
    config = torchscale.architecture.config.EncoderConfig(
        img_size=size, patch_size=16, vocab_size=40, multiway=True, layernorm_embedding=False, normalize_output=True,
        no_output_layer=True, encoder_embed_dim=128, encoder_attention_heads=2, encoder_ffn_embed_dim=96,
        encoder_layers=2, max_source_positions=14,
    )  # fmt: skip
    model = torchscale.model.BEiT3.BEiT3(config).eval()
    tensors = {name.removeprefix("beit3."): t for name, t in fabricate("encoder", image_size=size).items()}
    assert model.state_dict().keys() == tensors.keys()
    model.load_state_dict(tensors)
    encoder = build({f"beit3.{name}": tensor for name, tensor in tensors.items()})
    image, ids, padding, masked = inputs(3, size, 12, torch.float32).values()
    num_vision = 1 + (size // 16) ** 2
    one_way = torch.ones(num_vision + 12, num_vision + 12).triu(1)
    one_way[:num_vision, :num_vision] = 0
    with torch.no_grad():
        for mask in (None, masked):
            theirs = model(visual_tokens=image, vision_masked_position=mask)["encoder_out"]
            assert_close(encoder(image, image_mask=mask).vision, theirs, atol=1e-5, rtol=0)
        for hidden in (None, padding):
            valid = None if hidden is None else ~hidden
            theirs = model(textual_tokens=ids, text_padding_position=hidden)["encoder_out"]
            assert_close(encoder(text_ids=ids, text_valid=valid).text, theirs, atol=1e-5, rtol=0)
            for mask in (None, masked):
                for pattern, theirs_mask in (("full", None), ("captioning", one_way)):
                    theirs = model(ids, image, hidden, theirs_mask, mask)["encoder_out"]
                    ours = encoder(image, ids, text_valid=valid, image_mask=mask, pattern=pattern)
                    assert_close(torch.cat([ours.vision, ours.text], dim=1), theirs, atol=1e-5, rtol=0)


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


LAYER = "beit3.encoder.layers.1"
PATCHES = "beit3.vision_embed.proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, PATCHES), rf"file: not a released BEiT-3 checkpoint: it lacks {PATCHES}"),
        (lambda t: {"encoder.x": t["mlm_head.bias"]}, "file: not a released BEiT-3 checkpoint: it lacks"),
        (lambda t: without(t, f"{LAYER}.ffn.B.fc2.bias"), rf"lacks {LAYER}.ffn.B.fc2.bias of a .* 'pretrain'"),
        (
            lambda t: t | {f"{LAYER}.ffn.C.fc2.bias": t["mlm_head.bias"]},
            rf"{LAYER}.ffn.C.fc2.bias is not known .*did you mean '{LAYER}.ffn.*--keep-unknown",
        ),
        (
            lambda t: t | {f"{LAYER}.ffn.A.fc1.weight": torch.zeros(95, 128)},
            rf"{LAYER}.ffn.A.fc1.weight has shape \[95, 128\], and \[96, 128\] is expected",
        ),
        (lambda t: t | {"mlm_head.weight": torch.zeros(41, 128)}, r"has shape \[41, 128\], and \[40, 128\]"),
        (
            lambda t: t | {"beit3.encoder.embed_positions.A.weight": torch.zeros(8, 128)},
            "has 8 rows, which is not 3 and a square",
        ),
        (lambda t: t | {"beit3.text_embed.weight": torch.zeros(40)}, r"has shape \[40\], and 2 dimensions"),
        (lambda t: t | {"mlm_head.bias": torch.zeros(40).long()}, r"is torch.int64; one floating-point type"),
        (
            lambda t: t | {f"{LAYER}.self_attn.k_proj.A.bias": torch.zeros(128).half()},
            r"torch.float32 and torch.float16; one",
        ),
    ],
)
def test_other_files_are_refused_in_one_line(change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        convert(change(fabricate("pretrain")))
    assert str(refused.value).startswith("file: ")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_widths_that_attention_heads_do_not_divide() -> None:
    shapes = released_shapes("encoder", **(TINY | {"dim": 96}))
    with pytest.raises(CheckpointError, match=r"96 wide, .* --num-heads"):
        recognize(shapes, "file")
    assert recognize(shapes, "file", num_heads=3).model.num_heads == 3
    with pytest.raises(CheckpointError, match="96 wide, which 5 attention heads"):
        recognize(shapes, "file", num_heads=5)


def test_unknown_tensors_can_be_put_aside() -> None:
    tensors = fabricate("pretrain") | {"mystery": torch.arange(3.0)}
    released = recognize(shapes_of(tensors), "file")
    weights, unread = from_released(tensors, released, "file", keep_unknown=True)
    assert torch.equal(unread["mystery"], tensors["mystery"])
    back = to_released(weights, released, unread, "run")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_weights_that_do_not_fit_are_not_exported() -> None:
    released, weights, unread = convert(fabricate("captioning"))
    with pytest.raises(CheckpointError, match=r"run: lacks mlm_head.linear.bias, unlike"):
        to_released({n: t for n, t in weights.items() if n != "mlm_head.linear.bias"}, released, unread, "run")
    with pytest.raises(CheckpointError, match="run: has extra, unlike"):
        to_released(weights | {"extra": torch.zeros(1)}, released, unread, "run")


@pytest.mark.parametrize(
    "changes",
    [
        {"ffn": "smoe"},
        {"glu": True},
        {"sub_ln": False},
        {"shared_attention": True},
        {"vl_ffn_layers": 1},
        {"modalities": ("text",), "positions": "rotary"},
        {"modalities": ("text",)},
    ],
    ids=str,
)
def test_architectures_that_the_release_has_no_word_for(changes: dict[str, Any]) -> None:
    require_expressible(make_config())
    with pytest.raises(ValueError, match=r"model\.\w+: .* and released BEiT-3 has"):
        require_expressible(make_config(**changes))


def test_a_released_model_is_one_of_ours() -> None:
    """Nothing but sizes is unlike our default, apart from the final norm where heads have one."""
    released = recognize(released_shapes("pretrain", **BASE), "file")
    assert released.model == ModelConfig(
        ffn="dense", dim=768, depth=12, num_heads=12, ffn_dim=3072, max_text_length=1022
    )
