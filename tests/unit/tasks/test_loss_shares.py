"""However a step is cut into micro-batches and ranks, the shares of its loss add up to the loss of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mhmoe_vl.tasks import base
from mhmoe_vl.tasks.base import MicroBatch, Task, TaskOutput
from tests.unit.tasks.builders import TASKS, gradients, make_micro_batch, make_task, take

#: Parts of nine samples, one of them empty: a rank may have nothing to do.
CUTS = [(0, 4), (4, 4), (4, 9)]

#: Retrieval compares pairs with each other: see test_retrieval.py.
INDEPENDENT = tuple(kind for kind in TASKS if kind != "retrieval")

Result = tuple[Tensor, dict[str, Tensor], list[TaskOutput]]


def run(task: Task, parts: list[MicroBatch], *, num_micro_batches: int = 1) -> Result:
    """Loss, gradients and outputs, everything summed over the parts."""
    totals = task.num_targets(parts)
    task.zero_grad()
    outputs = [task(part, totals, num_micro_batches) for part in parts]
    for output in outputs:
        output.loss.backward()
    return torch.stack([output.loss.detach() for output in outputs]).sum(), gradients(task), outputs


def assert_same(found: Result, expected: Result) -> None:
    assert_close(found[0], expected[0])
    for name, grad in expected[1].items():
        assert_close(found[1][name], grad, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for figures in ("sums", "counts"):
        for name, value in getattr(expected[2][0], figures).items():
            assert_close(sum(getattr(output, figures)[name] for output in found[2]), value, check_dtype=False)


@pytest.mark.parametrize("ffn", ["dense", "mhmoe"])
@pytest.mark.parametrize("kind", INDEPENDENT)
def test_micro_batches_add_up(kind: str, ffn: str) -> None:
    task = make_task(kind, ffn, moe={"balance_weight": 0.0}, drop_path=0.3)
    whole = make_micro_batch(kind, 9)
    cut = [take(whole, *cut) for cut in CUTS]
    assert_same(run(task, cut, num_micro_batches=3), run(task, [whole]))


@pytest.mark.parametrize("ffn", ["mhmoe", "xmoe"])
@pytest.mark.parametrize("kind", INDEPENDENT)
def test_ranks_add_up_with_their_auxiliary_losses(kind: str, ffn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank sees the loads of all ranks, and returns its share of balance and z-loss."""
    task = make_task(kind, ffn, moe={"balance_weight": 0.5, "z_weight": 0.1, "experts": "shared"}, vl_ffn_layers=1)
    whole = make_micro_batch(kind, 9)
    expected = run(task, [whole])
    assert expected[2][0].shares["balance"] > 0
    loads = torch.cat(list(expected[2][0].load_E.values()))
    reduced: list[Tensor] = []
    monkeypatch.setattr(base, "all_reduce_sum", lambda local: reduced.append(local) or loads.clone())
    found = run(task, [take(whole, *cut) for cut in CUTS])
    assert_same(found, expected)
    # One reduction per rank, and the local loads add up to the global ones.
    assert len(reduced) == len(CUTS)
    assert torch.equal(torch.stack(reduced).sum(0), loads)
    assert_close(sum(output.shares["balance"] for output in found[2]), expected[2][0].shares["balance"])
    for output in found[2]:
        for pool, load_E in expected[2][0].load_E.items():
            assert torch.equal(output.load_E[pool], load_E)


def test_the_balance_loss_is_averaged_over_micro_batches() -> None:
    task = make_task("vqa", moe={"balance_weight": 0.5})
    batch = make_micro_batch("vqa", 4)
    once, of_three = (task(batch, {"vqa": 4}, number).shares["balance"] for number in (1, 3))
    assert_close(of_three, once / 3)


@pytest.mark.parametrize("kind", TASKS)
def test_a_rank_without_samples(kind: str) -> None:
    """Its loss and gradients are zero, and exactly those parameters have a gradient that have one elsewhere."""
    task = make_task(kind)
    batches = make_micro_batch(kind, 2)
    totals = task.num_targets([batches])

    def trained(part: MicroBatch) -> set[str]:
        task.zero_grad()
        task(part, totals).loss.backward()
        return {name for name, p in task.named_parameters() if p.grad is not None}

    assert trained(take(batches, 0, 0)) == trained(batches)
    found = run(task, [take(batches, 0, 0)])
    assert found[0] == 0
    assert not any(grad.any() for grad in found[1].values())


@pytest.mark.parametrize("kind", TASKS)
def test_a_step_without_targets_is_not_a_division_by_zero(kind: str) -> None:
    task = make_task(kind, "dense")
    output = task(take(make_micro_batch(kind, 2), 0, 0), task.num_targets([]))
    assert output.loss == 0


@pytest.mark.parametrize("kind", TASKS)
def test_every_parameter_that_matters_learns(kind: str) -> None:
    task = make_task(kind, moe={"experts": "shared"})
    found = run(task, [make_micro_batch(kind, 6)])[1]
    # Only pretraining hides patches, VQA reads the class token alone, and captioning the text alone.
    unused = {"vqa": ["norm.text"], "captioning": ["norm.vision"]}.get(kind, [])
    expected = {f"encoder.{norm}.{name}" for norm in unused for name in ("weight", "bias")}
    if kind == "classification":
        expected = {name for name in found if ".text." in name or ".text_embedding." in name}
    if kind not in ("pretrain", "language_modeling"):
        expected.add("encoder.vision_embedding.mask_token")
    if kind == "language_modeling":
        # No row has positions above 3.
        assert not found["encoder.text_embedding.positions"][:, 4:].any()
    assert {name for name, grad in found.items() if not grad.any()} == expected
