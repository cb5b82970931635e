"""Parameter groups of AdamW and the learning rate of every step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.tasks.nlvr2 import Nlvr2Config, Nlvr2Task
from mhmoe_vl.train.optimizer import OptimizerConfig, build_optimizer, build_schedule

SIZES = {"dim": 16, "depth": 4, "num_heads": 2, "ffn_dim": 32, "image_size": 32, "vocab_size": 50, "max_text_length": 8}


def task_of(ffn: str) -> Nlvr2Task:
    moe = {"num_experts": 4, "num_heads": 2, "match": "none", "sub_ln": ffn == "xmoe"}
    return Nlvr2Task(ModelConfig(**SIZES, ffn=ffn, moe=moe, vl_ffn_layers=1), Nlvr2Config())  # type: ignore[arg-type]


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, float]:
    (group,) = [group for group in optimizer.param_groups if any(parameter is other for other in group["params"])]
    return group


@pytest.mark.parametrize("ffn", ["dense", "smoe", "xmoe", "mhmoe"])
def test_matrices_alone_are_decayed(ffn: str) -> None:
    """Judged by the module that a parameter belongs to, not by its name or shape."""
    task = task_of(ffn)
    optimizer = build_optimizer(task, OptimizerConfig(weight_decay=0.3))
    matrices: set[nn.Parameter] = set()
    for module in task.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            matrices.add(module.weight)
        for name in ("w1_EDF", "w2_EFD", "weight_DE", "projection_DR", "embedding_ER"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                matrices.add(getattr(module, name))
    for name, parameter in task.named_parameters():
        assert group_of(optimizer, parameter)["weight_decay"] == (0.3 if parameter in matrices else 0.0), name
    not_decayed = [name for name, parameter in task.named_parameters() if parameter not in matrices]
    kinds = {name.rsplit(".", 1)[-1] for name in not_decayed}
    assert kinds >= {"bias", "weight", "positions", "class_token", "mask_token"}
    if ffn in ("smoe", "mhmoe"):
        assert kinds >= {"b1_EF", "b2_ED"}
    assert ("norm_weight_EF" in kinds) == (ffn == "xmoe")


def test_every_parameter_is_in_one_group() -> None:
    task = task_of("mhmoe")
    optimizer = build_optimizer(task, OptimizerConfig(layer_decay=0.5, head_factor=20))
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(task.parameters())


def test_frozen_parameters_are_left_out() -> None:
    task = task_of("dense")
    task.encoder.text_embedding.requires_grad_(False)
    listed = {
        parameter for group in build_optimizer(task, OptimizerConfig()).param_groups for parameter in group["params"]
    }
    assert listed == {parameter for parameter in task.parameters() if parameter.requires_grad}


def test_layers_learn_the_slower_the_deeper_they_lie() -> None:
    """Four blocks: the top one at 0.5, the lowest at 0.5^4, embeddings at 0.5^5; heads and the last norm are full."""
    task = task_of("mhmoe")
    optimizer = build_optimizer(task, OptimizerConfig(layer_decay=0.5, head_factor=20))
    for name, parameter in task.named_parameters():
        if name.startswith("encoder.blocks."):
            expected = 0.5 ** {"3": 1, "2": 2, "1": 3, "0": 4}[name.split(".")[2]]
        elif name.startswith(("encoder.vision_embedding.", "encoder.text_embedding.")):
            expected = 0.5**5
        else:
            expected = 1.0 if name.startswith("encoder.") else 20.0
        assert group_of(optimizer, parameter)["lr_scale"] == expected, name
    assert {group["lr_scale"] for group in optimizer.param_groups} == {20.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125}


def rates(config: OptimizerConfig, steps: list[int], max_steps: int) -> list[float]:
    """The encoder's learning rate of each step, asked for in the given order."""
    optimizer = build_optimizer(task_of("dense"), config)
    schedule = build_schedule(optimizer, config, max_steps)
    found = []
    for step in steps:
        schedule.step_update(step)
        found += [group["lr"] for group in optimizer.param_groups if group["lr_scale"] == 1.0][:1]
    return found


def test_cosine_by_hand() -> None:
    """Ten steps of warm-up from a tenth of the peak, then half a cosine over ninety to a tenth of the peak."""
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_ratio=0.1)
    expected = {0: 0.1, 5: 0.55, 9: 0.91, 10: 1.0, 40: 0.1 + 0.9 * 0.75, 55: 0.55, 70: 0.1 + 0.9 * 0.25}
    expected[99] = 0.1 + 0.45 * (1 + math.cos(math.pi * 89 / 90))
    assert rates(config, list(expected), 100) == pytest.approx(list(expected.values()))


def test_linear_by_hand() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=0, schedule="linear")
    assert rates(config, [0, 5, 10, 19], 20) == pytest.approx([2.0, 1.5, 1.0, 0.1])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_rate_is_a_function_of_its_step_alone(schedule: str) -> None:
    config = OptimizerConfig(warmup_steps=3, schedule=schedule, final_ratio=0.05)  # type: ignore[arg-type]
    steps = list(range(20))
    forwards, backwards = rates(config, steps, 20), rates(config, steps[::-1], 20)[::-1]
    assert forwards == backwards
    assert forwards[7:] == rates(config, steps[7:], 20)


def test_factors_scale_every_step_s_rate() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, layer_decay=0.5, head_factor=3, final_ratio=0.1)
    optimizer = build_optimizer(task_of("dense"), config)
    schedule = build_schedule(optimizer, config, 20)
    for step in (0, 2, 4, 12, 19):
        schedule.step_update(step)
        plain = rates(OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_ratio=0.1), [step], 20)[0]
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(plain * group["lr_scale"])
