"""What an encoder costs, by formula. Only matrix products count, as in :mod:`mhmoe_vl.moe.cost`."""

from __future__ import annotations

from dataclasses import dataclass

from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.moe import FfnCost, ffn_cost


@dataclass(frozen=True)
class EncoderCost:
    """Cost of the encoder for an image and a text, or one of them; task heads are not included.

    Attributes:
        num_params: all parameters of the encoder.
        num_active_params: those that an image token or a text token can touch, the larger of the two.
        flops_per_token: forward FLOPs of the blocks per token, averaged over the tokens of image and text.
        num_assignments_per_token: rows that reach an expert per token in a sparse block, h * k.
        num_image_tokens, num_text_tokens: what ``flops_per_token`` speaks of.
    """

    num_params: int
    num_active_params: int
    flops_per_token: int
    num_assignments_per_token: int
    num_image_tokens: int
    num_text_tokens: int


def encoder_cost(config: ModelConfig, *, num_text_tokens: int, is_pair: bool = True) -> EncoderCost:
    """Cost for one image and ``num_text_tokens`` text tokens (0 for an encoder without text).

    Args:
        is_pair: image and text are one sequence; if not, each is one of its own and attends to itself alone.
    """
    num_image = 1 + config.num_patches if "vision" in config.modalities else 0
    num_text = num_text_tokens if "text" in config.modalities else 0
    sequences = [num_image + num_text] if is_pair else [num_image, num_text]
    flops = sum(length * blocks_flops_per_token(config, length) for length in sequences)
    dim, num_branches = config.dim, len(config.modalities)
    attention_params = 4 * (dim * dim + dim) + (2 * dim if config.sub_ln else 0) + 2 * dim
    params = active = 0
    for layer in range(config.depth):
        ffn = block_ffn_cost(config, sparse=config.is_sparse(layer))
        num_pools = 1 if config.is_sparse(layer) and config.moe.experts == "shared" else num_branches
        num_pools += config.has_vl_ffn(layer)
        num_attentions = 1 if config.shared_attention else num_branches
        # Norms before the feed-forward are one per modality.
        params += num_attentions * attention_params + num_pools * ffn.num_params + num_branches * 2 * dim
        active += attention_params + ffn.num_active_params + 2 * dim
    final_norm = 2 * dim if config.final_norm else 0
    image_table = (3 * config.patch_size**2 + 1) * dim + (3 + config.num_patches) * dim if num_image else 0
    num_positions = config.max_text_length if config.positions == "learned" else 0
    text_table = (config.vocab_size + num_positions) * dim if "text" in config.modalities else 0
    assignments = 0 if config.ffn == "dense" else config.ffn_shape.num_heads * config.ffn_shape.top_k
    return EncoderCost(
        num_params=params + num_branches * final_norm + image_table + text_table,
        num_active_params=active + final_norm + max(image_table, text_table),
        flops_per_token=flops // sum(sequences),
        num_assignments_per_token=assignments,
        num_image_tokens=num_image,
        num_text_tokens=num_text,
    )


def blocks_flops_per_token(config: ModelConfig, length: int) -> int:
    """Forward FLOPs of all blocks for each token of a sequence of ``length`` tokens, image and text together."""
    attention = 8 * config.dim**2 + 4 * length * config.dim
    ffns = (block_ffn_cost(config, sparse=config.is_sparse(layer)).flops_per_token for layer in range(config.depth))
    return config.depth * attention + sum(ffns)


def block_ffn_cost(config: ModelConfig, *, sparse: bool) -> FfnCost:
    """Cost of one feed-forward network of a dense or a sparse block."""
    if not sparse:
        return ffn_cost("dense", config.dim, config.ffn_dim, glu=config.glu, sub_ln=config.sub_ln)
    shape = config.ffn_shape
    return ffn_cost(
        config.ffn,
        config.dim,
        shape.ffn_dim,
        shape.num_experts,
        shape.top_k,
        shape.num_heads,
        router=config.router,
        glu=config.glu,
        sub_ln=config.moe.sub_ln,
        num_projections=config.moe.num_head_layers + config.moe.num_merge_layers,
    )
