"""A small multiway model with what makes data parallelism hard: branches, stacked experts, tied weights, zero rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 6
# kind -> [rows, 2, WIDTH] of one micro-batch of one rank, or a kind that is left out altogether
Batch = dict[str, Tensor]


@dataclass
class Routing:
    """A side output that is no pytree, so FSDP2 finds no tensor in it to hang a hook on."""

    balance: Tensor


class Experts(nn.Module):
    """Soft mixture over stacked experts."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, num_experts, bias=False)
        self.up = nn.Parameter(torch.randn(num_experts, WIDTH, 5))
        self.down = nn.Parameter(torch.randn(num_experts, 5, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """``[rows, WIDTH] -> [rows, WIDTH]``."""
        gate = self.gate(x).softmax(-1)
        parts = [torch.tanh(x @ up) @ down for up, down in zip(self.up.unbind(0), self.down.unbind(0), strict=True)]
        mixed = (torch.stack(parts, -1) * gate.unsqueeze(-2)).sum(-1)
        return mixed, Routing((gate**2).sum())


class Block(nn.Module):
    """One feed-forward per modality; both run in every call, one of them maybe on zero rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.vision = Experts(3)
        self.text = nn.Sequential(nn.Linear(WIDTH, 7), nn.GELU(), nn.Linear(7, WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor, num_vision: int) -> tuple[Tensor, Routing]:
        """``x [rows, 2, WIDTH]``; the first ``num_vision`` positions are patches."""
        vision, text = (self.norm(x) + self.shift).split([num_vision, 2 - num_vision], dim=1)
        mixed, routing = self.vision(vision.reshape(-1, WIDTH))
        return x + torch.cat([mixed.view_as(vision), self.text(text)], dim=1), routing


class Toy(nn.Module):
    """A task: one forward calls the encoder once per kind of batch. The loss is a sum over samples."""

    def __init__(self, *, num_blocks: int = 2, recompute: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embedding.weight
        self.image_scale = nn.Parameter(torch.ones(WIDTH))
        self.never_used = nn.Parameter(torch.ones(3))
        self.recompute = recompute

    def forward(self, batch: Batch) -> Tensor:
        """The summed loss of all kinds in ``batch``."""
        losses = [self._loss(kind, rows) for kind, rows in batch.items()]
        return torch.stack(losses).sum()

    def _loss(self, kind: str, rows: Tensor) -> Tensor:
        num_vision = {"image": 2, "text": 0, "pair": 1}[kind]
        x = self.embedding(rows)
        balance = x.new_zeros(())
        for block in self.blocks:
            if self.recompute:
                x, routing = checkpoint(block, x, num_vision, use_reentrant=False)
            else:
                x, routing = block(x, num_vision)
            balance = balance + routing.balance
        if kind == "image":
            x = x * self.image_scale
        error = F.softplus(self.head(x)).sum()
        return error + 0.1 * balance


def make_toy(seed: int = 0, *, dtype: torch.dtype = torch.float64, **options: int | bool) -> Toy:
    """A toy whose weights depend on ``seed`` alone."""
    torch.manual_seed(seed)
    return Toy(**options).to(dtype)  # type: ignore[arg-type]


def make_rows(seed: int, num_rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[num_rows, 2, WIDTH]``."""
    return torch.randn(num_rows, 2, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_optimizer(module: nn.Module, lr: float = 0.01) -> torch.optim.AdamW:
    """AdamW with the groups of a real run: other rates and decays for vectors than for matrices."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.1, "lr_scale": 1.0},
            {"params": vectors, "weight_decay": 0.0, "lr": lr / 2, "lr_scale": 0.5},
        ],
        lr=lr,
    )
