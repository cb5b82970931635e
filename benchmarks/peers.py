"""Other people's expert layers on the same work: sub-tokens between our head and merge layers.

Each function returns a module or raises an error that says why it cannot. Adding a peer: write one more, and name it in
``benchmarks.moe``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class OnSubTokens(nn.Module):
    """Head layer, ``inner`` on ``[1, N, dim / num_heads]``, merge layer."""

    def __init__(self, dim: int, num_heads: int, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.merge = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.inner, self.width = inner, dim // num_heads

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.merge(self.inner(self.head(x_TD).view(1, -1, self.width)).reshape(x_TD.shape))


def hugging_face(
    dim: int, ffn_dim: int, num_experts: int, num_heads: int, top_k: int, *, implementation: str = "eager"
) -> nn.Module:
    """Mixtral's block of transformers. Its experts are SwiGLU, so two thirds of the width cost the same FLOPs."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=dim // num_heads,
        intermediate_size=2 * ffn_dim // 3 // 8 * 8,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        experts_implementation=implementation,
    )
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return OnSubTokens(dim, num_heads, block)


def gshard(dim: int, ffn_dim: int, num_experts: int, num_heads: int, top_k: int) -> nn.Module:
    """Dispatch by products with one-hot tensors and capacity 1.25 (GShard, arXiv 2006.16668): drops, and costs N^2."""
    return OnSubTokens(dim, num_heads, _GShard(dim // num_heads, ffn_dim, num_experts, top_k))


def soft_moe(dim: int, ffn_dim: int, num_experts: int, num_heads: int, top_k: int, *, num_tokens: int) -> nn.Module:
    """Phil Wang's soft-moe-pytorch (arXiv 2308.00951), with as many slots as there are choices: every slot is a mixture
    of all rows, so dispatch and combination cost N^2."""
    from soft_moe_pytorch import SoftMoE

    num_rows, width = num_tokens * num_heads, dim // num_heads
    block = SoftMoE(
        width,
        num_experts=num_experts,
        num_slots=max(1, num_rows * top_k // num_experts),
        expert_mult=ffn_dim / width,
        offload_unused_experts_to_cpu=False,
    )
    return OnSubTokens(dim, num_heads, block)


def leave_group() -> None:
    """Close the process group of :func:`torchscale_xmoe`, if there is one: whatever runs in this process next may form
    its own."""
    if dist.is_initialized():
        dist.destroy_process_group()


def torchscale_xmoe(
    dim: int, ffn_dim: int, num_experts: int, num_heads: int, top_k: int, *, num_tokens: int
) -> nn.Module:
    """torchscale's X-MoE layer: cosine router, capacity 1.0 (top-1) or 2.0 (top-2), drops. Without tutel, which the
    registry does not have, it dispatches by products with one-hot tensors."""
    from torchscale.component.feedforward_network import make_experts
    from torchscale.component.xmoe import moe_layer, routing

    if top_k > 2:
        raise ValueError(f"torchscale has gates for one and two choices, not {top_k}")
    if not moe_layer.has_tutel:
        _refuse_one_hot(num_tokens * num_heads)
    if not dist.is_initialized():
        # It asks for the size of its groups.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    width = dim // num_heads
    args = SimpleNamespace(
        moe_expert_count=num_experts,
        ddp_rank=0,
        activation_fn="gelu",
        dropout=0.0,
        activation_dropout=0.0,
        layernorm_eps=1e-5,
        subln=False,
    )
    gate = routing.Top1Gate if top_k == 1 else routing.Top2Gate
    layer = moe_layer.MOELayer(gate(width, num_experts, use_xmoe=True), make_experts(args, width, ffn_dim), args)
    return OnSubTokens(dim, num_heads, _Torchscale(layer))


class _Torchscale(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        # Its figures call histc on integers, which the CPU does not have.
        original = torch.histc
        torch.histc = lambda t, *args, **kwargs: original(t.float(), *args, **kwargs)
        try:
            return self.layer(x)[0]
        finally:
            torch.histc = original


def megablocks(dim: int, ffn_dim: int, num_experts: int, num_heads: int, top_k: int) -> nn.Module:
    """MegaBlocks' dropless layer (arXiv 2211.15841), on CUDA. Written from its documentation; never run by us."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    width = dim // num_heads
    arguments = Arguments(
        hidden_size=width,
        ffn_hidden_size=ffn_dim,
        moe_num_experts=num_experts,
        moe_top_k=top_k,
        mlp_impl="grouped",
        bf16=True,
        bias=False,
        return_bias=False,
    )
    return OnSubTokens(dim, num_heads, dMoE(arguments))


def scatter_moe(dim: int, ffn_dim: int, num_experts: int, num_heads: int, top_k: int) -> nn.Module:
    """ScatterMoE's experts (arXiv 2403.08245) behind a linear router, on CUDA. Written from its documentation; never
    run by us."""
    from scattermoe.mlp import MLP

    width = dim // num_heads
    experts = MLP(
        input_size=width, hidden_size=ffn_dim, activation=nn.GELU(), num_experts=num_experts, top_k=top_k, bias=False
    )
    return OnSubTokens(dim, num_heads, _Scatter(experts, nn.Linear(width, num_experts, bias=False), top_k))


class _Scatter(nn.Module):
    def __init__(self, experts: nn.Module, router: nn.Module, top_k: int) -> None:
        super().__init__()
        self.experts, self.router, self.top_k = experts, router, top_k

    def forward(self, x: Tensor) -> Tensor:
        weight_NK, expert_NK = self.router(x[0]).softmax(-1).topk(self.top_k, dim=-1)
        return self.experts(x[0], weight_NK, expert_NK)[None]


def _refuse_one_hot(num_rows: int) -> None:
    if num_rows > 4096:
        raise RuntimeError("one-hot dispatch of more than 4,096 rows takes gigabytes and minutes")


class _GShard(nn.Module):
    def __init__(self, width: int, ffn_dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, num_experts, bias=False)
        self.w1_EDF = nn.Parameter(0.02 * torch.randn(num_experts, width, ffn_dim))
        self.w2_EFD = nn.Parameter(0.02 * torch.randn(num_experts, ffn_dim, width))
        self.num_experts, self.top_k = num_experts, top_k

    def forward(self, x: Tensor) -> Tensor:
        x_ND = x[0]
        _refuse_one_hot(x_ND.shape[0])
        probs_NE = self.router(x_ND).softmax(-1)
        capacity = int(1.25 * self.top_k * x_ND.shape[0] / self.num_experts)
        weight_NK, expert_NK = probs_NE.topk(self.top_k, dim=-1)
        chosen_NE = F.one_hot(expert_NK, self.num_experts).sum(1)
        place_NE = chosen_NE.cumsum(0) * chosen_NE - 1
        kept_NEC = F.one_hot(place_NE.clamp(-1, capacity) + 1, capacity + 2)[..., 1:-1].to(x_ND.dtype)
        gate_NE = torch.zeros_like(probs_NE).scatter(-1, expert_NK, weight_NK)
        rows_ECD = torch.einsum("nec,nd->ecd", kept_NEC, x_ND)
        y_ECD = F.gelu(rows_ECD @ self.w1_EDF) @ self.w2_EFD
        return torch.einsum("nec,ecd->nd", kept_NEC * gate_NE[..., None], y_ECD)[None]
