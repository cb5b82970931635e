"""``python -m mhmoe_vl.plan`` as a user meets it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mhmoe_vl.errors import ConfigError
from mhmoe_vl.plan import __main__ as command_line
from mhmoe_vl.plan.__main__ import main
from mhmoe_vl.plan.devices import DATASHEETS, find_device
from mhmoe_vl.plan.plan import Plan, make_plan
from mhmoe_vl.plan.workload import build_task_without_files
from tests.unit.plan.builders import make_device, make_run

CONFIGS = Path(__file__).parents[3] / "configs"

#: A task with one source, which is traced in a third of the time that pretraining takes.
SINGLE = "captioning"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 64
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


def test_a_layout_of_64_ranks_without_any_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--config", str(CONFIGS / "pretrain" / "tiny.yaml"), "--world-size", "64", "--device", "h100"]
    arguments += ["strategy=fsdp", "model.ffn=mhmoe"]
    plans: list[Plan] = []

    def once(*arguments: Any, **options: Any) -> Plan:
        """It takes seconds, and is printed twice."""
        if not plans:
            plans.append(make_plan(*arguments, **options))
        return plans[0]

    monkeypatch.setattr(command_line, "make_plan", once)
    text = run(capsys, *arguments)
    for expected in (
        "64 x h100, strategy fsdp",
        "datasheet",
        "assumed to be reached, not measured",
        "gathered",
        "hours",
    ):
        assert expected in text
    plan = json.loads(run(capsys, *arguments, "--json"))
    assert plan["layout"]["world_size"] == 64
    assert plan["backend"] == "grouped_mm"
    assert plan["hours"] == pytest.approx(20000 * plan["time"]["expected"] / 3600)
    assert plan["memory"]["total"] == sum(
        plan["memory"][part]
        for part in (
            "weights", "gradients", "optimizer", "average", "tokenizer", "gathered", "weight_copies", "activations",
            "temporary", "all_to_all",
        )
    )  # fmt: skip


@cache
def plan_of(*, checkpointed: bool) -> Plan:
    return make_plan(make_run(SINGLE, model={"checkpoint_activations": checkpointed}), make_device(), world_size=1)


def test_states_are_exact_and_checkpointing_is_seen() -> None:
    plan, checkpointed = plan_of(checkpointed=False), plan_of(checkpointed=True)
    num_params = sum(parameter.numel() for parameter in build_task_without_files(make_run(SINGLE)).parameters())
    assert plan.memory.states == 16 * num_params
    assert plan.activations == checkpointed.activations
    assert plan.memory.activations == plan.activations["without checkpointing"]
    assert checkpointed.memory.activations == plan.activations["with checkpointing"]
    assert checkpointed.memory.activations < 0.5 * plan.memory.activations
    # All samples are alike on one rank.
    assert plan.busy_share == 1


def test_an_average_of_the_weights_is_counted() -> None:
    """Four bytes per parameter; each is read with its weight and written."""
    runs = [
        make_run("language_modeling", model={"ffn": "dense"}, optimizer={"ema_decay": decay, "warmup_steps": 1})
        for decay in (None, 0.999)
    ]
    plain, averaged = (make_plan(run, make_device(), world_size=1) for run in runs)
    num_params = sum(parameter.numel() for parameter in build_task_without_files(runs[0]).parameters())
    assert (plain.memory.average, averaged.memory.average) == (0, 4 * num_params)
    assert averaged.memory.total == plain.memory.total + 4 * num_params
    assert averaged.time.optimizer == pytest.approx(plain.time.optimizer + 12 * num_params / 1e9)


def test_ranks_without_samples_are_seen() -> None:
    """Four of each source on five ranks: some have one of each, one has none."""
    assert make_plan(make_run(), make_device(), world_size=5).busy_share == pytest.approx(4 / 5)


def test_utilization_by_hand() -> None:
    """Useful FLOPs over time and ceiling; recomputation is not useful."""
    plans = [plan_of(checkpointed=on) for on in (False, True)]
    useful = sum(3 * s.cost.forward_flops * s.samples_per_step for s in plans[0].sources.values())
    for plan in plans:
        assert plan.flops_utilization == pytest.approx(useful / plan.time.expected / 1e9)
    assert plans[1].time.backward > plans[0].time.backward


def test_what_would_fit() -> None:
    whole = plan_of(checkpointed=False).memory
    with pytest.raises(ConfigError, match=r"does not fit: .* too much .*; fits with num_micro_batches=2 \("):
        make_plan(make_run(SINGLE), make_device(memory=int(whole.total)), world_size=1)
    with pytest.raises(ConfigError, match="more micro-batches, checkpointing and fsdp are not enough: use more ranks"):
        make_plan(make_run(SINGLE), make_device(memory=whole.states), world_size=1)


def test_checkpointing_is_advised_where_samples_are_single() -> None:
    single = make_run(SINGLE, data={"batch_size": 1})
    whole = make_plan(single, make_device(), world_size=1).memory
    room = int((whole.total - 0.1 * whole.activations) / 0.9)
    with pytest.raises(ConfigError, match=r"fits with model\.checkpoint_activations=true \("):
        make_plan(single, make_device(memory=room), world_size=1)


def test_a_real_size_is_refused_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(
        capsys, "--config", str(CONFIGS / "pretrain" / "tiny.yaml"), "--device", "h100", "data.batch_size=4800"
    )
    assert "h100 has 80.00 GB of which 90% may be planned" in line
    assert "activations" in line
    assert "fits with num_micro_batches=" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "h10"], "did you mean 'h100'?"),
        (["--device", "h100", "--world-size", "200"], "192 samples are fewer than 200 ranks"),
        (
            ["--device", "h100", "--world-size", "6", "expert_parallel=4", "model.moe.num_experts_multiple=4"],
            "use 3 or 6",
        ),
        (["--device", "h100", "model.dims=3"], "unknown key"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert expected in refusal(capsys, "--config", str(CONFIGS / "pretrain" / "tiny.yaml"), *arguments)


def test_expert_parallel() -> None:
    """The parts of rank 0 are asserted against the program's own inside."""
    config = make_run(model={"ffn": "mhmoe"}, strategy="fsdp", expert_parallel=2)
    plan = make_plan(config, make_device(), world_size=4)
    # Rows and results of the largest pass (4 / 4 pairs of 31 tokens, 32 wide), each as sent and as received.
    assert plan.memory.all_to_all == 4 * 31 * 32 * 4
    assert plan.communication.all_to_all_bytes == 4 * (17 + 14 + 31) * 32 * 4 / 2


def test_the_cpu_is_measured() -> None:
    device = find_device("cpu")
    figures: list[Any] = [
        device.matmul_flops["float32"], device.attention_flops["float32"], device.memory_bandwidth,
        device.function_bandwidth, device.call_seconds, device.memory,
    ]  # fmt: skip
    assert all(0 < figure < float("inf") for figure in figures)
    assert "measured" in device.source
    assert device.reached == 1
    assert set(device.matmul_flops) == {"float32"}


def test_datasheets_do_not_pretend() -> None:
    for device in DATASHEETS.values():
        assert "datasheet" in device.source
        assert "measured" not in device.source
        assert device.reached < 1
        assert device.call_seconds is None


def test_default_device_exists() -> None:
    assert find_device("this").kind == ("cuda" if torch.cuda.is_available() else "cpu")
