"""What one step does: micro-batches add up, and steps that are not finite are skipped everywhere."""

from __future__ import annotations

import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mhmoe_vl.config import validate_config
from mhmoe_vl.data.loader import train_loader
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import DataError, NonFiniteError
from mhmoe_vl.tasks.base import TaskOutput
from mhmoe_vl.tasks.pretrain import PretrainTask
from mhmoe_vl.train.build import build_dataset, build_plan, build_task
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.metrics import read_metrics
from mhmoe_vl.train.step import Figures, train_step
from tests.distributed.fork_harness import run_ranks
from tests.integration.runs import ALONE, figures, pretraining, tensors_of_checkpoint, train


def gradient(shards: Path, *, num_micro_batches: int, ffn: str) -> dict[str, Tensor]:
    """Of the first step, without clipping."""
    tree = pretraining(shards, Path("unused"), num_micro_batches=num_micro_batches)
    tree["model"] |= {"ffn": ffn, "moe": {**tree["model"]["moe"], "balance_weight": 0.0}}
    tree["data"]["batch_size"] = 12
    config = validate_config(RunConfig, tree)
    dataset = build_dataset(config, config.data.train, training=True)
    options = {"rank": 0, "world_size": 1, "num_workers": 0, "pin_memory": False}
    plan = build_plan(config, dataset)
    batches = list(train_loader(dataset, plan, steps=range(1), num_micro_batches=num_micro_batches, **options))  # type: ignore[arg-type]
    assert len(batches) == num_micro_batches
    task = build_task(config).train()
    gradients: dict[str, Tensor] = {}

    class Recorder(torch.optim.SGD):
        """Keeps the gradients that it is given and leaves the weights alone."""

        def step(self, closure: Any = None) -> None:
            gradients.update({n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None})

    optimizer = Recorder(task.parameters())
    result = train_step(task, optimizer, batches, clip_norm=None, autocast=nullcontext(), figures=Figures())
    assert result.is_good
    return gradients


@pytest.mark.parametrize("ffn", ["dense", "mhmoe"])
def test_a_step_in_parts_has_the_gradient_of_the_step(shards: Path, ffn: str) -> None:
    """With experts too, when the balance loss is off: it alone looks at a micro-batch as a whole."""
    whole, in_parts = (gradient(shards, num_micro_batches=number, ffn=ffn) for number in (1, 4))
    assert whole.keys() == in_parts.keys()
    assert all(tensor.abs().sum() > 0 for name, tensor in whole.items() if "mask_token" not in name or tensor.any())
    for name, tensor in whole.items():
        torch.testing.assert_close(in_parts[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def spoiled(
    bad_steps: set[int], *, only_rank: int | None = None, world: World = ALONE, num_micro_batches: int = 2
) -> Any:
    """Make the loss of these steps NaN, in their last micro-batch."""
    forward, num_calls = PretrainTask.forward, 0

    def replacement(self: PretrainTask, *arguments: Any, **options: Any) -> TaskOutput:
        nonlocal num_calls
        output = forward(self, *arguments, **options)
        step, index = divmod(num_calls, 2)
        num_calls += 1
        if step in bad_steps and index == 1 and only_rank in (None, world.rank):
            output.loss = output.loss * float("nan")
        return output

    return mock.patch.object(PretrainTask, "forward", replacement)


def test_a_step_that_is_not_finite_changes_nothing(shards: Path, tmp_path: Path) -> None:
    """Weights, moments, AdamW's step count and the selection bias."""
    with spoiled({1}):
        train(pretraining(shards, tmp_path, checkpoint_every=1, keep_checkpoints=9))
    assert tensors_of_checkpoint(tmp_path, 2) == tensors_of_checkpoint(tmp_path, 1)
    assert tensors_of_checkpoint(tmp_path, 3) != tensors_of_checkpoint(tmp_path, 2)
    assert "loss" not in figures(tmp_path)[2]
    assert all("loss" in figures(tmp_path)[step] for step in (1, 3, 4))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_bad_rank_makes_all_skip(shards: Path, tmp_path: Path, strategy: str) -> None:
    tree = pretraining(shards, tmp_path, checkpoint_every=1, keep_checkpoints=9, strategy=strategy, max_steps=3)

    def run(world: World) -> None:
        with spoiled({1}, only_rank=1, world=world):
            train(tree, world)

    run_ranks(run, 2)
    assert tensors_of_checkpoint(tmp_path, 2) == tensors_of_checkpoint(tmp_path, 1)
    assert tensors_of_checkpoint(tmp_path, 3) != tensors_of_checkpoint(tmp_path, 2)


def test_bad_steps_in_a_row_stop_the_run(shards: Path, tmp_path: Path) -> None:
    with spoiled({1, 2, 3}), pytest.raises(NonFiniteError, match=r"was not finite for 3 steps up to step 3; resume"):
        train(pretraining(shards, tmp_path, max_steps=6))
    with spoiled({0, 1, 3, 4}):
        train(pretraining(shards, tmp_path / "other", max_steps=6))


def test_clipping_limits_the_step_and_reports_the_norm_before_it(shards: Path, tmp_path: Path) -> None:
    """AdamW's second moment after one step is (1 - beta2) times the clipped gradient squared."""
    tree = pretraining(shards, tmp_path, max_steps=2)
    tree["optimizer"] |= {"clip_norm": 1e-3, "betas": [0.9, 0.5]}
    train(tree, stop_after=1)
    moments = [
        torch.frombuffer(bytearray(value), dtype=torch.float32)
        for name, value in tensors_of_checkpoint(tmp_path, 1).items()
        if name.endswith(".exp_avg_sq")
    ]
    squared_norm = float(torch.cat(moments).double().sum()) / 0.5
    assert squared_norm**0.5 == pytest.approx(1e-3, rel=1e-3)
    assert figures(tmp_path)[1]["grad_norm"] > 0.1


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_broken_samples_are_listed_and_too_many_stop_the_run(shards: Path, tmp_path: Path, num_ranks: int) -> None:
    """Of 24 pairs 12 lose their bytes: with six samples a step, the 21st broken one is too many, on whatever rank."""
    pairs = tmp_path / "pairs"
    shutil.copytree(shards / "pairs-train", pairs)
    (shard,) = pairs.glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    shard.write_bytes(content)
    out = tmp_path / "run"
    tree = pretraining(shards, out, max_steps=60, log_every=60)
    tree["data"]["train"]["pair"]["shards"] = str(pairs)

    def complaint(world: World) -> str:
        with pytest.raises(DataError) as raised:
            train(tree, world)
        return str(raised.value)

    messages = [complaint(ALONE)] if num_ranks == 1 else run_ranks(complaint, num_ranks)
    assert len(set(messages)) == 1
    assert re.match(r"2\d broken samples since the last log line; the last: .*checksum differs", messages[0])
    lines = [line for path in out.glob("broken_samples.rank*.txt") for line in path.read_text().splitlines()]
    assert len(lines) > 20
    assert all("pairs" in line and "checksum differs" in line for line in lines)


def test_validation_depends_on_the_weights_alone(shards: Path, tmp_path: Path) -> None:
    """Not on the step, drop path or the batch size. A tiny learning rate keeps the weights in place."""
    records = {}
    for batch_size in (3, 64):
        tree = pretraining(shards, tmp_path / str(batch_size), validate_every=1, max_steps=2)
        tree["optimizer"] = {"learning_rate": 1e-30}
        tree["model"]["moe"]["selection_bias_rate"] = 0.0
        tree["data"]["validation"] = {
            "image": {"kind": "image", "shards": str(shards / "images-val")},
            "text": {"kind": "text", "shards": str(shards / "text-val")},
        }
        tree["data"]["validation_batch_size"] = batch_size
        train(tree)
        first, second = read_metrics(tmp_path / str(batch_size), "validation")
        assert first == {**second, "step": 1}
        records[batch_size] = first
    assert records[3].keys() == records[64].keys() >= {"mim", "mlm", "mim_accuracy", "mlm_perplexity"}
    for name in ("mim", "mlm", "mim_accuracy", "mlm_accuracy", "mim_perplexity"):
        assert records[3][name] == pytest.approx(records[64][name], rel=1e-5)
