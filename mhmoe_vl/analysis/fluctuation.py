"""Routing fluctuation: how many decisions differ between two checkpoints of a model.

Shape suffixes: N rows, K choices per row, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mhmoe_vl.moe import Routing, RoutingStats, routing_stats


@dataclass(frozen=True)
class FluctuationFigures:
    """Shares, 0 to 1.

    Attributes:
        num_rows: rows (sub-tokens, under MH-MoE) behind it.
        choices: of the choices, those that the other checkpoint did not make for the same row.
        tokens: of the tokens, those of which at least one choice differs.
        by_chance: what ``choices`` would be if both drew their choices at random with their own loads.
    """

    num_rows: int
    choices: float
    tokens: float
    by_chance: float


def changed_choices(experts_NK: Tensor, other_NK: Tensor) -> Tensor:
    """How many of the K choices of each row are not among the other's ``[N]``; the order of choices does not count."""
    is_same_NK = (experts_NK[:, :, None] == other_NK[:, None, :]).any(-1)
    return (~is_same_NK).sum(-1)


class Fluctuation:
    """Running sums of the routing fluctuation of one pool and modality.

    X-MoE (arXiv 2204.09179) counts the tokens whose expert is another one than at the previous checkpoint, with one
    expert per token. With h sub-tokens and k choices the share of changed *choices* is the same thing one level down::

        1 - 1/N sum_i |A_i n B_i| / k        over the N rows, A_i and B_i the chosen sets

    which is the paper's figure if h = k = 1; ``tokens`` keeps the paper's unit, and grows with h and k.

    Only checkpoints of one run, or of runs that started from one another, can be compared: experts of independent runs
    have no common numbering, and their fluctuation is about what chance gives.
    """

    def __init__(self) -> None:
        self._num_changed = self._num_changed_tokens = self._num_rows = 0
        self._stats: tuple[RoutingStats, RoutingStats] | None = None
        self._num_heads = self._top_k = self._num_pools = 1

    def add(self, routing: Routing, other: Routing) -> None:
        """Take up the decisions of both checkpoints about the same rows."""
        changed_N = changed_choices(routing.experts_NK, other.experts_NK)
        changed_TH = changed_N.view(-1, routing.num_heads)
        if routing.valid_N is not None:
            changed_TH = changed_TH[routing.valid_N.view(-1, routing.num_heads)[:, 0]]
        self._num_changed += int(changed_TH.sum())
        self._num_changed_tokens += int((changed_TH > 0).any(-1).sum())
        self._num_rows += changed_TH.numel()
        stats = (routing_stats(routing), routing_stats(other))
        self._stats = stats if self._stats is None else (self._stats[0] + stats[0], self._stats[1] + stats[1])
        self._num_heads, self._top_k, self._num_pools = routing.num_heads, routing.top_k, routing.num_pools

    def figures(self) -> FluctuationFigures | None:
        """Of all rows so far; None without rows."""
        if self._stats is None or self._num_rows == 0:
            return None
        shares = [stats.load_share_E.double() for stats in self._stats]
        return FluctuationFigures(
            num_rows=self._num_rows,
            choices=self._num_changed / (self._num_rows * self._top_k),
            tokens=self._num_changed_tokens / (self._num_rows // self._num_heads),
            by_chance=chance_of_change(*shares, top_k=self._top_k, num_pools=self._num_pools),
        )


def chance_of_change(share_E: Tensor, other_E: Tensor, *, top_k: int, num_pools: int = 1) -> float:
    """``1 - m k sum_e p_e q_e``: expected share of changed choices if rows were routed independently with the load
    shares p and q. A row is routed among the experts of one of m pools, so it takes expert e with probability
    ``m k p_e`` if it is of its pool."""
    return max(0.0, 1 - num_pools * top_k * float((share_E * other_E).sum()))
