"""Cost of arms against built models and torch's FLOP counter, and the refusal of arms of unequal cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhmoe_vl.config import validate_config
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.moe import count_flops
from mhmoe_vl.plan.workload import build_task_without_files, synthetic_batch
from mhmoe_vl.study.cells import Cell, Plan
from mhmoe_vl.study.config import StudyConfig
from mhmoe_vl.study.cost import costs_of, mismatches, require_parity
from tests.unit.study.builders import study_tree

ARMS: dict[str, Any] = {
    "dense": {"ffn": "dense"},
    "smoe": {"ffn": "smoe", "num_experts": [4, 8]},
    "xmoe": {"ffn": "xmoe", "num_experts": [4, 8]},
    "fine_grained": {"ffn": "fine_grained", "num_experts": 8, "overrides": ["model.moe.choices=2"]},
    "mhmoe": {"ffn": "mhmoe", "num_experts": [4, 8]},
    "deep": {
        "ffn": "mhmoe",
        "num_experts": 4,
        "overrides": ["model.moe.num_head_layers=2", "model.moe.num_merge_layers=0"],
    },
}


def make_plan(folder: Path, **changes: Any) -> Plan:
    return Plan(validate_config(StudyConfig, study_tree(folder, arms=ARMS, **changes)))


def test_costs_equal_the_built_models_and_an_independent_count(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    costs = costs_of(plan)["masked"]
    assert list(costs) == [arm.name for arm in plan.arms]
    for arm in plan.arms:
        run = plan.base_run(Cell("train", "masked", arm, 0))
        task = build_task_without_files(run, device="cpu")
        cost = costs[arm.name]
        assert cost.num_params == sum(parameter.numel() for parameter in task.parameters())
        batch = synthetic_batch(run, "pair", 2)
        encoder = task.encoder
        # On CPU the fused attention is invisible to the counter; the loop has one product per expert.
        for module in encoder.modules():
            if hasattr(module, "backend"):
                module.backend = "loop"
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            flops = count_flops(lambda encoder=encoder, batch=batch: encoder(batch.image, batch.text_ids))
            flops -= count_flops(lambda encoder=encoder, batch=batch: encoder.vision_embedding(batch.image))
        num_tokens = 2 * (1 + run.model.num_patches + run.data.text_length)
        assert flops == num_tokens * cost.flops_per_token, arm.name
        assert cost.num_tokens_per_sample == num_tokens / 2
        # Forward and backward of the encoder are most of a step; patches, heads and codes are the rest.
        of_encoder = 3 * run.data.batch_size * num_tokens / 2 * cost.flops_per_token
        assert of_encoder < cost.training_flops_per_step < 1.5 * of_encoder


def test_mismatches_are_relative_to_the_reference_of_the_same_number_of_experts(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, match="flops")
    costs = costs_of(plan)
    found = mismatches(plan, costs)
    assert [(m.arm, m.reference) for m in found] == [
        ("dense", "smoe-4"), ("dense", "smoe-8"), ("xmoe-4", "smoe-4"), ("xmoe-8", "smoe-8"),
        ("fine_grained", "smoe-8"), ("mhmoe-4", "smoe-4"), ("mhmoe-8", "smoe-8"), ("deep", "smoe-4"),
    ]  # fmt: skip
    of = costs["masked"]
    assert found[5].flops == of["mhmoe-4"].flops_per_token / of["smoe-4"].flops_per_token - 1
    assert found[5].params == of["mhmoe-4"].num_params / of["smoe-4"].num_params - 1
    # A dense layer has the FLOPs of the active experts, and not their parameters.
    assert found[0].demanded == ("flops",)
    assert found[0].params < -0.02
    assert found[0].violations == []
    require_parity(found)


def test_arms_of_unequal_cost_are_refused_with_the_numbers(tmp_path: Path) -> None:
    arms = {"smoe": {"ffn": "smoe"}, "mhmoe": {"ffn": "mhmoe"}}
    plan = Plan(validate_config(StudyConfig, study_tree(tmp_path, arms=arms, match="params")))
    found = mismatches(plan, costs_of(plan))
    require_parity(found)
    assert found[0].flops > 0.2
    plan = Plan(validate_config(StudyConfig, study_tree(tmp_path, arms=arms, match="params", parity=["flops"])))
    with pytest.raises(
        ConfigError, match=r"mhmoe against smoe in masked: FLOPs per token \+\d+\.\d%, active parameters"
    ):
        require_parity(mismatches(plan, costs_of(plan)))
