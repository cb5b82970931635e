"""The order of training data: a pure function of seed, step and source sizes.

Sample number n of a source is item ``permutation(seed, source, epoch)[n mod size]`` of epoch ``n div size``. How many
samples each source gives to step t follows from the weights alone. Nothing else is state: a run resumes exactly from
its step number, on any number of ranks and workers, and every item is seen once per epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from mhmoe_vl.errors import ConfigError


class SampleRef(NamedTuple):
    """One item of a source in one of its epochs; of a stream, the number of the sample in the run."""

    source: str
    epoch: int
    item: int


@dataclass(frozen=True)
class MixturePlan:
    """Which items make up each step.

    Attributes:
        num_items: size of every source; None for a stream, whose samples have numbers but no places.
        weights: share of each source in a step, any positive scale.
        batch_size: samples of all sources together per step, over all ranks.
        seed: of the order.

    Raises:
        ConfigError: a source gets less than one sample per step. Largest-remainder rounding could then take back a
            sample that it has already given (the Alabama paradox).
    """

    num_items: Mapping[str, int | None]
    weights: Mapping[str, float]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        for source, share in self._shares().items():
            if self.batch_size * share < 1:
                raise ConfigError(
                    f"data.train.{source}.weight: {self.weights[source]} is {float(share):.2%} of all weights, less "
                    f"than one of the {self.batch_size} samples of a step; raise it, or data.batch_size (a smaller "
                    "data.sampling_alpha gives small sources more)"
                )

    def share(self, source: str) -> float:
        """Of each step."""
        return float(self._shares()[source])

    def num_consumed(self, step: int) -> dict[str, int]:
        """Samples that each source has given before ``step``.

        Largest-remainder rounding of ``step * batch_size * weight``: totals are exact at every step, and each source
        stays within one sample of its share.
        """
        total = step * self.batch_size
        exact = {source: total * share for source, share in self._shares().items()}
        consumed = {source: int(share) for source, share in exact.items()}
        by_remainder = sorted(exact, key=lambda source: (consumed[source] - exact[source], source))
        for source in by_remainder[: total - sum(consumed.values())]:
            consumed[source] += 1
        return consumed

    def numbers(self, step: int) -> dict[str, range]:
        """Sample numbers that each source gives to ``step``."""
        start, end = self.num_consumed(step), self.num_consumed(step + 1)
        return {source: range(start[source], end[source]) for source in self.weights}

    def micro_batch(
        self, step: int, *, index: int = 0, num_micro_batches: int = 1, rank: int = 0, world_size: int = 1
    ) -> dict[str, list[SampleRef]]:
        """This rank's part of one micro-batch of ``step``.

        A micro-batch is a fixed slice of the *global* step, shared out over the ranks: what is computed together does
        not depend on the number of ranks. Parts differ by at most one sample, of every source and altogether, and may
        be empty.
        """
        return {
            source: [self._ref(source, number) for number in numbers[(rank - first_rank) % world_size :: world_size]]
            for source, numbers, first_rank in self.deal(step, index, num_micro_batches, world_size)
        }

    def deal(self, step: int, index: int, num_micro_batches: int, world_size: int) -> Iterator[tuple[str, range, int]]:
        """Each source of a micro-batch with its sample numbers and the rank that gets the first of them; the next rank
        gets the second, and so on around the ranks.

        A source goes on where the one before it ended: with 512 samples of each of three sources, every one of 1,024
        ranks has work.
        """
        numbers = self.numbers(step)
        num_dealt = sum(len(part(of_step, i, num_micro_batches)) for of_step in numbers.values() for i in range(index))
        for source, of_step in numbers.items():
            of_micro_batch = part(of_step, index, num_micro_batches)
            yield source, of_micro_batch, num_dealt % world_size
            num_dealt += len(of_micro_batch)

    def _shares(self) -> dict[str, Fraction]:
        """Exact for the decimals that were written: three weights of 0.1 are a third each."""
        weights = {source: Fraction(str(weight)) for source, weight in self.weights.items()}
        return {source: weight / sum(weights.values()) for source, weight in weights.items()}

    def _ref(self, source: str, number: int) -> SampleRef:
        size = self.num_items[source]
        if size is None:
            return SampleRef(source, 0, number)
        epoch, position = divmod(number, size)
        return SampleRef(source, epoch, permuted(position, size, f"{self.seed}/{source}/{epoch}"))


def part(items: range, index: int, num_parts: int) -> range:
    """The ``index``-th of ``num_parts`` consecutive parts whose sizes differ by at most one."""
    return items[index * len(items) // num_parts : (index + 1) * len(items) // num_parts]


def permuted(position: int, size: int, key: str, *, num_rounds: int = 6) -> int:
    """Image of ``position`` under a pseudo-random permutation of ``range(size)`` that ``key`` names.

    A Feistel network over the next even number of bits, walked until it lands inside: constant memory however large
    the data set is.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    value = position
    while True:
        left, right = value >> half_bits, value & half_mask
        for round_number in range(num_rounds):
            left, right = right, left ^ (stable_hash(f"{key}/{round_number}/{right}") & half_mask)
        value = (left << half_bits) | right
        if value < size:
            return value


def stable_hash(text: str) -> int:
    """A 63-bit hash that is the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
