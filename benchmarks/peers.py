"""Other people's expert layers on the same work: sub-tokens between our head and merge layers.

Each function returns a module or raises ImportError. Adding a peer: write one more, and name it in ``benchmarks.moe``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
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


class _GShard(nn.Module):
    def __init__(self, width: int, ffn_dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, num_experts, bias=False)
        self.w1_EDF = nn.Parameter(0.02 * torch.randn(num_experts, width, ffn_dim))
        self.w2_EFD = nn.Parameter(0.02 * torch.randn(num_experts, ffn_dim, width))
        self.num_experts, self.top_k = num_experts, top_k

    def forward(self, x: Tensor) -> Tensor:
        x_ND = x[0]
        if x_ND.shape[0] > 4096:
            raise RuntimeError("one-hot dispatch of more than 4,096 rows takes gigabytes and minutes")
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
