"""Task heads: modules that hold weights, nothing else.

Shape suffixes: B samples, N selected positions, L text tokens, D width, V vocabulary, A answers, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhmoe_vl.models.encoder import initial_std


class TokenHead(nn.Module):
    """Scores over a vocabulary (MLM, captions) or a visual codebook (MIM): one linear layer, as in BEiT-3.

    Args:
        tied_weight: use this ``[V, D]`` embedding instead of own weights.
    """

    def __init__(self, dim: int, num_tokens: int, tied_weight: Tensor | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_tokens)
        nn.init.trunc_normal_(self.linear.weight, std=initial_std(dim))
        nn.init.zeros_(self.linear.bias)
        if tied_weight is not None:
            self.linear.weight = tied_weight

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Logits ``[N, V]``."""
        return self.linear(hidden_ND)


class VqaHead(nn.Module):
    """Pooled class token to scores of the answer list (BEiT-3: norm, linear, tanh; then a two-layer classifier)."""

    def __init__(self, dim: int, num_answers: int) -> None:
        super().__init__()
        self.pooler = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Tanh())
        self.classifier = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), nn.Linear(2 * dim, num_answers)
        )
        _initialize(self, dim)

    def forward(self, class_token_BD: Tensor) -> Tensor:
        """Logits ``[B, A]``."""
        return self.classifier(self.pooler(class_token_BD))


class Nlvr2Head(nn.Module):
    """Class token and first text token of both passes, ``4 D`` wide, to false / true (BEiT-3).

    Args:
        input_norm: normalise these ``4 D`` values first, as the released checkpoints do.
    """

    def __init__(self, dim: int, *, input_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim) if input_norm else nn.Identity()
        output = nn.Linear(2 * dim, 2)
        self.classifier = nn.Sequential(nn.Linear(4 * dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), output)
        _initialize(self, dim)
        with torch.no_grad():
            # Starting near zero keeps the first steps from disturbing the encoder (BEiT-3's own factor).
            output.weight.mul_(1e-3)

    def forward(self, left_B2D: Tensor, right_B2D: Tensor) -> Tensor:
        """Logits ``[B, 2]`` from ``[B, 2, D]`` (class token, first text token) of each pass."""
        return self.classifier(self.norm(torch.cat([left_B2D.flatten(1), right_B2D.flatten(1)], dim=-1)))


class EmbeddingHead(nn.Module):
    """First token of an image or a text to a place on the unit sphere: one linear layer without bias (BEiT-3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        nn.init.trunc_normal_(self.linear.weight, std=initial_std(dim))

    def forward(self, first_token_BD: Tensor) -> Tensor:
        """``[B, D]`` of length 1, in float32 at least."""
        embedding_BD = self.linear(first_token_BD)
        return F.normalize(embedding_BD.to(torch.promote_types(embedding_BD.dtype, torch.float32)), dim=-1)


class ClassificationHead(nn.Module):
    """Mean of the patch tokens to scores of the classes: norm and one linear layer (BEiT-3)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, num_classes)
        _initialize(self, dim)
        with torch.no_grad():
            # As in NLVR2: BEiT-3's own factor.
            self.linear.weight.mul_(1e-3)

    def forward(self, mean_patch_BD: Tensor) -> Tensor:
        """Logits ``[B, C]``."""
        return self.linear(self.norm(mean_patch_BD))


def _initialize(head: nn.Module, dim: int) -> None:
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=initial_std(dim))
            nn.init.zeros_(module.bias)
