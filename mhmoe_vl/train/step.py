"""One optimizer step, and the figures that it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mhmoe_vl.distributed.collectives import all_reduce_sum, any_rank
from mhmoe_vl.distributed.parallel import accumulating, clip_grad_norm, unwrap
from mhmoe_vl.models.ema_codebook import perplexity
from mhmoe_vl.moe import RoutingStats
from mhmoe_vl.tasks.base import MicroBatch, Task, TaskOutput


@dataclass
class Figures:
    """Sums over micro-batches and steps on this rank; :meth:`reduced` adds up the ranks."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict)
    routing: dict[str, RoutingStats] = field(default_factory=dict)
    usage_K: dict[str, Tensor] = field(default_factory=dict)
    num_steps: int = 0

    def add(self, output: TaskOutput) -> None:
        for own, other in ((self.sums, output.sums), (self.counts, output.counts), (self.shares, output.shares)):
            for name, value in other.items():
                own[name] = own[name] + value if name in own else value
        share = output.loss.detach()
        self.shares["loss"] = self.shares["loss"] + share if "loss" in self.shares else share
        for name, stats in output.routing.items():
            self.routing[name] = self.routing[name] + stats if name in self.routing else stats
        for name, usage_K in output.usage_K.items():
            self.usage_K[name] = self.usage_K[name] + usage_K if name in self.usage_K else usage_K

    def merge(self, other: Figures) -> None:
        """Add the sums, counts and codebook use of ``other``."""
        for own, more in ((self.sums, other.sums), (self.counts, other.counts), (self.usage_K, other.usage_K)):
            for name, value in more.items():
                own[name] = own[name] + value if name in own else value

    def reduced(self) -> dict[str, float]:
        """Every figure over all ranks, in one reduction and one per codebook; the same on every rank. Collective."""
        names, share_names = sorted(self.sums), sorted(self.shares)
        if not names and not share_names:
            return {}
        local = [
            *(self.sums[n] for n in names),
            *(self.counts[n] for n in names),
            *(self.shares[n] for n in share_names),
        ]
        total = all_reduce_sum(torch.stack([value.double().cpu() for value in local])).tolist()
        sums, counts, shares = total[: len(names)], total[len(names) : 2 * len(names)], total[2 * len(names) :]
        figures = {n: value / count for n, value, count in zip(names, sums, counts, strict=True) if count}
        figures |= {n: value / max(1, self.num_steps) for n, value in zip(share_names, shares, strict=True)}
        for name in sorted(self.usage_K):
            figures |= {f"{name}_{what}": value for what, value in _use(all_reduce_sum(self.usage_K[name])).items()}
        return figures

    def expert_load(self) -> dict[str, RoutingStats]:
        """Routing statistics over all ranks. Collective."""
        reduced = {}
        for name in sorted(self.routing):
            stats = self.routing[name]
            packed = all_reduce_sum(
                torch.cat(
                    [
                        stats.load_E.double().cpu(),
                        torch.stack([stats.num_dropped, stats.gate_entropy_sum, stats.num_rows]).double().cpu(),
                    ]
                )
            )
            reduced[name] = RoutingStats(packed[:-3], packed[-3], packed[-2], packed[-1])
        return reduced


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        grad_norm: global norm before clipping.
        is_good: False if the loss or the gradient was not finite and the step was therefore skipped.
    """

    grad_norm: float
    is_good: bool


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    clip_norm: float | None,
    autocast: AbstractContextManager[object],
    figures: Figures,
) -> StepResult:
    """Forward and backward of all micro-batches, and one update if everything is finite on every rank.

    A bad step is skipped by a branch: multiplying the update with zero would still poison parameters with NaN.
    """
    task = unwrap(module)
    assert isinstance(task, Task)
    totals = global_totals(task, micro_batches)
    if not task.has_started:
        with torch.no_grad(), autocast:
            task.start([module(batches, totals, len(micro_batches)) for batches in micro_batches])
    is_finite = True
    outputs = []
    for index, batches in enumerate(micro_batches):
        with accumulating(module, is_last=index == len(micro_batches) - 1):
            with autocast:
                output = module(batches, totals, len(micro_batches))
            output.loss.backward()
        is_finite = is_finite and bool(output.loss.isfinite())
        outputs.append(output)
    norm = clip_grad_norm(module, clip_norm if clip_norm is not None else float("inf"))
    is_good = not any_rank(not (is_finite and bool(norm.isfinite())))
    if is_good:
        optimizer.step()
        task.after_step(outputs)
        for output in outputs:
            figures.add(output)
        figures.num_steps += 1
    optimizer.zero_grad(set_to_none=True)
    return StepResult(float(norm), is_good)


def _use(counts_K: Tensor) -> dict[str, float]:
    num_used = int((counts_K > 0).sum())
    share = num_used / counts_K.numel()
    return {"used": num_used, "used_share": share, "perplexity": float(perplexity(counts_K))}


def global_totals(task: Task, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
    """Predictions per objective in these micro-batches, over all ranks."""
    counts = task.num_targets(micro_batches)
    names = sorted(counts)
    reduced = all_reduce_sum(torch.tensor([counts[name] for name in names], dtype=torch.float64))
    return dict(zip(names, reduced.tolist(), strict=True))
