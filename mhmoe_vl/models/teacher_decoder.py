"""From visual codes to a teacher's features: the part of VQ-KD that is thrown away after training.

Shape suffixes: B images, P patches, C width of a code, D width, F features of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.encoder import Block, initial_std
from mhmoe_vl.models.streams import Streams


class TeacherDecoder(nn.Module):
    """Dense blocks of the encoder's width over the quantised patches, and a head of linear, tanh, linear (BEiT v2,
    arXiv 2208.06366, section 2.2 and released code).

    A deeper decoder reconstructs better and leaves more to itself: codes are used less evenly.

    What is common to all features is added at the end, and known from the first step on (not in BEiT v2). Else it is
    what gradients ask for first, from all patches alike, and small models on few steps answer by giving all of them
    one and the same code.

    Args:
        model: of the encoder, whose sizes it shares.
        depth: number of blocks; BEiT v2 has 1 and 3.
        num_features: width of the teacher's features.
    """

    mean_F: Tensor

    def __init__(self, model: ModelConfig, *, code_dim: int, depth: int, num_features: int) -> None:
        super().__init__()
        dense = model.model_copy(update={"ffn": "dense", "depth": depth, "vl_ffn_layers": 0})
        self.input = nn.Linear(code_dim, model.dim)
        self.positions = nn.Parameter(torch.empty(1, model.num_patches, model.dim))
        self.blocks: Sequence[Block] = nn.ModuleList(Block(dense, layer) for layer in range(depth))  # type: ignore[assignment]
        self.norm = nn.LayerNorm(model.dim)
        self.head = nn.Sequential(nn.Linear(model.dim, model.dim), nn.Tanh(), nn.Linear(model.dim, num_features))
        self.register_buffer("mean_F", torch.zeros(num_features))
        std = initial_std(model.dim)
        nn.init.trunc_normal_(self.positions, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, quantized_BPC: Tensor) -> Tensor:
        """Predicted features ``[B, P, F]``."""
        x_BPD = self.input(quantized_BPC) + self.positions
        streams = Streams(x_BPD, x_BPD[:, :0])
        for block in self.blocks:
            streams, _, _ = block(streams, None, None, False, None, None)
        # Features that are as large as a head gives them at the start.
        return self.head(self.norm(streams.vision)) + math.sqrt(len(self.mean_F)) * self.mean_F
