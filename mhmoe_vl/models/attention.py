"""Self-attention over the joint sequence, with projections and norms per modality.

Shape suffixes: B samples, L queries, S keys, D width, H heads, C width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhmoe_vl.models.streams import Multiway, Streams


class KeyValues(NamedTuple):
    """Keys and values ``[B, H, S, C]`` of one layer, for decoding step by step."""

    keys: Tensor
    values: Tensor

    def extended(self, newer: KeyValues) -> KeyValues:
        return KeyValues(torch.cat([self.keys, newer.keys], dim=2), torch.cat([self.values, newer.values], dim=2))

    def index_select(self, rows: Tensor) -> KeyValues:
        return KeyValues(self.keys.index_select(0, rows), self.values.index_select(0, rows))


class Attention(nn.Module):
    """Multi-head attention with a norm before the output projection (Magneto's sub-LN, arXiv 2210.06423)."""

    def __init__(
        self, dim: int, num_heads: int, modalities: Sequence[str], *, shared: bool = False, sub_ln: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Multiway(lambda: nn.Linear(dim, 3 * dim), modalities, shared=shared)
        self.norm = Multiway(lambda: nn.LayerNorm(dim) if sub_ln else nn.Identity(), modalities, shared=shared)
        self.out = Multiway(lambda: nn.Linear(dim, dim), modalities, shared=shared)

    def forward(
        self, streams: Streams, mask: Tensor | None = None, past: KeyValues | None = None
    ) -> tuple[Streams, KeyValues]:
        """Attend from every token to every token that ``mask`` allows.

        Args:
            mask: bool, broadcastable to ``[B, H, L, S]``, True where a query may look; None allows all.
            past: keys and values in front of those of ``streams``.

        Returns:
            The attended streams, and the keys and values of ``streams`` alone.
        """
        num_vision = streams.vision.shape[1]
        qkv_BLD = self.qkv(streams).joined()
        q_BHLC, k_BHLC, v_BHLC = qkv_BLD.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        present = KeyValues(k_BHLC, v_BHLC)
        seen = present if past is None else past.extended(present)
        y_BHLC = F.scaled_dot_product_attention(q_BHLC, seen.keys, seen.values, attn_mask=mask)
        y = Streams.split(y_BHLC.transpose(1, 2).flatten(2), num_vision)
        return self.out(self.norm(y)), present
