"""AdamW with the parameter groups of masked pretraining and fine-tuning, and the learning-rate schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from mhmoe_vl.config import Config
from mhmoe_vl.tasks.base import Task

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler

NonNegative = Annotated[float, Field(ge=0)]


class OptimizerConfig(Config):
    """AdamW and its schedule.

    Attributes:
        learning_rate: peak.
        final_ratio: last learning rate as a share of the peak.
        warmup_steps: of linear growth from zero.
        schedule: ``cosine`` or ``linear`` decay to ``final_ratio``.
        layer_decay: factor per layer from the top downwards (BEiT); 1 treats all layers alike.
        head_factor: the heads' learning rate as a multiple of the encoder's (BEiT-3's VQA recipe: 20).
        clip_norm: largest global gradient norm; None does not clip.
        ema_decay: keep an exponential moving average of the weights with this decay, updated after every step. What is
            validated, exported and evaluated is then the average. None keeps none.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: NonNegative = 0.05
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["cosine", "linear"] = "cosine"
    final_ratio: NonNegative = 0.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    head_factor: Annotated[float, Field(gt=0)] = 1.0
    clip_norm: Annotated[float, Field(gt=0)] | None = 3.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None


def build_optimizer(task: Task, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over groups that share decay and learning-rate factor.

    Vectors and tables (biases, norms, positions, class and mask tokens, temperatures) are not decayed; biases of
    stacked experts are vectors too, although stored as ``[E, F]``.
    """
    heads = set(task.head_parameters())
    groups: dict[tuple[float, float, str], list[nn.Parameter]] = {}
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = config.weight_decay if _is_matrix(name, parameter) else 0.0
        depth = (
            config.head_factor if parameter in heads else config.layer_decay ** _layers_above(name, task.config.depth)
        )
        # Experts that are spread over ranks lie on a mesh of their own, and one fused update takes one mesh.
        mesh = str(getattr(parameter, "device_mesh", ""))
        groups.setdefault((decay, depth, mesh), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[key], "weight_decay": key[0], "lr_scale": key[1]} for key in sorted(groups)],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        # One pass over memory instead of ten; on a small model the plain loop is a fifth of a step.
        fused=True,
    )


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, max_steps: int) -> Scheduler:
    """Warm-up and decay. ``step_update(step)`` sets the rates of a step from its number alone, so a resumed run needs
    no schedule state; groups are scaled by their ``lr_scale``."""
    # timm imports all its models and torchvision's with it, which evaluations need not wait for.
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from timm.scheduler.poly_lr import PolyLRScheduler

    arguments = {
        "t_initial": max_steps - config.warmup_steps,
        "lr_min": config.learning_rate * config.final_ratio,
        "warmup_t": config.warmup_steps,
        # The first step should already move: rates grow from 1/warmup_steps, not from zero.
        "warmup_lr_init": config.learning_rate / max(1, config.warmup_steps),
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if config.schedule == "linear":
        return PolyLRScheduler(optimizer, power=1.0, **arguments)
    return CosineLRScheduler(optimizer, **arguments)


_TABLES = (".positions", ".class_token", ".mask_token", ".b1_EF", ".b2_ED", ".norm_weight_EF", ".norm_bias_EF")


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith(_TABLES)


def _layers_above(name: str, num_layers: int) -> int:
    """Layers between a parameter and the heads: 0 for the final norm, ``num_layers + 1`` for embeddings."""
    if name.startswith("encoder.blocks."):
        return num_layers - int(name.split(".")[2])
    return num_layers + 1 if "_embedding." in name else 0
