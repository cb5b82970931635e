"""The simplest visual tokenizer: the nearest of K mean patches. Kept as a baseline for learned tokenizers.

Shape suffixes: B images, P patches, C values of a patch (3 * patch_size^2), K codes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mhmoe_vl.errors import DataError
from mhmoe_vl.models.embeddings import normalize_pixels
from mhmoe_vl.models.tensor_bytes import tensor_bytes

FORMAT = "mhmoe_vl/visual-codebook/1"

# 8192 codes and the patches of 256 images would make a matrix of 1.6 GB.
_MAX_DISTANCES = 2**24


class VisualCodebook(nn.Module):
    """Assigns each patch the number of its nearest code (squared Euclidean distance between pixel values in [-1, 1]).

    Args:
        codes_KC: float32 codes.
        patch_size: side of a patch in pixels.
    """

    codes_KC: Tensor

    def __init__(self, codes_KC: Tensor, patch_size: int) -> None:
        super().__init__()
        if codes_KC.ndim != 2 or codes_KC.shape[1] != 3 * patch_size**2:
            raise ValueError(f"codes of shape {tuple(codes_KC.shape)} do not fit patches of {patch_size} px")
        self.patch_size = patch_size
        # The codebook is part of the targets, not of the model: it stays out of checkpoints and optimizers.
        self.register_buffer("codes_KC", codes_KC.float(), persistent=False)

    @property
    def num_codes(self) -> int:
        return self.codes_KC.shape[0]

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Codes of every patch, int64 ``[B, P]``, row by row; ``image`` is uint8 ``[B, 3, H, W]``."""
        return self.nearest(to_patches(normalize_pixels(image), self.patch_size))

    @torch.no_grad()
    def nearest(self, patches_BPC: Tensor) -> Tensor:
        """The number of the nearest code, int64 ``[B, P]``; in float32 whatever the precision around it."""
        norm_K = self.codes_KC.square().sum(-1)
        # argmin |x - c|^2 = argmin |c|^2 - 2 x.c: no [B, P, K, C] tensor, and of [B, P, K] a part at a time.
        parts = patches_BPC.flatten(0, 1).split(max(1, _MAX_DISTANCES // self.num_codes))
        with torch.autocast(patches_BPC.device.type, enabled=False):
            nearest = [torch.addmm(norm_K, part, self.codes_KC.T, alpha=-2).argmin(-1) for part in parts]
        return torch.cat(nearest).unflatten(0, patches_BPC.shape[:2])

    @torch.no_grad()
    def decode(self, codes_BP: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image of mean patches, float in [-1, 1], ``[B, 3, H, W]``."""
        return patches_to_image(self.codes_KC[codes_BP], self.patch_size, grid)

    def serialized(self) -> bytes:
        """Content of the safetensors file that :meth:`load` reads; the same bytes at every call."""
        metadata = {"format": FORMAT, "config": json.dumps({"patch_size": self.patch_size})}
        return tensor_bytes({"codes": self.codes_KC.contiguous()}, metadata)

    @staticmethod
    def load(path: Path) -> VisualCodebook:
        """Read a codebook.

        Raises:
            DataError: no such file, or not a codebook.
        """
        if not path.is_file():
            raise DataError(f"{path}: no such visual codebook; make one with python -m data_prep.fit_visual_codebook")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise DataError(f"{path}: is not a visual codebook ({FORMAT})")
                return VisualCodebook(file.get_tensor("codes"), json.loads(metadata["config"])["patch_size"])
        except SafetensorError as error:
            raise DataError(f"{path}: not readable as safetensors: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: damaged header ({error!r}); fit the codebook again") from None


def to_patches(image_B3HW: Tensor, patch_size: int) -> Tensor:
    """Non-overlapping patches ``[B, P, 3 * patch_size^2]``, row by row, channels first within a patch."""
    grid = image_B3HW.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return grid.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def patches_to_image(patches_BPC: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The image ``[B, 3, H, W]`` that :func:`to_patches` has cut into ``grid`` rows and columns."""
    patches = patches_BPC.unflatten(-1, (3, patch_size, patch_size)).unflatten(1, grid)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
