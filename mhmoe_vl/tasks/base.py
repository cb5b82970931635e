"""What every task shares: its contract with the training loop, and the auxiliary losses of the expert layers.

The loss of a micro-batch is this rank's *share* of the loss of the whole step: sums over its own samples, divided by
counts over all ranks and all micro-batches. Shares add up, so gradients are summed over ranks and micro-batches, and
the result does not depend on how a step is cut up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mhmoe_vl.data.batch import Batch
from mhmoe_vl.distributed.collectives import all_reduce_sum
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.encoder import MultiwayEncoder
from mhmoe_vl.models.feed_forward import LayerRouting
from mhmoe_vl.models.initialization import draw_key, random_numbers_of
from mhmoe_vl.moe import MoE, MultiHeadMoE, Routing, RoutingStats, balance_loss, routing_stats, z_loss
from mhmoe_vl.moe.losses import expert_load

MicroBatch = Mapping[str, Batch]


@dataclass
class TaskOutput:
    """Result of one micro-batch on one rank.

    Attributes:
        loss: this rank's share, to be differentiated.
        sums, counts: for each reported figure its sum and the number of things summed over, detached. A figure is the
            quotient after adding up over micro-batches and ranks.
        shares: figures that are already divided: they only add up over the micro-batches and ranks of a step.
        routing: statistics per expert pool and modality, named ``block3/vision`` or ``block3/shared/text``.
        load_E: per expert pool, choices per expert over all ranks; for loss-free balancing.
        usage_K: per codebook, how often each code was chosen; figures of their use follow from the whole sum.
    """

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict)
    routing: dict[str, RoutingStats] = field(default_factory=dict)
    load_E: dict[str, Tensor] = field(default_factory=dict)
    usage_K: dict[str, Tensor] = field(default_factory=dict)

    def record(self, figure: str, total: Tensor, count: Tensor) -> None:
        """Add ``total`` over ``count`` things to a figure."""
        self.sums[figure] = self.sums.get(figure, 0) + total.detach()
        self.counts[figure] = self.counts.get(figure, 0) + count


class Task(nn.Module, ABC):
    """An encoder with the heads of one task.

    Attributes:
        encoder: shared by all tasks; its weights move from pretraining to fine-tuning.
        step: steps of the run before this one; the training loop sets it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.step = 0
        # The random numbers of the heads do not depend on how many the encoder takes.
        with random_numbers_of(draw_key(), "encoder"):
            self.encoder = MultiwayEncoder(config)

    @abstractmethod
    def num_targets(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        """How many predictions of each objective these micro-batches ask for, on this rank; all are summed over
        ranks before :meth:`forward` divides by them."""

    @abstractmethod
    def forward(self, batches: MicroBatch, totals: Mapping[str, float], num_micro_batches: int = 1) -> TaskOutput:
        """This rank's share of the step's loss.

        Args:
            batches: one batch per source, perhaps with no samples.
            totals: :meth:`num_targets` of the step over all ranks.
            num_micro_batches: of the step; the balance loss is averaged over them.
        """

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters outside the encoder, or a part of these, which fine-tuning may give a larger learning rate."""
        inside = set(self.encoder.parameters())
        return [parameter for parameter in self.parameters() if parameter not in inside]

    def add_auxiliary_losses(
        self, output: TaskOutput, routings: Sequence[LayerRouting], num_micro_batches: int
    ) -> TaskOutput:
        """Add balance and z-loss of all expert pools (mean over pools) and record how experts were used.

        A pool that several forward passes went through is one batch for its balance loss: counts are summed over
        passes and over ranks first.
        """
        pools: dict[str, list[LayerRouting]] = {}
        for routing in routings:
            pools.setdefault(routing.name, []).append(routing)
        if not pools:
            return output
        loads = _global_loads({name: [item.routing for item in group] for name, group in pools.items()})
        moe = self.config.moe
        balance, z = output.loss.new_zeros(()), output.loss.new_zeros(())
        for name, group in pools.items():
            for item in group:
                balance = balance + balance_loss(item.routing, global_load_E=loads[name])
                z = z + z_loss(item.routing, global_load_E=loads[name])
                for modality, of_modality in item.by_modality().items():
                    key = item.name_of(modality)
                    stats = routing_stats(of_modality)
                    output.routing[key] = output.routing[key] + stats if key in output.routing else stats
        scale = 1 / (len(pools) * num_micro_batches)
        output.loss = output.loss + scale * (moe.balance_weight * balance + moe.z_weight * z)
        output.load_E = loads
        output.shares["balance"] = balance.detach() * scale
        return output

    @property
    def has_started(self) -> bool:
        """Whether the task is ready for its first step, or wants :meth:`start` to see its data before."""
        return True

    def start(self, outputs: Sequence[TaskOutput]) -> None:
        """Get ready with what :meth:`forward` made, without gradients, of this rank's part of the first step.
        Collective."""

    def after_step(self, outputs: Sequence[TaskOutput]) -> None:
        """Change what no gradient changes, after an optimizer step; a step that was skipped never comes here.
        Collective.

        Args:
            outputs: of this rank's micro-batches of the step; figures may still be recorded.
        """
        loads: dict[str, Tensor] = {}
        for output in outputs:
            for name, load in output.load_E.items():
                loads[name] = loads[name] + load if name in loads else load
        self.update_selection_bias(loads)

    @torch.no_grad()
    def update_selection_bias(self, load_E: Mapping[str, Tensor]) -> None:
        """Loss-free balancing, if it is switched on."""
        rate = self.config.moe.selection_bias_rate
        if rate == 0:
            return
        for layer, block in enumerate(self.encoder.blocks):
            for pool, ffn in block.ffn.pools.items():
                moe = ffn.moe if isinstance(ffn, MultiHeadMoE) else ffn
                if isinstance(moe, MoE):
                    moe.router.update_selection_bias(load_E[f"block{layer}/{pool}"], rate)


def _global_loads(routings: Mapping[str, Sequence[Routing]]) -> dict[str, Tensor]:
    """Choices per expert and pool over all passes and ranks, with a single reduction."""
    local = {name: torch.stack([expert_load(r) for r in group]).sum(0) for name, group in routings.items()}
    reduced = all_reduce_sum(torch.cat(list(local.values())))
    return dict(zip(local, reduced.split([load.numel() for load in local.values()]), strict=True))


def at_least_float32(logits: Tensor) -> Tensor:
    """``logits`` in float32, or in float64 if that is what they are: losses are not taken in 16 bits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def masked_cross_entropy(
    head: nn.Module, hidden_BLD: Tensor, targets_BL: Tensor, *, ignore: int = -100
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy over the positions with a target, and how many predictions were right.

    The head runs on those positions only: with a large vocabulary that is most of its cost. Float32 logits at least.
    """
    logits_NV, targets_N = masked_predictions(head, hidden_BLD, targets_BL, ignore=ignore)
    loss = nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
    return loss, (logits_NV.argmax(-1) == targets_N).sum()


def masked_predictions(
    head: nn.Module, hidden_BLD: Tensor, targets_BL: Tensor, *, ignore: int = -100
) -> tuple[Tensor, Tensor]:
    """Logits ``[N, V]`` of the N positions with a target, in float32 at least, and their targets ``[N]``."""
    chosen_BL = targets_BL != ignore
    return at_least_float32(head(hidden_BLD[chosen_BL])), targets_BL[chosen_BL]
