"""Stochastic depth whose decisions are a pure function of sample and branch.

Drawn from a counter-based hash instead of the global generator: a resumed run, or one on another number of ranks,
drops exactly the same branches of the same samples, and there is no generator state to save.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_factors(sample_seed_B: Tensor, num_branches: int, max_rate: float) -> Tensor:
    """Factor of every residual branch for every sample, ``[num_branches, B]`` float32: 0, or ``1 / (1 - rate)``.

    The rate grows linearly from 0 at the first branch to ``max_rate`` at the last (arXiv 1603.09382).

    Args:
        sample_seed_B: int64, one seed per sample.
    """
    rate_N1 = torch.linspace(0, max_rate, num_branches, device=sample_seed_B.device)[:, None]
    keep_NB = uniform_hash(sample_seed_B, num_branches) >= rate_N1
    return keep_NB / (1 - rate_N1)


def uniform_hash(seed_B: Tensor, num_streams: int) -> Tensor:
    """Numbers in [0, 1) with 24 random bits, ``[num_streams, B]``: SplitMix64 of (seed, stream number)."""
    stream_N1 = torch.arange(1, num_streams + 1, device=seed_B.device)[:, None]
    z_NB = seed_B[None] + stream_N1 * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
    z_NB = (z_NB ^ _shift_right(z_NB, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z_NB = (z_NB ^ _shift_right(z_NB, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    z_NB = z_NB ^ _shift_right(z_NB, 31)
    return _shift_right(z_NB, 40).float() / 2**24


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's ``>>`` copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
