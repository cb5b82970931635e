"""Initial weights part by part: what two models share starts alike, whatever else they are made of.

A comparison of feed-forward layers should not compare initialisations too. If all weights came from one sequence of
random numbers, a layer that draws more of them than another would change every weight behind it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def draw_key() -> int:
    """What all weights of a model follow from: one number of torch's generator."""
    # Named, because inside torch.device("meta") it would have no value.
    return int(torch.randint(2**62, (), device="cpu"))


@contextmanager
def random_numbers_of(key: int, part: str) -> Iterator[None]:
    """Inside, random numbers of the CPU depend on ``key`` and ``part`` alone; outside, on nothing inside."""
    digest = hashlib.sha256(f"{key}/{part}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the GPUs, which are not put back.
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
