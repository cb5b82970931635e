"""A run with ``optimizer.ema_decay`` validates, exports and resumes the moving average of its weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import eval.classification
from mhmoe_vl.config import validate_config
from mhmoe_vl.distributed.weights import load_weights
from mhmoe_vl.tasks.base import Task
from mhmoe_vl.train import run
from mhmoe_vl.train.build import build_dataset
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.metrics import read_metrics
from mhmoe_vl.train.step import StepResult
from mhmoe_vl.train.trained import load_trained
from mhmoe_vl.train.validation import validate
from tests.integration.runs import ALONE, final_weights, fine_tuning, tensors_of_checkpoint, train

Weights = dict[str, NDArray[np.float64]]


def averaging(shards: Path, out: Path) -> dict[str, Any]:
    tree = fine_tuning(shards, out, "classification", out)
    tree["optimizer"]["ema_decay"] = 0.75
    return tree | {"init_from": None, "max_steps": 4}


@pytest.fixture
def weights_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """Before the first step and after every one; the third is called bad, though it has changed the weights."""
    found: list[Weights] = []
    real_step = run.train_step

    def step(module: Task, *arguments: Any, **options: Any) -> StepResult:
        def note() -> None:
            found.append({name: p.detach().double().numpy().copy() for name, p in module.named_parameters()})

        if module.step == 0:
            found.clear()
            note()
        result = real_step(module, *arguments, **options)
        note()
        return replace(result, is_good=module.step != 2)

    monkeypatch.setattr(run, "train_step", step)
    return found


def test_a_run_exports_and_validates_its_average(
    shards: Path, tmp_path: Path, weights_of_steps: list[Weights], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    with caplog.at_level("INFO"):
        train(averaging(shards, out))
    assert "model.safetensors is the moving average (optimizer.ema_decay=0.75)" in caplog.text
    first, one, two, _, four = weights_of_steps
    exported = load_weights(out / "model.safetensors")
    for name, last in four.items():
        expected = 0.75**3 * first[name] + 0.25 * (0.75**2 * one[name] + 0.75 * two[name] + last)
        np.testing.assert_allclose(exported[name].double().numpy(), expected, atol=1e-7, rtol=1e-6, err_msg=name)
    assert any(np.abs(exported[name].numpy() - last).max() > 1e-3 for name, last in four.items())

    trained = load_trained(out, ALONE, task_kind="classification")
    config = validate_config(RunConfig, averaging(shards, out))
    held_out = build_dataset(config, config.data.validation, training=False)
    scores = validate(config, trained.task, held_out, ALONE, should_stop=lambda: False)
    (record,) = read_metrics(out, "validation")
    assert scores is not None
    assert record["classification"] == scores["classification"]
    trained.task.load_state_dict({name: torch.from_numpy(last) for name, last in four.items()}, strict=False)
    of_last = validate(config, trained.task, held_out, ALONE, should_stop=lambda: False)
    assert of_last is not None
    assert of_last["classification"] != scores["classification"]

    assert eval.classification.main(["--run", str(out), "--data", str(shards / "classes-val")]) == 0
    card = json.loads((out / "classification_score.json").read_text())
    assert card["cost"]["weights"] == "moving average, decay 0.75"


def test_two_and_two_steps_are_four_bit_for_bit(shards: Path, tmp_path: Path, weights_of_steps: list[Weights]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(averaging(shards, whole))
    train(averaging(shards, broken), stop_after=2)
    train(averaging(shards, broken))
    tensors = tensors_of_checkpoint(whole, 4)
    assert any(": average.encoder." in name for name in tensors)
    assert tensors_of_checkpoint(broken, 4) == tensors
    assert final_weights(broken) == final_weights(whole)
