"""Whole runs with experts spread over two processes: the losses, samples and weights of one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mhmoe_vl.distributed.world import World
from mhmoe_vl.train.metrics import read_metrics
from tests.distributed.fork_harness import run_ranks
from tests.integration.runs import ALONE, figures, fine_tuning, pretraining, train
from tests.integration.test_resume import assert_close, merged

MHMOE: dict[str, Any] = {"ffn": "mhmoe"}
HEADS: dict[str, Any] = {"ffn": "mhmoe_head_parallel"}
JOINT: dict[str, Any] = {
    "ffn": "xmoe",
    "vl_ffn_layers": 1,
    "checkpoint_activations": True,
    "moe": {"experts": "shared", "top_k": 2},
}


def tree_of(shards: Path, out: Path, model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    tree = pretraining(shards, out, **changes)
    moe = tree["model"]["moe"] | model.get("moe", {})
    tree["model"] |= {**model, "moe": moe}
    return tree


def assert_same_run(out: Path, expected: Path) -> None:
    assert figures(out).keys() == figures(expected).keys()
    assert_close(figures(out), figures(expected))
    loads = ([record["load"] for record in read_metrics(folder, "experts")] for folder in (out, expected))
    assert next(loads) == next(loads)
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (out, expected))
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_a_run_equals_that_of_one_process(shards: Path, tmp_path: Path) -> None:
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    consumed = train(tree_of(shards, alone, JOINT), ALONE)
    assert merged(run_ranks(partial(train, tree_of(shards, spread, JOINT, expert_parallel=2)), 2)) == merged([consumed])
    assert_same_run(spread, alone)


def test_a_run_that_is_stopped_goes_on_spread_or_on_one_process(shards: Path, tmp_path: Path) -> None:
    alone, spread, broken, on_one = (tmp_path / name for name in ("alone", "spread", "broken", "on_one"))
    make: Callable[..., dict[str, Any]] = partial(tree_of, shards, model=HEADS)
    consumed = train(make(out=alone), ALONE)

    def both(world: World) -> Any:
        of_whole = train(make(out=spread, expert_parallel=2), world)
        return of_whole, train(make(out=broken, expert_parallel=2), world, stop_after=2)

    results = run_ranks(both, 2)
    assert merged([of_whole for of_whole, _ in results]) == merged([consumed])
    assert_same_run(spread, alone)
    shutil.copytree(broken, on_one)
    run_ranks(partial(train, make(out=broken, expert_parallel=2)), 2)
    assert figures(broken) == figures(spread)
    assert train(make(out=on_one), ALONE) == consumed[2:]
    assert_same_run(on_one, alone)


def test_a_run_on_one_process_goes_on_with_experts_spread_over_four(shards: Path, tmp_path: Path) -> None:
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    train(tree_of(shards, alone, MHMOE), ALONE)
    train(tree_of(shards, broken, MHMOE), ALONE, stop_after=2)
    run_ranks(partial(train, tree_of(shards, broken, MHMOE, expert_parallel=4)), 4)
    assert_same_run(broken, alone)


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "captioning"])
def test_fine_tuning(shards: Path, tmp_path: Path, task: str) -> None:
    """Validation included: ranks meet in as many forward passes, whoever has samples left."""
    pretrained = tmp_path / "pretrained"
    train(pretraining(shards, pretrained, max_steps=2), ALONE)
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    train(fine_tuning(shards, alone, task, pretrained), ALONE)
    run_ranks(partial(train, fine_tuning(shards, spread, task, pretrained) | {"expert_parallel": 2}), 2)
    assert_same_run(spread, alone)
    (scores,), (expected,) = (read_metrics(folder, "validation") for folder in (spread, alone))
    assert scores.pop("kind") == expected.pop("kind")
    assert scores == pytest.approx(expected, rel=1e-4)
