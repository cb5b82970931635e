"""From pixels and token ids to the two streams.

Shape suffixes: B samples, P patches, L text tokens, D width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Normalization = Literal["half", "imagenet"]
#: Mean and standard deviation of each channel over ImageNet, of pixels from 0 to 1.
_IMAGENET = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))


class VisionEmbedding(nn.Module):
    """Patches, a class token and learned positions; masked patches become a learned token.

    Images of another size than ``image_size`` get bicubically resized positions.
    """

    def __init__(self, dim: int, image_size: int, patch_size: int, normalization: Normalization = "half") -> None:
        super().__init__()
        self.patch_size, self.normalization = patch_size, normalization
        self.grid = image_size // patch_size
        self.patches = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + self.grid**2, dim))

    def reset_parameters(self, std: float) -> None:
        for parameter in (self.patches.weight, self.class_token, self.mask_token, self.positions):
            nn.init.trunc_normal_(parameter, std=std)
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor, mask_BP: Tensor | None = None, *, blind: bool = False) -> Tensor:
        """Tokens ``[B, 1 + P, D]``, class token first.

        Args:
            image: uint8 ``[B, 3, H, W]``, or float that is normalised already.
            mask_BP: bool, True where the patch is hidden, row by row.
            blind: keep the class token only, as if there were no image.

        Raises:
            ValueError: the patch size does not divide the image.
        """
        if image.shape[-2] % self.patch_size or image.shape[-1] % self.patch_size:
            raise ValueError(
                f"image of {tuple(image.shape[-2:])} pixels is not a multiple of {self.patch_size}-px patches"
            )
        class_token = self.class_token.expand(image.shape[0], -1, -1)
        if blind:
            return class_token + self.positions[:, :1]
        grid = (image.shape[-2] // self.patch_size, image.shape[-1] // self.patch_size)
        pixels = normalize_pixels(image, self.normalization)
        x_BPD = self.patches(pixels.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        if mask_BP is not None:
            x_BPD = torch.where(mask_BP[..., None], self.mask_token.to(x_BPD.dtype), x_BPD)
        return torch.cat([class_token.to(x_BPD.dtype), x_BPD], dim=1) + self._positions_for(grid)

    def _positions_for(self, grid: tuple[int, int]) -> Tensor:
        return self.positions if grid == (self.grid, self.grid) else resize_positions(self.positions, grid)


class TextEmbedding(nn.Module):
    """Token embedding plus learned positions; padding gives zeros, as in BEiT-3.

    Args:
        learned_positions: False leaves positions to the attention.
    """

    def __init__(self, dim: int, vocab_size: int, max_length: int, *, learned_positions: bool = True) -> None:
        super().__init__()
        self.max_length = max_length
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions: nn.Parameter | None
        self.register_parameter(
            "positions", nn.Parameter(torch.empty(1, max_length, dim)) if learned_positions else None
        )

    def reset_parameters(self, std: float) -> None:
        nn.init.trunc_normal_(self.tokens.weight, std=std)
        if self.positions is not None:
            nn.init.trunc_normal_(self.positions, std=std)

    def forward(
        self,
        ids_BL: Tensor,
        valid_BL: Tensor | None = None,
        *,
        first_position: int = 0,
        positions_BL: Tensor | None = None,
    ) -> Tensor:
        """``[B, L, D]``.

        Args:
            ids_BL: token ids.
            valid_BL: False for padding.
            first_position: position of the first token, when decoding step by step.
            positions_BL: int64, the position of every token where they do not simply count up, as in packed rows.

        Raises:
            ValueError: the text is longer than the table of positions.
        """
        x_BLD = self.tokens(ids_BL)
        end = first_position + ids_BL.shape[1]
        if positions_BL is None and end > self.max_length:
            raise ValueError(f"text of {end} tokens exceeds max_text_length={self.max_length}")
        if self.positions is not None:
            if positions_BL is None:
                x_BLD = x_BLD + self.positions[:, first_position:end]
            else:
                x_BLD = x_BLD + F.embedding(positions_BL, self.positions[0])
        return x_BLD if valid_BL is None else torch.where(valid_BL[..., None], x_BLD, 0.0)


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bicubically resize a square table ``[1, 1 + side^2, D]``, class token first, to ``grid`` rows and columns."""
    of_class, of_patches = positions[:, :1], positions[:, 1:]
    side = math.isqrt(of_patches.shape[1])
    square = of_patches.transpose(1, 2).unflatten(2, (side, side))
    resized = F.interpolate(square.float(), size=grid, mode="bicubic", align_corners=False)
    return torch.cat([of_class, resized.flatten(2).transpose(1, 2).to(of_patches.dtype)], dim=1)


def normalize_pixels(image: Tensor, normalization: Normalization = "half") -> Tensor:
    """uint8 ``[..., 3, H, W]`` to floats: ``half`` to [-1, 1], mean and standard deviation 0.5 as BEiT-3 has them in
    general; ``imagenet`` by the statistics of ImageNet, as it has them for that task. Floats pass through."""
    if image.dtype != torch.uint8:
        return image
    if normalization == "half":
        return image.float().div(127.5).sub(1.0)
    channels = [
        channel.float().div(255).sub(mean).div(std)
        for channel, (mean, std) in zip(image.unbind(-3), _IMAGENET, strict=True)
    ]
    return torch.stack(channels, dim=-3)
