"""Published sizes, and cost formulas against built modules and a FLOP counter."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhmoe_vl.config import Config, load_config
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.cost import encoder_cost
from mhmoe_vl.models.encoder import MultiwayEncoder
from mhmoe_vl.models.heads import TokenHead
from mhmoe_vl.moe import count_flops
from tests.unit.models.builders import KINDS_AND_POOLS, images, make_config, texts

CONFIGS = Path(__file__).parents[3] / "configs" / "model"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


class ModelFile(Config):
    """What a file of ``configs/model`` holds."""

    model: ModelConfig


def load(name: str, *overrides: str) -> ModelConfig:
    return load_config(ModelFile, CONFIGS / f"{name}.yaml", overrides).model


def num_params(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def build(config: ModelConfig) -> tuple[MultiwayEncoder, TokenHead, TokenHead]:
    """Encoder, MLM head and MIM head, without memory."""
    with torch.device("meta"):
        heads = (TokenHead(config.dim, config.vocab_size), TokenHead(config.dim, config.num_visual_codes))
        return MultiwayEncoder(config), *heads


def test_the_named_sizes() -> None:
    assert {"tiny", "small", "base", "large", "giant"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ffn", ["dense", "smoe", "xmoe", "fine_grained", "mhmoe"])
def test_every_size_builds_and_costs_what_the_formula_says(name: str, ffn: str) -> None:
    config = load(name, f"model.ffn={ffn}")
    encoder, *_ = build(config)
    assert encoder_cost(config, num_text_tokens=64).num_params == num_params(encoder)


@pytest.mark.parametrize(("name", "published"), [("base", 276e6), ("large", 746e6)])
def test_released_sizes(name: str, published: float) -> None:
    config = load(name, "model.ffn=dense")
    assert not config.tie_embeddings
    assert num_params(*build(config)) == pytest.approx(published, rel=0.02)


def test_the_parts_of_giant() -> None:
    """Table 2 of BEiT-3 (arXiv 2208.10442)."""
    encoder, mlm_head, mim_head = build(load("giant", "model.ffn=dense"))

    def pool(name: str) -> int:
        return num_params(*(block.ffn.pools[name] for block in encoder.blocks if name in block.ffn.pools))

    assert pool("vision") == pytest.approx(692e6, rel=0.005)
    assert pool("text") == pytest.approx(692e6, rel=0.005)
    assert pool("joint") == pytest.approx(52e6, rel=0.005)
    assert num_params(*(block.attention for block in encoder.blocks)) == pytest.approx(317e6, rel=0.005)
    # The MLM head shares the token embedding in the paper, whose total has two digits.
    assert round(num_params(encoder, mim_head) / 1e9, 1) == 1.9
    assert mlm_head.linear.weight.shape == encoder.text_embedding.tokens.weight.shape


SWITCHES: list[dict[str, Any]] = [
    {},
    {"vl_ffn_layers": 1},
    {"vl_ffn_layers": 2, "depth": 3, "sub_ln": False},
    {"shared_attention": True, "glu": True},
    {"modalities": ("text",)},
    {"modalities": ("vision",)},
    {"final_norm": False},
]


@pytest.mark.parametrize(("ffn", "experts"), KINDS_AND_POOLS)
@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_parameters_and_flops_equal_the_built_encoder(ffn: str, experts: str, options: dict[str, Any]) -> None:
    config = make_config(ffn, moe={"experts": experts}, **options)
    encoder = MultiwayEncoder(config)
    cost = encoder_cost(config, num_text_tokens=6)
    assert cost.num_params == num_params(encoder)
    image = images(2).float() if "vision" in config.modalities else None
    ids = texts(2, 6) if "text" in config.modalities else None
    assert (cost.num_image_tokens, cost.num_text_tokens) == (
        17 if image is not None else 0,
        6 if ids is not None else 0,
    )
    # On CPU the fused attention is invisible to the counter.
    with sdpa_kernel(SDPBackend.MATH):
        flops = count_flops(lambda: encoder(image, ids))
    flops -= 0 if image is None else count_flops(lambda: encoder.vision_embedding(image))
    assert flops == 2 * (cost.num_image_tokens + cost.num_text_tokens) * cost.flops_per_token


@pytest.mark.parametrize("ffn", ["dense", "mhmoe"])
def test_image_and_text_may_be_sequences_of_their_own(ffn: str) -> None:
    """Then they cost less: no attention between them."""
    config = make_config(ffn)
    encoder = MultiwayEncoder(config)
    cost = encoder_cost(config, num_text_tokens=6, is_pair=False)
    image = images(2).float()
    with sdpa_kernel(SDPBackend.MATH):
        flops = count_flops(lambda: (encoder(image), encoder(None, texts(2, 6))))
    flops -= count_flops(lambda: encoder.vision_embedding(image))
    assert flops // (2 * 23) == cost.flops_per_token
    assert cost.flops_per_token < encoder_cost(config, num_text_tokens=6).flops_per_token
    # Of an image alone, 17 tokens.
    assert encoder_cost(config, num_text_tokens=0).num_text_tokens == 0
    assert encoder_cost(config, num_text_tokens=0).num_params == cost.num_params


@pytest.mark.parametrize("ffn", ["smoe", "mhmoe"])
def test_norms_inside_experts_count(ffn: str) -> None:
    config = make_config(ffn, moe={"sub_ln": True})
    assert encoder_cost(config, num_text_tokens=6).num_params == num_params(MultiwayEncoder(config))
    with pytest.raises(ValueError, match=r"moe.backend: 'segments' has no norm for moe.sub_ln"):
        make_config(ffn, moe={"sub_ln": True, "backend": "segments"})


@pytest.mark.parametrize(("ffn", "rows"), [("dense", 0), ("smoe", 2), ("xmoe", 2), ("fine_grained", 2), ("mhmoe", 8)])
def test_assignments_per_token(ffn: str, rows: int) -> None:
    config = make_config(ffn)
    assert encoder_cost(config, num_text_tokens=6).num_assignments_per_token == rows
    for item in MultiwayEncoder(config)(images(2).float(), texts(2, 6)).routings:
        num_tokens = 2 * (17 if item.pool == "vision" else 6)
        assert item.routing.experts_NK.numel() == rows * num_tokens


def test_active_parameters_by_hand() -> None:
    """One branch of every layer with two of four experts, and the larger of the two embeddings."""
    config = make_config("smoe", moe={"num_experts": 4, "top_k": 2})
    attention = 4 * (16 * 16 + 16) + 2 * 16 + 2 * 16
    dense = 2 * 16 * 24 + 24 + 16 + 2 * 24
    sparse = 16 * 4 + 2 * (2 * 16 * 24 + 24 + 16)
    norms = 2 * 2 * 16 + 2 * 16
    image_table, text_table = (3 * 16 + 1) * 16 + (3 + 16) * 16, (30 + 12) * 16
    expected = 2 * attention + dense + sparse + norms + max(image_table, text_table)
    assert encoder_cost(config, num_text_tokens=6).num_active_params == expected


@pytest.mark.parametrize(("name", "ffn"), list(product(("tiny", "base"), ("mhmoe", "fine_grained", "xmoe"))))
def test_matched_kinds_cost_what_smoe_costs(name: str, ffn: str) -> None:
    reference = encoder_cost(load(name, "model.ffn=smoe"), num_text_tokens=64)
    cost = encoder_cost(load(name, f"model.ffn={ffn}"), num_text_tokens=64)
    assert cost.flops_per_token == pytest.approx(reference.flops_per_token, rel=0.025)
    assert cost.num_params == pytest.approx(reference.num_params, rel=0.025)
