"""Configuration of the encoder; ``configs/model/*.yaml`` holds the named sizes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mhmoe_vl.config import Config
from mhmoe_vl.models.embeddings import Normalization
from mhmoe_vl.moe import FfnShape, match_ffn
from mhmoe_vl.moe.cost import MULTI_HEAD_KINDS, default_router
from mhmoe_vl.moe.experts import WHOLE_LAYER_BACKENDS

Positive = Annotated[int, Field(gt=0)]
Modality = Literal["vision", "text"]
MODALITIES: tuple[Modality, ...] = ("vision", "text")


class MoEConfig(Config):
    """Sparse feed-forward layers. Sizes are those of the reference SMoE; ``match`` derives the rest.

    Attributes:
        num_experts, top_k: E0 and k0 of the reference SMoE, whose experts are ``model.ffn_dim`` wide.
        num_heads: sub-tokens per token of ``mhmoe`` and ``mhmoe_head_parallel``.
        choices: k of these (per sub-token) and of ``fine_grained``.
        num_head_layers, num_merge_layers: depth of the head and merge layers of multi-head kinds; 0 leaves them out.
        match: what is held equal to the reference: ``flops`` (and parameters), ``params``, or ``none``.
        every: every n-th block is sparse.
        experts: one pool per modality, or one pool shared by both.
        router: ``linear`` or ``cosine``; None is what the kind means.
        num_experts_multiple: derived numbers of experts are rounded to a multiple of this, so that expert-parallel
            degrees divide them. A property of the model, which is the same on any number of processes.
        sub_ln: experts normalise their hidden activation, as dense layers do under ``model.sub_ln`` and as those of the
            first paper do, by its counts of parameters. The fast engine for CPUs cannot.
        backend: what computes the experts: ``auto``, or one of docs/moe.md; results are the same.
        balance_weight, z_weight: weights of the auxiliary losses.
        selection_bias_rate: rate of loss-free balancing; 0 turns it off.
    """

    num_experts: Positive = 8
    top_k: Positive = 1
    num_heads: Positive = 4
    choices: Positive = 1
    num_head_layers: Annotated[int, Field(ge=0)] = 1
    num_merge_layers: Annotated[int, Field(ge=0)] = 1
    match: Literal["flops", "params", "none"] = "flops"
    every: Positive = 2
    experts: Literal["per_modality", "shared"] = "per_modality"
    router: Literal["linear", "cosine"] | None = None
    num_experts_multiple: Positive = 1
    gate: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False
    inner_residual: bool = False
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    sub_ln: bool = False
    backend: Literal["auto", "loop", "segments", "segments_recompute", "grouped_mm", "fused"] = "auto"
    balance_weight: Annotated[float, Field(ge=0)] = 0.01
    z_weight: Annotated[float, Field(ge=0)] = 0.0
    selection_bias_rate: Annotated[float, Field(ge=0)] = 0.0


class ModelConfig(Config):
    """A BEiT-3-style multiway encoder (arXiv 2208.10442).

    Attributes:
        ffn: kind of the sparse blocks' feed-forward layer, the one word that a comparison changes.
        shared_attention: one set of attention weights for both modalities (the paper) or one each (the release).
        vl_ffn_layers: top blocks with a third, joint feed-forward for image-text pairs (paper: 3; release: 0).
        image_normalization: of pixels: ``half`` scales to [-1, 1] (BEiT-3), ``imagenet`` takes out the mean and
            divides by the standard deviation of ImageNet (BEiT-3, for classification of ImageNet alone).
        final_norm: normalise what the last block gives. The release leaves that to the heads of visual question
            answering and image classification, which begin with a norm of their own.
        tie_embeddings: the MLM or LM head shares the token embedding (the release has its own).
        positions: of text: ``learned``, a table that is added to the tokens, or ``rotary`` (arXiv 2104.09864), which
            turns queries and keys and has no parameters. Rotary needs an encoder of text alone.
    """

    dim: Positive
    depth: Positive
    num_heads: Positive
    ffn_dim: Positive
    image_size: Positive = 224
    patch_size: Positive = 16
    image_normalization: Normalization = "half"
    vocab_size: Positive = 64010
    max_text_length: Positive = 1024
    num_visual_codes: Positive = 8192
    modalities: tuple[Modality, ...] = MODALITIES
    ffn: Literal["dense", "smoe", "xmoe", "fine_grained", "mhmoe", "mhmoe_head_parallel"] = "mhmoe"
    moe: MoEConfig = MoEConfig()
    glu: bool = False
    sub_ln: bool = True
    shared_attention: bool = False
    vl_ffn_layers: Annotated[int, Field(ge=0)] = 0
    final_norm: bool = True
    tie_embeddings: bool = False
    positions: Literal["learned", "rotary"] = "learned"
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    checkpoint_activations: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide dim={self.dim}")
        if self.ffn in MULTI_HEAD_KINDS and self.dim % self.moe.num_heads:
            raise ValueError(
                f"moe.num_heads={self.moe.num_heads} must divide dim={self.dim}, which ffn={self.ffn} splits into "
                "that many sub-tokens"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}")
        if self.vl_ffn_layers > self.depth:
            raise ValueError(f"vl_ffn_layers={self.vl_ffn_layers} exceeds depth={self.depth}")
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities={self.modalities} must name 'vision', 'text' or both, once each")
        if self.positions == "rotary":
            if self.modalities != ("text",):
                raise ValueError(
                    "positions: 'rotary' is for text alone: patches have rows and columns, and no place on the axis "
                    "that words have; set modalities=[text], or positions=learned"
                )
            if self.dim // self.num_heads % 2:
                raise ValueError(
                    f"positions: 'rotary' turns pairs of values, and a head of dim={self.dim} / num_heads="
                    f"{self.num_heads} has {self.dim // self.num_heads}; choose num_heads so that it is even"
                )
        if self.moe.sub_ln and self.moe.backend in WHOLE_LAYER_BACKENDS:
            raise ValueError(f"moe.backend: '{self.moe.backend}' has no norm for moe.sub_ln=true; use moe.backend=auto")
        if self.ffn == "mhmoe_head_parallel" and self.router != "linear":
            raise ValueError(f"moe.router: '{self.router}' has no form per head; ffn={self.ffn} needs 'linear'")
        if self.ffn != "dense":
            try:
                shape = self.ffn_shape
            except ValueError as error:
                raise ValueError(f"moe: {error}") from None
            if self.moe.match == "flops" and not shape.is_matched:
                raise ValueError(
                    f"moe: no sizes match the reference SMoE to 2 % in whole percent (best: ffn_dim={shape.ffn_dim}, "
                    f"num_experts={shape.num_experts}, FLOPs {shape.flops_mismatch:+.1%}, parameters "
                    f"{shape.params_mismatch:+.1%}); change moe.num_heads, moe.choices, moe.num_experts or ffn_dim, "
                    "or set moe.match=none"
                )
            multiple = self.moe.num_experts_multiple
            if shape.num_experts % multiple:
                raise ValueError(
                    f"moe.num_experts_multiple: {multiple} does not divide the {shape.num_experts} experts that ffn="
                    f"{self.ffn} with moe.match={self.moe.match} takes from moe.num_experts; set that to a multiple"
                )
        return self

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def ffn_shape(self) -> FfnShape:
        """Sizes of the sparse blocks' feed-forward layer."""
        return match_ffn(
            self.ffn,
            self.dim,
            self.ffn_dim,
            self.moe.num_experts,
            self.moe.top_k,
            self.moe.num_heads,
            self.moe.choices,
            self.moe.match,
            self.glu,
            num_experts_multiple=self.moe.num_experts_multiple,
            num_projections=self.moe.num_head_layers + self.moe.num_merge_layers,
            sub_ln=self.moe.sub_ln,
        )

    @property
    def router(self) -> str:
        return self.moe.router or default_router(self.ffn)

    def is_sparse(self, layer: int) -> bool:
        """Every ``moe.every``-th block, counted so that the first block is dense."""
        return self.ffn != "dense" and layer % self.moe.every == self.moe.every - 1

    def has_vl_ffn(self, layer: int) -> bool:
        return layer >= self.depth - self.vl_ffn_layers
