"""The hidden state of a multiway encoder: one tensor per modality, and modules that treat each in its own way.

Spans are never written into modules: the two streams travel side by side and only attention joins them. A modality
that is absent is a stream of length zero, so every module runs in every forward pass, which sharded data parallelism
relies on: parameters that some ranks skip would get silently wrong gradients.

Shape suffixes: B samples, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Streams(NamedTuple):
    """Image tokens ``[B, Lv, D]`` (class token first) and text tokens ``[B, Lt, D]``; a length may be zero."""

    vision: Tensor
    text: Tensor

    def joined(self) -> Tensor:
        """``[B, Lv + Lt, D]``: image tokens, then text tokens."""
        return torch.cat([self.vision, self.text], dim=1)

    @staticmethod
    def split(joined_BLD: Tensor, num_vision: int) -> Streams:
        return Streams(joined_BLD[:, :num_vision], joined_BLD[:, num_vision:])

    def __add__(self, other: object) -> Streams:
        if not isinstance(other, Streams):
            return NotImplemented
        return Streams(self.vision + other.vision, self.text + other.text)

    def scaled(self, factor: Tensor) -> Streams:
        """Each sample of both streams multiplied by its factor ``[B]``; or each token by its own ``[B, Lt]``, if there
        is text alone."""
        factor = factor.to(self.text.dtype)
        if factor.dim() == 2:
            return Streams(self.vision, self.text * factor[..., None])
        factor_B11 = factor[:, None, None]
        return Streams(self.vision * factor_B11, self.text * factor_B11)


class Multiway(nn.Module):
    """One module per modality (BEiT-3), or one shared by all.

    Args:
        make: builds one copy.
        modalities: which copies exist; a stream without a copy must be empty and stays empty.
    """

    def __init__(self, make: Callable[[], nn.Module], modalities: Sequence[str], *, shared: bool = False) -> None:
        super().__init__()
        self.is_shared = shared
        if shared:
            self.shared = make()
        else:
            for modality in modalities:
                self.add_module(modality, make())

    def forward(self, streams: Streams) -> Streams:
        if self.is_shared:
            return Streams.split(self.shared(streams.joined()), streams.vision.shape[1])
        vision, text = self._one("vision", streams.vision), self._one("text", streams.text)
        known = vision if vision is not None else text
        assert known is not None
        # The empty stream of an absent branch is as wide as what the other branch makes.
        return Streams(known[:, :0] if vision is None else vision, known[:, :0] if text is None else text)

    def _one(self, modality: str, x_BLD: Tensor) -> Tensor | None:
        """None if there is no such branch."""
        module = self._modules.get(modality)
        if module is not None:
            return module(x_BLD)
        if x_BLD.shape[1]:
            raise ValueError(f"this encoder has no {modality} branch, but got {x_BLD.shape[1]} {modality} tokens")
        return None
