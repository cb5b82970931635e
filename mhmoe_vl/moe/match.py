"""Sizes at which two kinds of feed-forward layer are comparable.

The reference is a plain SMoE layer (E0 experts of width f0, k0 of them per token) of width d. MH-MoE with h heads and
k choices per sub-token then gets, following arXiv 2411.16205 (equations 8 and 9, generalised to any k0 and to GLU):

    two-matrix experts   k f = k0 f0 - d         E = h (E0 f0 - d) / f
    GLU experts          k f = k0 f0 - 2d/3      E = h (3 E0 f0 - 2d) / (3 f)

which pays for the head and merge layers in both FLOPs and parameters; with n linear layers there instead of two, d is
replaced by n d / 2. Heads with experts of their own
(``mhmoe_head_parallel``) cost the same but for a router that sees its head's alone; E is then a multiple of h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mhmoe_vl.moe.cost import KINDS, MULTI_HEAD_KINDS, FfnCost, ffn_cost

MATCHES = ("flops", "params", "none")

#: Rounding of the expert width, best first: 64 suits GPU tiles, 8 is the least that bfloat16 grouped matmuls take.
_MULTIPLES = (64, 32, 16, 8)
#: Largest mismatch of FLOPs and of parameters, in whole percent (so below 2.5 %), that still counts as equal. Routers
#: count here and not in the closed form: the paper's own 169 experts of 2304 have 2.2 % too many FLOPs.
TOLERANCE_PERCENT = 2


@dataclass(frozen=True)
class FfnShape:
    """Sizes of one layer, and how far its cost is from the reference SMoE's.

    Attributes:
        cost, reference_cost: from :func:`ffn_cost`, with biases, including the router.
    """

    kind: str
    dim: int
    ffn_dim: int
    num_experts: int
    top_k: int
    num_heads: int
    glu: bool
    cost: FfnCost
    reference_cost: FfnCost

    @property
    def flops_mismatch(self) -> float:
        """Relative excess of FLOPs per token over the reference, 0.01 = 1 % more."""
        return self.cost.flops_per_token / self.reference_cost.flops_per_token - 1

    @property
    def params_mismatch(self) -> float:
        """Relative excess of parameters over the reference."""
        return self.cost.num_params / self.reference_cost.num_params - 1

    @property
    def is_matched(self) -> bool:
        """Whether FLOPs and parameters, router included, both agree to :data:`TOLERANCE_PERCENT`."""
        return round(100 * _worst(self)) <= TOLERANCE_PERCENT


def match_ffn(
    kind: str,
    dim: int,
    reference_ffn_dim: int,
    reference_num_experts: int,
    reference_top_k: int = 1,
    num_heads: int = 1,
    top_k: int = 1,
    match: str = "flops",
    glu: bool = False,
    *,
    num_experts_multiple: int = 1,
    num_projections: int = 2,
    sub_ln: bool = False,
) -> FfnShape:
    """Sizes of a layer of ``kind`` that costs what the reference SMoE layer costs.

    Args:
        kind: ``dense``, ``smoe``, ``xmoe`` (cosine router), ``fine_grained``, ``mhmoe``, or ``mhmoe_head_parallel``
            (each head has a router and experts of its own).
        dim: token width d.
        reference_ffn_dim, reference_num_experts, reference_top_k: f0, E0 and k0 of the reference SMoE.
        num_heads: h of ``mhmoe`` and ``mhmoe_head_parallel``; ignored by the other kinds.
        top_k: k of these and of ``fine_grained``; the other kinds have the reference's.
        match: ``flops`` matches FLOPs and parameters (arXiv 2411.16205); ``params`` matches parameters only, as the
            first paper did (arXiv 2404.15045: E = E0, f = 4 b h d with b = 1 - 1/(4 E0)), at about h times the
            expert FLOPs; ``none`` takes the reference sizes as they are.
        glu: experts with three matrices.
        num_experts_multiple: round the number of experts to a multiple of this (the expert-parallel degree).
        num_projections: linear layers in head and merge layers together.
        sub_ln: experts normalise their hidden activation.

    A dense layer can match FLOPs only; it gets the width of the reference's active experts, k0 f0.

    Returns:
        Sizes, with the remaining mismatch; whether that is acceptable is for the caller to decide
        (:attr:`FfnShape.is_matched`).

    Raises:
        ValueError: unknown kind or match, more choices than experts, experts that heads cannot share out evenly, or a
            reference too small to pay for head and merge layers.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    if match not in MATCHES:
        raise ValueError(f"match={match!r} must be one of {', '.join(MATCHES)}")
    if not 1 <= reference_top_k <= reference_num_experts:
        raise ValueError(
            f"reference_top_k={reference_top_k} must lie between 1 and reference_num_experts={reference_num_experts}"
        )
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be positive")
    reference = ffn_cost("smoe", dim, reference_ffn_dim, reference_num_experts, reference_top_k, glu=glu, sub_ln=sub_ln)

    def shape(ffn_dim: int, num_experts: int, top_k: int, num_heads: int = 1) -> FfnShape:
        num_pools = num_heads if kind == "mhmoe_head_parallel" else 1
        if num_experts % num_pools:
            raise ValueError(
                f"num_heads={num_heads} must divide num_experts={num_experts}: each head has experts of its own"
            )
        if top_k > num_experts // num_pools:
            of_what = "num_experts" if num_pools == 1 else "the experts of a head"
            raise ValueError(f"top_k={top_k} must be at most {of_what}={num_experts // num_pools}")
        cost = ffn_cost(
            kind, dim, ffn_dim, num_experts, top_k, num_heads, glu=glu, num_projections=num_projections, sub_ln=sub_ln
        )
        return FfnShape(kind, dim, ffn_dim, num_experts, top_k, num_heads, glu, cost, reference)

    if kind == "dense":
        return shape(reference_ffn_dim * (1 if match == "none" else reference_top_k), 1, 1)
    if kind in ("smoe", "xmoe"):
        return shape(reference_ffn_dim, reference_num_experts, reference_top_k)
    if kind in MULTI_HEAD_KINDS and (num_heads < 1 or dim % num_heads):
        raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
    heads = num_heads if kind in MULTI_HEAD_KINDS else 1
    if match == "none":
        return shape(reference_ffn_dim, reference_num_experts, top_k, heads)
    if kind in MULTI_HEAD_KINDS and match == "params":
        # The first paper's width is for f0 = 4d; written with f0 it holds for any reference.
        width = num_heads * reference_ffn_dim * (1 - num_projections / (8 * reference_num_experts))
        return shape(_round_to(width, 8), reference_num_experts, top_k, num_heads)
    overhead = 0.0 if kind == "fine_grained" else num_projections / 2 * dim * (2 / 3 if glu else 1.0)
    width = (reference_top_k * reference_ffn_dim - overhead) / top_k
    if width < 8:
        raise ValueError(
            f"reference_ffn_dim={reference_ffn_dim} with reference_top_k={reference_top_k} leaves an expert width of "
            f"{width:.0f} for top_k={top_k} after head and merge layers of dim={dim}: use a wider reference"
        )
    min_experts = top_k
    if kind == "mhmoe_head_parallel":
        num_experts_multiple, min_experts = math.lcm(num_experts_multiple, num_heads), top_k * num_heads
    candidates = [
        shape(ffn_dim, num_experts, top_k, heads)
        for ffn_dim in _widths(width)
        for num_experts in _counts(
            heads * (reference_num_experts * reference_ffn_dim - overhead) / ffn_dim,
            num_experts_multiple,
            min_experts,
        )
    ]
    for candidate in candidates:
        if candidate.is_matched:
            return candidate
    return min(candidates, key=_worst)


def _worst(shape: FfnShape) -> float:
    return max(abs(shape.flops_mismatch), abs(shape.params_mismatch))


def _widths(width: float) -> Iterator[int]:
    """Widths near ``width`` in order of preference: coarse multiples first, then neighbours, down to half of it, that
    make up for the cost of a larger router. The closed form leaves that out, and many narrow experts make it large."""
    for multiple in _MULTIPLES:
        yield _round_to(width, multiple)
    nearest = _round_to(width, 8)
    for step in range(1, max(9, nearest // 16 + 1)):
        yield max(8, nearest - 8 * step)
        yield nearest + 8 * step


def _counts(num_experts: float, multiple: int, min_experts: int) -> Iterator[int]:
    nearest = _round_to(num_experts, multiple)
    for count in (nearest, nearest - multiple, nearest + multiple):
        if count >= max(min_experts, multiple):
            yield count


def _round_to(value: float, multiple: int) -> int:
    return max(multiple, int(value / multiple + 0.5) * multiple)
