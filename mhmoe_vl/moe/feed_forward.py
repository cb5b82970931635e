"""The dense feed-forward layer that MoE layers are compared with."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """``dim -> ffn_dim -> dim`` with exact GELU, or SwiGLU.

    Args:
        sub_ln: normalise the hidden activation before the second matrix (Magneto, arXiv 2210.06423), as BEiT-3 does.
    """

    def __init__(self, dim: int, ffn_dim: int, *, glu: bool = False, bias: bool = True, sub_ln: bool = False) -> None:
        super().__init__()
        self.glu = glu
        self.w1 = nn.Linear(dim, 2 * ffn_dim if glu else ffn_dim, bias=bias)
        self.norm = nn.LayerNorm(ffn_dim) if sub_ln else nn.Identity()
        self.w2 = nn.Linear(ffn_dim, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.w1, self.w2):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, None]:
        """``(y, None)``: the same call as an MoE layer, without a routing. ``valid`` changes nothing."""
        hidden = self.w1(x)
        if self.glu:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.gelu(hidden)
        return self.w2(self.norm(hidden)), None
