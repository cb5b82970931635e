"""The multiway encoder: embeddings, blocks, final norms.

Shape suffixes: B samples, P patches, L text tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhmoe_vl.models.attention import Attention, KeyValues, Rotation
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.drop_path import keep_factors
from mhmoe_vl.models.embeddings import TextEmbedding, VisionEmbedding
from mhmoe_vl.models.feed_forward import LayerRouting, MultiwayFeedForward
from mhmoe_vl.models.initialization import draw_key, random_numbers_of
from mhmoe_vl.models.streams import Multiway, Streams
from mhmoe_vl.moe import FeedForward, MoE, MultiHeadMoE
from mhmoe_vl.moe.layer import linear_layers

#: Who may look at whom. ``full``: everybody at everybody. ``captioning``: image tokens at image tokens, text tokens
#: at the image and at text up to themselves (which is also causal language modeling when there is no image).
AttentionPattern = Literal["full", "captioning"]


class EncoderOutput(NamedTuple):
    """Final hidden states, and the routing of every expert pool in every block.

    Attributes:
        vision: ``[B, 1 + P, D]``, class token first; ``[B, 0, D]`` without image.
        text: ``[B, L, D]``; ``[B, 0, D]`` without text.
        cache: keys and values per block, only if asked for.
    """

    vision: Tensor
    text: Tensor
    routings: list[LayerRouting]
    cache: list[KeyValues]


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = Multiway(
            lambda: nn.LayerNorm(config.dim), config.modalities, shared=config.shared_attention
        )
        self.attention = Attention(
            config.dim, config.num_heads, config.modalities, shared=config.shared_attention, sub_ln=config.sub_ln
        )
        self.ffn_norm = Multiway(lambda: nn.LayerNorm(config.dim), config.modalities)
        self.ffn = MultiwayFeedForward(config, layer)

    def forward(
        self,
        streams: Streams,
        mask: Tensor | None,
        text_valid: Tensor | None,
        is_pair: bool,
        keep: Tensor | None,
        past: KeyValues | None,
        rotation: Rotation | None = None,
    ) -> tuple[Streams, list[LayerRouting], KeyValues]:
        attended, present = self.attention(self.attention_norm(streams), mask, past, rotation)
        streams = streams + (attended if keep is None else attended.scaled(keep[0]))
        fed, routings = self.ffn(self.ffn_norm(streams), text_valid, is_pair=is_pair)
        streams = streams + (fed if keep is None else fed.scaled(keep[1]))
        return streams, routings, present


class MultiwayEncoder(nn.Module):
    """BEiT-3-style encoder (arXiv 2208.10442) whose sparse blocks may be any kind of mixture of experts.

    Build it under ``torch.device("meta")`` to look at a size without allocating it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        key = draw_key()
        if "vision" in config.modalities:
            self.vision_embedding = VisionEmbedding(
                config.dim, config.image_size, config.patch_size, config.image_normalization
            )
        if "text" in config.modalities:
            self.text_embedding = TextEmbedding(
                config.dim,
                config.vocab_size,
                config.max_text_length,
                learned_positions=config.positions == "learned",
            )
        self.blocks: Sequence[Block] = nn.ModuleList(Block(config, layer) for layer in range(config.depth))  # type: ignore[assignment]
        self.norm = Multiway(
            lambda: nn.LayerNorm(config.dim) if config.final_norm else nn.Identity(), config.modalities
        )
        self.reset_parameters(key)

    def reset_parameters(self, key: int | None = None) -> None:
        """BEiT's scheme (arXiv 2106.08254): truncated normal 0.02 at width 768, here scaled with ``1 / sqrt(dim)`` so
        that narrow models start with the same activations; the outputs of block l divided by ``sqrt(2 l)``. Experts
        and head and merge layers keep their own initialisation, which follows their own width.

        Args:
            key: of :func:`~mhmoe_vl.models.initialization.draw_key`. Every part has random numbers of its own, so that
                encoders of the same key are equal in all parts that they have in common.
        """
        key = draw_key() if key is None else key
        std = initial_std(self.config.dim)
        for name in ("vision_embedding", "text_embedding"):
            if hasattr(self, name):
                with random_numbers_of(key, name):
                    getattr(self, name).reset_parameters(std)
        for layer, block in enumerate(self.blocks):
            with random_numbers_of(key, f"block{layer}/attention"):
                _reset_linear_layers(block.attention, std)
            for pool, ffn in block.ffn.pools.items():
                with random_numbers_of(key, f"block{layer}/{pool}"):
                    if isinstance(ffn, FeedForward):
                        _reset_linear_layers(ffn, std)
                    else:
                        ffn.reset_parameters()  # type: ignore[operator]
            with torch.no_grad():
                for output_weight in _output_weights(block):
                    output_weight /= math.sqrt(2 * (layer + 1))

    def forward(
        self,
        image: Tensor | None = None,
        text_ids: Tensor | None = None,
        *,
        text_valid: Tensor | None = None,
        image_mask: Tensor | None = None,
        sample_seed: Tensor | None = None,
        pattern: AttentionPattern = "full",
        blind: bool = False,
        past: Sequence[KeyValues] | None = None,
        first_position: int = 0,
        text_positions: Tensor | None = None,
        with_cache: bool = False,
        is_pair: bool | None = None,
    ) -> EncoderOutput:
        """Encode images, texts, or pairs.

        Args:
            image: uint8 ``[B, 3, H, W]`` (or float in [-1, 1]); None for text alone.
            text_ids: int64 ``[B, L]``; None for images alone.
            text_valid: bool ``[B, L]``, False for padding; None if there is none.
            image_mask: bool ``[B, P]``, True for patches to hide.
            sample_seed: int64 ``[B]``, or of packed rows ``[B, L]``; decides stochastic depth in training. None: no
                stochastic depth.
            pattern: who may look at whom.
            blind: of the image keep the class token only.
            past: cache of an earlier call that ``text_ids`` continue (``image`` must then be None).
            first_position: position of the first token of ``text_ids`` in its text.
            text_positions: int64 ``[B, L]`` of packed rows of text alone: wherever they start again at 0, another text
                begins, and tokens see those of their own text only.
            with_cache: return keys and values, for decoding step by step.
            is_pair: whether joint feed-forward layers (VL-FFN) apply; None means image and text are both given here.
                Decoding step by step has to say True, since each call sees one part of the pair.
        """
        if text_positions is not None and (image is not None or past):
            raise ValueError("packed rows hold text alone, and are encoded in one call")
        streams = self._embed(image, text_ids, text_valid, image_mask, blind, first_position, text_positions)
        text_valid = None if text_ids is None else text_valid
        if is_pair is None:
            is_pair = streams.vision.shape[1] > 0 and streams.text.shape[1] > 0
        mask = _attention_mask(streams, text_valid, pattern, num_past=0 if not past else past[0].keys.shape[2])
        if text_positions is not None:
            together = same_text(text_positions)[:, None]
            mask = together if mask is None else mask & together
        rotation = None
        if self.config.positions == "rotary":
            rotation = self._rotation(streams.text, first_position, text_positions)
        keep = None
        if self.training and self.config.drop_path > 0 and sample_seed is not None:
            factors = keep_factors(sample_seed.flatten(), 2 * len(self.blocks), self.config.drop_path)
            keep = factors.view(len(self.blocks), 2, *sample_seed.shape)
        routings: list[LayerRouting] = []
        cache: list[KeyValues] = []
        for layer, block in enumerate(self.blocks):
            of_past = None if past is None else past[layer]
            arguments = (streams, mask, text_valid, is_pair, None if keep is None else keep[layer], of_past, rotation)
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                streams, of_block, present = checkpoint(block, *arguments, use_reentrant=False)
            else:
                streams, of_block, present = block(*arguments)
            routings += of_block
            if with_cache:
                cache.append(present)
        streams = self.norm(streams)
        return EncoderOutput(streams.vision, streams.text, routings, cache)

    def shard_units(self) -> list[nn.Module]:
        """Modules that sharded data parallelism should gather one at a time, in order."""
        return list(self.blocks)

    def _rotation(self, text_BLD: Tensor, first_position: int, text_positions: Tensor | None) -> Rotation:
        if text_positions is None:
            end = first_position + text_BLD.shape[1]
            text_positions = torch.arange(first_position, end, device=text_BLD.device)[None]
        return Rotation.of_positions(text_positions, self.config.dim // self.config.num_heads)

    def _embed(
        self,
        image: Tensor | None,
        text_ids: Tensor | None,
        text_valid: Tensor | None,
        image_mask: Tensor | None,
        blind: bool,
        first_position: int,
        text_positions: Tensor | None,
    ) -> Streams:
        if image is None and text_ids is None:
            raise ValueError("the encoder needs an image, a text, or both")
        for modality, given in (("vision", image), ("text", text_ids)):
            if given is not None and modality not in self.config.modalities:
                raise ValueError(f"this encoder has no {modality} branch: its modalities are {self.config.modalities}")
        vision = None if image is None else self.vision_embedding(image, image_mask, blind=blind)
        text = None
        if text_ids is not None:
            text = self.text_embedding(text_ids, text_valid, first_position=first_position, positions_BL=text_positions)
        known = vision if vision is not None else text
        assert known is not None
        return Streams(
            known[:, :0] if vision is None else vision,
            known[:, :0] if text is None else text,
        )


def same_text(positions_BL: Tensor) -> Tensor:
    """Bool ``[B, L, L]``: whether two tokens of a packed row are of one text, which begins wherever positions start
    again at 0. (Padding at position 0 is a text of its own, so that no row of an attention mask is empty.)"""
    number_BL = (positions_BL == 0).cumsum(1)
    return number_BL[:, :, None] == number_BL[:, None, :]


def _reset_linear_layers(module: nn.Module, std: float) -> None:
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.trunc_normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)


def initial_std(dim: int) -> float:
    """Standard deviation of new weights: BEiT's 0.02 at width 768, the same activations at other widths."""
    return 0.02 * math.sqrt(768 / dim)


def _output_weights(block: Block) -> list[Tensor]:
    """The weights of a block that write into the residual stream."""
    weights: list[Tensor] = [
        linear.weight for linear in block.attention.out.children() if isinstance(linear, nn.Linear)
    ]
    for ffn in block.ffn.pools.values():
        if isinstance(ffn, MultiHeadMoE):
            merge = linear_layers(ffn.merge)
            weights.append(merge[-1].weight if merge else ffn.moe.experts.w2_EFD)
        elif isinstance(ffn, MoE):
            weights.append(ffn.experts.w2_EFD)
        elif isinstance(ffn, FeedForward):
            weights.append(ffn.w2.weight)
    return weights


def _attention_mask(
    streams: Streams, text_valid: Tensor | None, pattern: AttentionPattern, *, num_past: int
) -> Tensor | None:
    """Bool mask ``[B or 1, 1, queries, keys]``; None if everybody may look at everybody."""
    num_vision, num_text = streams.vision.shape[1], streams.text.shape[1]
    device = streams.text.device
    mask = None
    if pattern == "captioning" and num_text:
        query = torch.arange(num_vision + num_text, device=device)[:, None]
        key = torch.arange(num_vision + num_text, device=device)[None]
        mask = torch.where(query < num_vision, key < num_vision, key <= query)
        mask = torch.cat([mask.new_ones(num_vision + num_text, num_past), mask], dim=1)[None, None]
    if text_valid is not None:
        seen = text_valid.new_ones(text_valid.shape[0], num_past + num_vision)
        keys = torch.cat([seen, text_valid], dim=1)[:, None, None]
        mask = keys if mask is None else mask & keys
    return mask
