"""Which floating-point type a forward pass computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_for(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 autocast if ``precision`` asks for it, or is ``auto`` on a GPU that has it; else nothing.

    Weights and optimizer state stay float32, and so does the router.
    """
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "bfloat16" or (precision == "auto" and has_bfloat16):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
