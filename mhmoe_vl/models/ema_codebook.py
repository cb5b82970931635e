"""The codebook of VQ-KD (BEiT v2, arXiv 2208.06366, section 2.2 and released code): unit vectors that follow the
patches they stand for by a moving average.

All of it is a pure function of vectors, their codes and their draws, which the caller brings together from all ranks
and micro-batches of a step. That is why the maintained library, ``vector-quantize-pytorch`` (1.32), is the oracle of
the tests and not used here:

- k-means and the updates happen inside ``forward``, on the samples of one micro-batch: micro-batches of a step would
  see different codes, and a pass that is repeated (activation checkpointing) or thrown away (a step that is not finite)
  would count. Its mode that accumulates over passes leaves out revival;
- k-means and revival draw from torch's global generator, by the number of samples of each rank: a resumed run, or one
  on another number of ranks, would get other codes;
- its codes are normalised averages of sums, so that a step counts as much as it has vectors; BEiT v2 averages the
  normalised means of steps.

Shape suffixes: N vectors (patches), K codes, C width of a code, R revived codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Of cosine k-means, as released.
KMEANS_ITERATIONS = 10
#: A revived code begins with this multiple of the usage below which it would be dead again.
_GRACE = 2.0
# Cosines of 100,000 patches with 8192 codes would make a matrix of 3.3 GB.
_MAX_COSINES = 2**24
# Squared distances of float32 unit vectors that are equal in truth.
_ROUNDING = 1e-6
# Sums of unit vectors are taken in 64-bit integers: they do not depend on the order of the terms, so neither on the
# number of ranks nor on the order in which a GPU's threads come.
_FIXED_POINT = 2.0**32


class CodeStatistics(NamedTuple):
    """What vectors say about the codes they were assigned to; statistics of parts of a step add up.

    Attributes:
        counts_K: int64, vectors of each code.
        sums_KC: int64, their sum in units of ``2 ** -32``.
    """

    counts_K: Tensor
    sums_KC: Tensor

    @staticmethod
    def of(vectors_NC: Tensor, codes_N: Tensor, num_codes: int) -> CodeStatistics:
        """Of unit vectors and the numbers of their codes."""
        fixed_NC = (vectors_NC.double() * _FIXED_POINT).round().long()
        sums_KC = fixed_NC.new_zeros(num_codes, vectors_NC.shape[1]).index_add_(0, codes_N, fixed_NC)
        return CodeStatistics(torch.bincount(codes_N, minlength=num_codes), sums_KC)

    def means_KC(self) -> Tensor:
        """The mean of each code's vectors, float32; zeros without vectors."""
        return (self.sums_KC.double() / _FIXED_POINT / self.counts_K[:, None].clamp_min(1)).float()

    def directions_KC(self, otherwise_KC: Tensor) -> Tensor:
        """The normalised mean of each code's vectors, float32; of codes without vectors, or with vectors that cancel
        out, ``otherwise_KC``."""
        return _normalized(self.means_KC(), otherwise_KC)


class EmaCodebook(nn.Module):
    """``num_codes`` unit vectors with the moving average of their use.

    Args:
        decay: of both averages; BEiT v2: 0.99.
        revival_share: a code that is used less than this share of an even use is dead; 0 revives none.
    """

    codes_KC: Tensor
    usage_K: Tensor
    num_updates: Tensor

    def __init__(self, num_codes: int, code_dim: int, *, decay: float, revival_share: float) -> None:
        super().__init__()
        self.decay, self.revival_share = decay, revival_share
        self.register_buffer("codes_KC", torch.zeros(num_codes, code_dim))
        self.register_buffer("usage_K", torch.zeros(num_codes))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @property
    def num_codes(self) -> int:
        return self.codes_KC.shape[0]

    @property
    def has_started(self) -> bool:
        """Whether there are codes yet."""
        return bool(self.num_updates > 0)

    @property
    def usage_perplexity(self) -> Tensor:
        """Of the moving average of the codes' use, float64 scalar; ``num_codes`` if all are used alike."""
        return perplexity(self.usage_K)

    @torch.no_grad()
    def assign(self, vectors_NC: Tensor) -> Tensor:
        """The code with the largest cosine to each unit vector, int64 ``[N]``."""
        return nearest_codes(vectors_NC, self.codes_KC)

    @torch.no_grad()
    def start(self, vectors_NC: Tensor) -> None:
        """Begin with the centres of cosine k-means.

        Args:
            vectors_NC: at least ``num_codes`` unit vectors, in a random order, of which all of this method's chance is
                made.
        """
        codes_KC = _spread(vectors_NC, self.num_codes)
        for _ in range(KMEANS_ITERATIONS):
            statistics = CodeStatistics.of(vectors_NC, nearest_codes(vectors_NC, codes_KC), self.num_codes)
            codes_KC = statistics.directions_KC(codes_KC)
        self.codes_KC.copy_(codes_KC)
        counts_K = torch.bincount(nearest_codes(vectors_NC, codes_KC), minlength=self.num_codes)
        # Of those vectors; the first update makes it vectors of a step.
        self.usage_K.copy_(counts_K)
        self.num_updates.fill_(1)

    @torch.no_grad()
    def update(self, statistics: CodeStatistics) -> None:
        """Follow the vectors of one step; codes without any stay where they are.

        Args:
            statistics: over all ranks and micro-batches.
        """
        averaged_KC = self.decay * self.codes_KC + (1 - self.decay) * statistics.directions_KC(self.codes_KC)
        is_used_K1 = statistics.counts_K[:, None] > 0
        self.codes_KC.copy_(torch.where(is_used_K1, _normalized(averaged_KC, self.codes_KC), self.codes_KC))
        counts_K = statistics.counts_K.to(self.usage_K.dtype)
        if self.num_updates == 1:
            # What was counted at the start came from another number of vectors.
            self.usage_K.mul_(counts_K.sum() / self.usage_K.sum())
        self.usage_K.mul_(self.decay).add_(counts_K, alpha=1 - self.decay)
        self.num_updates += 1

    def dead_codes(self) -> Tensor:
        """Numbers of the codes that are hardly used, int64."""
        return (self.usage_K < self._least_usage()).nonzero().flatten()

    @torch.no_grad()
    def revive(self, numbers_R: Tensor, vectors_RC: Tensor) -> None:
        """Give codes new places."""
        usage = _GRACE * self._least_usage()
        self.codes_KC[numbers_R] = vectors_RC
        self.usage_K[numbers_R] = usage

    def _least_usage(self) -> Tensor:
        return self.revival_share * self.usage_K.mean()


def nearest_codes(vectors_NC: Tensor, codes_KC: Tensor) -> Tensor:
    """The number of the code with the largest cosine, int64 ``[N]``; all are unit vectors."""
    parts = vectors_NC.split(max(1, _MAX_COSINES // codes_KC.shape[0]))
    return torch.cat([(part @ codes_KC.T).argmax(-1) for part in parts])


def quantization_error(vectors_NC: Tensor, codes_NC: Tensor) -> Tensor:
    """Squared distance of unit vectors from their codes, float64 ``[N]``; equal ones have none, rounding or not."""
    error_N = (2 - 2 * (vectors_NC * codes_NC).sum(-1)).double()
    return torch.where(error_N > _ROUNDING, error_N, 0.0)


def race(draws_N: Tensor, weights_N: Tensor) -> Tensor:
    """Arrival times, float64 ``[N]``: the first n to arrive are drawn without replacement in proportion to their
    weights (Efraimidis and Spirakis, 2006).

    Args:
        draws_N: random numbers in [0, 1).
        weights_N: who has none never arrives.
    """
    times_N = -torch.log1p(-draws_N.double()) / weights_N.double()
    return torch.where(weights_N > 0, times_N, torch.inf)


def perplexity(counts_K: Tensor) -> Tensor:
    """``exp`` of the entropy of ``counts_K`` as shares, float64 scalar; 0 if there are none."""
    counts_K = counts_K.double()
    total = counts_K.sum()
    return torch.special.entr(counts_K / total.clamp_min(torch.finfo(torch.float64).tiny)).sum().exp() * (total > 0)


def _normalized(vectors_KC: Tensor, otherwise_KC: Tensor) -> Tensor:
    """With length 1; ``otherwise_KC`` where there is no length, but for rounding."""
    has_length_K1 = vectors_KC.norm(dim=-1, keepdim=True) > _ROUNDING
    return torch.where(has_length_K1, F.normalize(vectors_KC, dim=-1), otherwise_KC)


def _spread(vectors_NC: Tensor, num_codes: int) -> Tensor:
    """Vectors far from each other, as k-means++ draws them: in proportion to the squared distance from those before.
    Their order is the draw, and serves again and again."""
    num_vectors = vectors_NC.shape[0]
    draws_N = (torch.arange(num_vectors, device=vectors_NC.device, dtype=torch.float64) + 0.5) / num_vectors
    distance_N = torch.ones_like(draws_N)
    chosen = []
    for _ in range(num_codes):
        # With fewer different vectors than codes, all arrive at infinity in the end: the first is taken again, and that
        # code dies.
        first = race(draws_N, distance_N).argmin()
        chosen.append(first)
        distance_N = torch.minimum(distance_N, quantization_error(vectors_NC, vectors_NC[first]))
    return vectors_NC[torch.stack(chosen)]
