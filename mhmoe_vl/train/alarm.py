"""Warnings about expert pools and codebooks that have stopped working as such."""

from __future__ import annotations

from collections.abc import Mapping

from mhmoe_vl.models.feed_forward import pool_of
from mhmoe_vl.moe import RoutingStats

#: A codebook whose use has a perplexity below this share of its codes has collapsed.
COLLAPSED_PERPLEXITY = 0.1

_REMEDY = "raise model.moe.balance_weight, or set model.moe.selection_bias_rate"


class ExpertAlarm:
    """Knows which alarms are on, and so which of them are new.

    An alarm is one of :attr:`mhmoe_vl.moe.RoutingStats.alarms` of a whole pool, over a whole log interval. It is said
    when it begins, and again only after an interval without it. A run that is resumed says once more what is on.
    """

    def __init__(self) -> None:
        self._on: set[tuple[str, str]] = set()

    def check(self, routing: Mapping[str, RoutingStats]) -> tuple[dict[str, list[str]], list[str]]:
        """Look at one interval.

        Args:
            routing: by pool and modality.

        Returns:
            The alarms that are on, by pool, and a line for each that was not on before.
        """
        alarms: dict[str, list[str]] = {}
        onsets: list[str] = []
        now: set[tuple[str, str]] = set()
        for pool, stats in whole_pools(routing).items():
            for alarm in stats.alarms:
                alarms.setdefault(pool, []).append(alarm)
                now.add((pool, alarm))
                if (pool, alarm) not in self._on:
                    onsets.append(f"{pool}: {_describe(alarm, stats)} since the last log line; {_REMEDY}")
        self._on = now
        return alarms, onsets


class CodebookAlarm:
    """Knows whether a codebook has collapsed, and whether that is new.

    Args:
        num_codes: of the codebook.
    """

    def __init__(self, num_codes: int) -> None:
        self._num_codes, self._is_on = num_codes, False

    def check(self, average_perplexity: float) -> tuple[bool, str | None]:
        """Look at the perplexity of a codebook's use, averaged over many steps.

        Returns:
            Whether the alarm is on, and a line if it was not on before.
        """
        was_on, self._is_on = self._is_on, average_perplexity < COLLAPSED_PERPLEXITY * self._num_codes
        if was_on or not self._is_on:
            return self._is_on, None
        return True, (
            f"the codebook has collapsed: its use has a perplexity of {average_perplexity:.1f}, below "
            f"{COLLAPSED_PERPLEXITY:.0%} of its {self._num_codes} codes; lower optimizer.learning_rate or lengthen "
            "optimizer.warmup_steps, lower task.codebook_decay so that codes keep up, or raise task.revival_share"
        )


def whole_pools(routing: Mapping[str, RoutingStats]) -> dict[str, RoutingStats]:
    """Statistics of every pool over the modalities that share it."""
    pools: dict[str, RoutingStats] = {}
    for name, stats in routing.items():
        pool = pool_of(name)
        pools[pool] = pools[pool] + stats if pool in pools else stats
    return pools


def _describe(alarm: str, stats: RoutingStats) -> str:
    num_experts = stats.load_E.numel()
    if alarm == "dead":
        return f"{stats.num_dead} of {num_experts} experts were never chosen"
    return (
        f"experts have collapsed: entropy of the load {stats.load_entropy:.2f} of 1, the busiest of {num_experts} has "
        f"{1 + stats.max_violation:.1f} times the mean load"
    )
