"""What a feed-forward layer costs: parameters, FLOPs and routing decisions per token, by formula and by counting.

Letters: d token width, h heads, w = d/h row width, f expert width, E experts, k choices, m matrices per expert
(2, or 3 for GLU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_vl.moe.routing import ROUTERS, cosine_router_dim

KINDS = ("dense", "smoe", "xmoe", "fine_grained", "mhmoe", "mhmoe_head_parallel")

#: Kinds whose experts work on sub-tokens.
MULTI_HEAD_KINDS = ("mhmoe", "mhmoe_head_parallel")


@dataclass(frozen=True)
class FfnCost:
    """Cost of one feed-forward layer.

    Attributes:
        num_params: all parameters.
        num_active_params: parameters that one token can touch: everything but the experts, and k experts for each
            sub-token (at most all of them).
        flops_per_token: forward floating-point operations of the matrix products (two per multiply-add); biases,
            activations, softmax and copies are not counted.
        num_assignments_per_token: rows that reach an expert per token, h * k.
    """

    num_params: int
    num_active_params: int
    flops_per_token: int
    num_assignments_per_token: int


def ffn_cost(
    kind: str,
    dim: int,
    ffn_dim: int,
    num_experts: int = 1,
    top_k: int = 1,
    num_heads: int = 1,
    *,
    router: str | None = None,
    glu: bool = False,
    bias: bool = True,
    sub_ln: bool = False,
    num_projections: int = 2,
) -> FfnCost:
    """Cost of a layer of ``kind`` (``dense smoe xmoe fine_grained mhmoe mhmoe_head_parallel``).

    Args:
        num_experts: of all heads together.
        router: ``linear`` or ``cosine``; by default what the kind means (cosine for ``xmoe``).
        sub_ln: the dense layer, or every expert, normalises its hidden activation.
        num_projections: linear layers of width d around the experts of multi-head kinds, head and merge together.

    Raises:
        ValueError: unknown kind or router, a size that is not positive, heads that do not divide the width, or more
            choices than experts.
    """
    _check(kind, dim, ffn_dim, num_experts, top_k, num_heads, router)
    num_matrices = 3 if glu else 2
    if kind == "dense":
        num_params = num_matrices * dim * ffn_dim
        num_params += (num_matrices - 1) * ffn_dim + dim if bias else 0
        num_params += 2 * ffn_dim if sub_ln else 0
        return FfnCost(num_params, num_params, 2 * num_matrices * dim * ffn_dim, 0)
    width = dim // num_heads
    expert_params = num_matrices * width * ffn_dim + ((num_matrices - 1) * ffn_dim + width if bias else 0)
    expert_params += 2 * ffn_dim if sub_ln else 0
    if kind == "mhmoe_head_parallel":
        # A sub-token meets the router of its own head alone.
        router_params, router_flops = width * num_experts, 2 * width * num_experts // num_heads
    elif (router or default_router(kind)) == "linear":
        router_params, router_flops = width * num_experts, 2 * width * num_experts
    else:
        router_dim = cosine_router_dim(num_experts)
        router_params = (width + num_experts) * router_dim + 1
        router_flops = 2 * (width + num_experts) * router_dim
    num_projections = num_projections if kind in MULTI_HEAD_KINDS else 0
    other_params = router_params + num_projections * (dim * dim + dim)
    flops = num_heads * (router_flops + top_k * 2 * num_matrices * width * ffn_dim)
    flops += num_projections * 2 * dim * dim
    return FfnCost(
        num_params=other_params + num_experts * expert_params,
        num_active_params=other_params + min(num_experts, num_heads * top_k) * expert_params,
        flops_per_token=flops,
        num_assignments_per_token=num_heads * top_k,
    )


def _check(kind: str, dim: int, ffn_dim: int, num_experts: int, top_k: int, num_heads: int, router: str | None) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    if router is not None and router not in ROUTERS:
        raise ValueError(f"router={router!r} must be one of {', '.join(ROUTERS)}")
    if min(dim, ffn_dim, num_experts) < 1:
        raise ValueError(f"dim={dim}, ffn_dim={ffn_dim} and num_experts={num_experts} must all be positive")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
    if kind == "mhmoe_head_parallel" and router not in (None, "linear"):
        raise ValueError(f"router={router!r}: a router per head is 'linear'")
    if kind not in MULTI_HEAD_KINDS and num_heads != 1:
        raise ValueError(f"kind={kind!r} has no sub-tokens: num_heads={num_heads} must be 1")
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide dim={dim}")


def default_router(kind: str) -> str:
    """Router that a kind means unless it is told otherwise: X-MoE is the cosine router, all others are linear."""
    return "cosine" if kind == "xmoe" else "linear"


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products of ``run()``, grouped matmuls and our own operations included.

    torch's own counter gives grouped matmuls zero FLOPs, which would make every MFU figure fiction. Where the routing
    decides how many rows an expert serves, shapes are what is counted: rows of padding and dropped choices count as
    if they were served. The ``loop`` backend alone has shapes that leave them out.
    """
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_mm_flops})
    with counter:
        run()
    return counter.get_total_flops()


def grouped_mm_flops(a_shape: Sequence[int], b_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """2-d by 3-d: rows are shared out over the groups. 2-d by 2-d: the inner dimension is. 3-d by 3-d: batched."""
    num_groups = a_shape[0] if len(a_shape) == 3 and len(b_shape) == 3 else 1
    return 2 * num_groups * a_shape[-2] * a_shape[-1] * b_shape[-1]
