"""What the arms cost, and whether those that are compared cost the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mhmoe_vl.errors import ConfigError
from mhmoe_vl.moe.match import TOLERANCE_PERCENT
from mhmoe_vl.plan.workload import build_task_without_files, sample_cost, samples_of, samples_per_step
from mhmoe_vl.study.cells import Arm, Cell, Plan
from mhmoe_vl.tasks.base import Task
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.cost import encoder_cost_of


@dataclass(frozen=True)
class ArmCost:
    """Cost of one arm in one task, by formula (:mod:`mhmoe_vl.models.cost`).

    Attributes:
        num_params: of the whole model, heads included.
        num_active_params: of the encoder's blocks, that one token can touch.
        flops_per_token: forward FLOPs of the blocks per token.
        num_assignments_per_token: rows that reach an expert per token in a sparse block.
        num_tokens_per_sample: mean over the samples of a step, padding included.
        training_flops_per_step: forward and backward passes of a whole step, heads included.
        layer: sizes of the sparse blocks' feed-forward layer, in words.
    """

    num_params: int
    num_active_params: int
    flops_per_token: int
    num_assignments_per_token: int
    num_tokens_per_sample: float
    training_flops_per_step: int
    layer: str


@dataclass(frozen=True)
class Mismatch:
    """Relative excess of an arm's cost over its reference's, 0.01 = 1 % more; asserted where ``demanded`` says so."""

    task: str
    arm: str
    reference: str
    flops: float
    active_params: float
    params: float
    demanded: tuple[str, ...]

    @property
    def violations(self) -> list[str]:
        values = {"FLOPs per token": self.flops, "active parameters": self.active_params, "parameters": self.params}
        demanded = {
            "FLOPs per token": "flops" in self.demanded,
            "active parameters": "flops" in self.demanded,
            "parameters": "params" in self.demanded,
        }
        return [
            f"{name} {value:+.1%}"
            for name, value in values.items()
            if demanded[name] and round(100 * abs(value)) > TOLERANCE_PERCENT
        ]


def costs_of(plan: Plan) -> dict[str, dict[str, ArmCost]]:
    """By task and arm."""
    seed = plan.config.seeds[0]
    return {
        task: {arm.name: run_cost(plan.base_run(Cell("train", task, arm, seed))) for arm in plan.arms}
        for task in plan.config.tasks
    }


def run_cost(run: RunConfig) -> ArmCost:
    """Of a run, without its files and without memory for its weights."""
    task = build_task_without_files(run)
    cost = encoder_cost_of(run)
    samples, numbers = samples_of(run), samples_per_step(run)
    return ArmCost(
        num_params=sum(parameter.numel() for parameter in task.parameters()),
        num_active_params=cost.num_active_params - _largest_table(task),
        flops_per_token=cost.flops_per_token,
        num_assignments_per_token=cost.num_assignments_per_token,
        num_tokens_per_sample=sum(n * samples[source].num_tokens for source, n in numbers.items())
        / run.data.batch_size,
        training_flops_per_step=sum(
            number * sample_cost(task, samples[source]).training_flops for source, number in numbers.items()
        ),
        layer=_layer(run),
    )


def mismatches(plan: Plan, costs: Mapping[str, Mapping[str, ArmCost]]) -> list[Mismatch]:
    """Of every comparison in every task."""
    return [
        _mismatch(plan, task, arm, reference, of_task[arm.name], of_task[reference.name])
        for task, of_task in costs.items()
        for arm, reference in plan.comparisons
    ]


def require_parity(found: list[Mismatch]) -> None:
    """Raises:
    ConfigError: arms that are compared do not cost the same, with the numbers.
    """
    bad = [f"{m.arm} against {m.reference} in {m.task}: {', '.join(m.violations)}" for m in found if m.violations]
    if bad:
        raise ConfigError(
            f"arms of unequal cost, more than {TOLERANCE_PERCENT} % in whole percent: {'; '.join(bad)}; change their "
            "sizes (model.moe.num_heads, choices, num_experts, model.ffn_dim), or say with parity= what need not agree"
        )


def _mismatch(plan: Plan, task: str, arm: Arm, reference: Arm, cost: ArmCost, of_reference: ArmCost) -> Mismatch:
    # A dense layer is as wide as the experts that are active: it cannot have the parameters of those that are not.
    is_dense = "dense" in (arm.config.ffn, reference.config.ffn)
    demanded = tuple(part for part in plan.config.demanded_parity if part == "flops" or not is_dense)
    return Mismatch(
        task=task,
        arm=arm.name,
        reference=reference.name,
        flops=cost.flops_per_token / of_reference.flops_per_token - 1,
        active_params=cost.num_active_params / of_reference.num_active_params - 1,
        params=cost.num_params / of_reference.num_params - 1,
        demanded=demanded,
    )


def _largest_table(task: Task) -> int:
    """Parameters of the larger embedding, which :func:`encoder_cost` counts as active: they compute next to nothing,
    and would hide a mismatch of what does."""
    encoder = task.encoder
    names = ("vision_embedding", "text_embedding")
    embeddings = [getattr(encoder, name) for name in names if hasattr(encoder, name)]
    return max(sum(parameter.numel() for parameter in module.parameters()) for module in embeddings)


def _layer(run: RunConfig) -> str:
    model = run.model
    if model.ffn == "dense":
        return f"width {model.ffn_dim}"
    shape = model.ffn_shape
    heads = f", {shape.num_heads} heads" if shape.num_heads > 1 else ""
    return f"{shape.num_experts} experts of width {shape.ffn_dim}, top-{shape.top_k}{heads}"
