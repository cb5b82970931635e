"""Self-attention over the joint sequence, with projections and norms per modality.

Shape suffixes: B samples, L queries, S keys, D width, H heads, C width of a head, F rotated pairs of a head.
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


class Rotation(NamedTuple):
    """Cosines and sines of the angles of rotary positions, float32 ``[B or 1, 1, L, F]``."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def of_positions(positions_BL: Tensor, head_width: int, *, base: float = 10_000.0) -> Rotation:
        """Angles ``position * base ** (-f / F)`` of the ``F = head_width / 2`` pairs (arXiv 2104.09864, equation 15);
        positions are int64."""
        num_pairs = head_width // 2
        frequency_F = base ** (torch.arange(num_pairs, device=positions_BL.device, dtype=torch.float32) / -num_pairs)
        angle_B1LF = positions_BL[:, None, :, None].float() * frequency_F
        return Rotation(angle_B1LF.cos(), angle_B1LF.sin())

    def turn(self, x_BHLC: Tensor) -> Tensor:
        """Value f and value f + F of every head as a point in the plane, turned by its angle."""
        first_BHLF, second_BHLF = x_BHLC.chunk(2, dim=-1)
        turned = (first_BHLF * self.cos - second_BHLF * self.sin, second_BHLF * self.cos + first_BHLF * self.sin)
        return torch.cat(turned, dim=-1).to(x_BHLC.dtype)


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
        self,
        streams: Streams,
        mask: Tensor | None = None,
        past: KeyValues | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[Streams, KeyValues]:
        """Attend from every token to every token that ``mask`` allows.

        Args:
            mask: bool, broadcastable to ``[B, H, L, S]``, True where a query may look; None allows all.
            past: keys and values in front of those of ``streams``.
            rotation: turns queries and keys; keys of ``past`` are turned already.

        Returns:
            The attended streams, and the keys and values of ``streams`` alone.
        """
        num_vision = streams.vision.shape[1]
        qkv_BLD = self.qkv(streams).joined()
        q_BHLC, k_BHLC, v_BHLC = qkv_BLD.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q_BHLC, k_BHLC = rotation.turn(q_BHLC), rotation.turn(k_BHLC)
        present = KeyValues(k_BHLC, v_BHLC)
        seen = present if past is None else past.extended(present)
        y_BHLC = F.scaled_dot_product_attention(q_BHLC, seen.keys, seen.values, attn_mask=mask)
        y = Streams.split(y_BHLC.transpose(1, 2).flatten(2), num_vision)
        return self.out(self.norm(y)), present
