"""Tiny encoders in float64 whose every parameter is random, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.encoder import EncoderOutput, MultiwayEncoder
from mhmoe_vl.models.visual_tokenizer import CodeHead, VisualTokenizer
from mhmoe_vl.moe import KINDS

#: Every kind of feed-forward layer, with per-modality and with shared experts.
KINDS_AND_POOLS = [("dense", "per_modality")] + [
    (kind, pool) for kind in KINDS if kind != "dense" for pool in ("per_modality", "shared")
]

VOCAB_SIZE = 30
NUM_PATCHES = 16


def make_config(ffn: str = "dense", *, moe: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """16 wide, two blocks (the second is sparse), 16 px images of 16 patches, 30 tokens."""
    fields: dict[str, Any] = {
        "dim": 16, "depth": 2, "num_heads": 2, "ffn_dim": 24, "image_size": 16, "patch_size": 4,
        "vocab_size": VOCAB_SIZE, "max_text_length": 12, "num_visual_codes": 11,
    }  # fmt: skip
    # Heads that share their experts with nobody need more of them.
    num_experts = 12 if ffn == "mhmoe_head_parallel" else 4
    moe = {"num_experts": num_experts, "top_k": 2, "choices": 2, "num_heads": 4, "match": "none"} | (moe or {})
    return ModelConfig(ffn=ffn, moe=moe, **(fields | changes))


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Replace every parameter, zeros and ones too: what starts at zero hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.35 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)


def make_encoder(ffn: str = "dense", *, seed: int = 0, **changes: Any) -> MultiwayEncoder:
    encoder = MultiwayEncoder(make_config(ffn, **changes)).double()
    randomize(encoder, seed)
    return encoder


def images(num: int, *, size: tuple[int, int] = (16, 16), seed: int = 0) -> Tensor:
    """Float64 images in [-1, 1], so that nothing is rounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, 3, *size, generator=generator, dtype=torch.float64) * 2 - 1


def texts(num: int, length: int, *, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (num, length), generator=torch.Generator().manual_seed(seed))


def patch_masks(num: int, *, seed: int = 0) -> Tensor:
    return torch.rand(num, NUM_PATCHES, generator=torch.Generator().manual_seed(seed)) < 0.4


def weighted_sum(output: EncoderOutput) -> Tensor:
    """A scalar that depends on every output value, each with its own random weight."""
    total = output.vision.new_zeros(())
    for hidden in (output.vision, output.text):
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        total = total + (hidden * weights).sum()
    return total


def make_visual_tokenizer(ffn: str = "dense") -> VisualTokenizer:
    """Seven codes of 4-px patches, random all over."""
    encoder = MultiwayEncoder(make_config(ffn, modalities=("vision",)))
    head = CodeHead(encoder.config.dim, 5)
    randomize(encoder)
    randomize(head)
    generator = torch.Generator().manual_seed(0)
    head.center_on(torch.randn(5, generator=generator) / 10)
    codes = F.normalize(torch.randn(7, 5, generator=generator), dim=-1)
    return VisualTokenizer(
        encoder, head, codes, torch.rand(7, 48, generator=generator) * 2 - 1, {"teacher": "x"}
    ).eval()
