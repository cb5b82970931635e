"""Sub-token divergence: over how many different experts the parts of one token are spread.

Shape suffixes: T tokens, H sub-tokens per token, K choices per sub-token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DivergenceFigures:
    """Of one pool and modality.

    Attributes:
        num_tokens: tokens behind it.
        mean: distinct experts per token.
        by_chance: what the mean would be if sub-tokens chose independently of one another with the pool's load.
        smallest, largest: that there can be.
        histogram: share of the tokens with ``smallest``, ``smallest + 1``, ... ``largest`` distinct experts.
    """

    num_tokens: int
    mean: float
    by_chance: float
    smallest: int
    largest: int
    histogram: list[float]


def distinct_experts(experts_THK: Tensor) -> Tensor:
    """Number of different experts among the ``h k`` choices of each token, int64 ``[T]``.

    arXiv 2404.15045 counts them for k = 1 and averages over layers. Its claim is that words of several meanings and
    patches of rich texture are spread over more experts.
    """
    sorted_TC = experts_THK.flatten(1).sort(-1).values
    return 1 + (sorted_TC.diff(dim=-1) != 0).sum(-1)


def is_constant(*, num_heads: int, num_pools: int) -> bool:
    """Whether the number is the same for every token: k if there is one sub-token, whose choices always differ; ``h k``
    if each head has experts of its own."""
    return num_heads == 1 or num_pools > 1


def expected_distinct(share_E: Tensor, *, num_heads: int, top_k: int) -> float:
    """``sum_e 1 - (1 - k p_e)^h``: distinct experts if sub-tokens chose independently, each expert e with ``k p_e``.

    Sub-tokens that are alike are spread over fewer; what is above it is spread more evenly than by chance.
    """
    chosen_E = (top_k * share_E.double()).clamp(max=1)
    return float((1 - (1 - chosen_E) ** num_heads).sum())


class Divergence:
    """Running histogram of :func:`distinct_experts`."""

    def __init__(self, *, num_experts: int, num_heads: int, top_k: int) -> None:
        self.num_heads, self.top_k = num_heads, top_k
        self.largest = min(num_experts, num_heads * top_k)
        self.counts = torch.zeros(self.largest + 1, dtype=torch.long)

    def add(self, distinct_T: Tensor) -> None:
        self.counts += torch.bincount(distinct_T, minlength=self.largest + 1).cpu()

    def figures(self, share_E: Tensor) -> DivergenceFigures | None:
        """Of all tokens so far, None without any.

        Args:
            share_E: load shares of the same rows.
        """
        num_tokens = int(self.counts.sum())
        if num_tokens == 0:
            return None
        mean = float((self.counts * torch.arange(self.largest + 1)).sum() / num_tokens)
        return DivergenceFigures(
            num_tokens=num_tokens,
            mean=mean,
            by_chance=expected_distinct(share_E, num_heads=self.num_heads, top_k=self.top_k),
            smallest=self.top_k,
            largest=self.largest,
            histogram=[count / num_tokens for count in self.counts[self.top_k :].tolist()],
        )
