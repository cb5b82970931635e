"""The contrastive loss against a plain one, alone and over ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mhmoe_vl.distributed.collectives import all_reduce_sum, gather_rows
from mhmoe_vl.distributed.world import World
from mhmoe_vl.tasks.base import MicroBatch
from mhmoe_vl.tasks.retrieval import RetrievalTask, contrastive_loss
from tests.distributed.fork_harness import run_ranks
from tests.unit.tasks.builders import gradients, make_batch, make_micro_batch, make_task, take

#: Two ranks, and three of which one has nothing.
CUTS = [(0, 5, 9), (0, 4, 4, 9)]


def unit_vectors(num: int, *, seed: int = 0) -> Tensor:
    """``[num, 2, 4]`` in float64."""
    x = torch.randn(num, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def plain_loss(pairs: Tensor, scale: float, image_of: list[int]) -> tuple[float, int]:
    """Probabilities one by one, as the formula has them: images choose texts, then texts choose images."""
    total, num_right = 0.0, 0
    for own, other in ((0, 1), (1, 0)):
        for i in range(len(pairs)):
            scores = {
                j: math.exp(scale * float(pairs[i, own] @ pairs[j, other]))
                for j in range(len(pairs))
                if j == i or image_of[j] != image_of[i]
            }
            total -= math.log(scores[i] / sum(scores.values()))
            num_right += max(scores, key=lambda j: scores[j]) == i
    return total, num_right


def loss_of(pairs: Tensor, scale: float, image_of: list[int]) -> tuple[float, int]:
    ids = torch.tensor(image_of)
    loss, num_right = contrastive_loss(
        pairs, pairs, torch.tensor([scale], dtype=torch.float64), ids_B=ids, ids_N=ids, first=0
    )
    return loss.item(), int(num_right)


@pytest.mark.parametrize("image_of", [[0, 1, 2, 3, 4, 5], [7, 1, 7, 3, 7, 1]])
@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_the_loss_is_the_plain_one(image_of: list[int], scale: float) -> None:
    pairs = unit_vectors(6)
    expected = plain_loss(pairs, scale, image_of)
    assert loss_of(pairs, scale, image_of) == (pytest.approx(expected[0], rel=1e-12), expected[1])


def test_two_pairs_by_hand() -> None:
    """Images along x and y; the first text lies right, the second on the first image: cosines 1 0 / 1 0."""
    x, y = [1.0, 0.0], [0.0, 1.0]
    pairs = torch.tensor([[x, x], [y, x]], dtype=torch.float64)
    likelier = math.log(1 + math.exp(-2))  # nats of the right one of two, at twice the cosine
    # The images cannot tell the texts apart: ln 2 each. The texts both choose the first image.
    assert loss_of(pairs, 2.0, [0, 1])[0] == pytest.approx(2 * math.log(2) + likelier + (likelier + 2))
    # Were both pairs of one image, nothing would be left to choose from.
    assert loss_of(pairs, 2.0, [5, 5]) == (pytest.approx(0), 4)


def test_each_side_is_encoded_on_its_own() -> None:
    task = make_task("retrieval", vl_ffn_layers=1)
    assert isinstance(task, RetrievalTask)
    batch = make_batch("retrieval", 5)
    images = task.encoder(batch.image).vision[:, 0] @ task.vision_head.linear.weight.T
    texts = task.encoder(None, batch.text_ids, text_valid=batch.text_valid).text[:, 0] @ task.text_head.linear.weight.T
    pairs = torch.stack([images / images.norm(dim=1, keepdim=True), texts / texts.norm(dim=1, keepdim=True)], 1)
    output = task({"x": batch}, {"retrieval": 5.0})
    expected, num_right = plain_loss(pairs.detach(), math.exp(task.logit_scale.item()), list(range(5)))
    assert output.sums["retrieval"].item() == pytest.approx(expected)
    assert output.counts["retrieval"] == 10
    assert output.sums["retrieval_accuracy"] == num_right
    # Mean of both directions, as CLIP and BEiT-3 report it.
    balance = task.config.moe.balance_weight * output.shares["balance"]
    assert (output.loss - balance).item() == pytest.approx(expected / 10)
    temperature = output.sums["retrieval_temperature"] / output.counts["retrieval_temperature"]
    assert temperature.item() == pytest.approx(math.exp(-task.logit_scale.item()))


def test_the_temperature_starts_where_it_is_told_to() -> None:
    torch.manual_seed(0)
    task = RetrievalTask(make_task("retrieval").config, make_task("retrieval").task_config)  # type: ignore[arg-type]
    assert (-task.logit_scale).exp().item() == pytest.approx(0.07)
    task = make_task("retrieval", "dense")
    task.zero_grad()
    task(make_micro_batch("retrieval", 4), {"retrieval": 4.0}).loss.backward()
    assert task.logit_scale.grad.abs() > 0  # type: ignore[union-attr,operator]


def test_an_image_that_comes_twice_is_no_negative() -> None:
    task = make_task("retrieval", "dense")
    batch = make_batch("retrieval", 4)
    twice = replace(batch, sample_ids=("a", "b", "a", "c"))
    losses = {source: task({source: twice}, {"retrieval": 4.0}).loss.item() for source in ("x", "y")}
    assert losses["x"] == losses["y"]
    assert losses["x"] < task({"x": batch}, {"retrieval": 4.0}).loss.item()
    # The same id in two sources is two images.
    apart = {"x": take({"x": twice}, 0, 2)["x"], "y": take({"y": twice}, 2, 4)["y"]}
    assert task(apart, {"retrieval": 4.0}).loss.item() == pytest.approx(
        task({"x": batch}, {"retrieval": 4.0}).loss.item()
    )


def test_held_out_pairs_are_compared_within_their_batch() -> None:
    """Else validation would depend on the number of ranks."""
    task = make_task("retrieval", "dense").eval()
    batch = make_micro_batch("retrieval", 6)

    def body(world: World) -> float:
        with torch.no_grad():
            return task(take(batch, 3 * world.rank, 3 * world.rank + 3), {"retrieval": 1.0}).sums["retrieval"].item()

    alone = [task(take(batch, start, start + 3), {"retrieval": 1.0}).sums["retrieval"].item() for start in (0, 3)]
    assert run_ranks(body, 2) == pytest.approx(alone)


@pytest.mark.parametrize("cuts", CUTS)
def test_ranks_add_up(cuts: tuple[int, ...]) -> None:
    """Loss, figures and the gradient of every parameter are those of one process, a rank without pairs included."""
    settings: dict[str, Any] = {"moe": {"balance_weight": 0.5, "z_weight": 0.1}, "drop_path": 0.3}
    whole = make_micro_batch("retrieval", 9)

    def results(part: MicroBatch) -> dict[str, Tensor]:
        task = make_task("retrieval", **settings).train()
        output = task(part, {"retrieval": 9.0})
        output.loss.backward()
        figures = {name: output.sums[name] / output.counts[name] * len(part["retrieval"]) / 9 for name in output.sums}
        if not len(part["retrieval"]):
            figures = {name: torch.zeros_like(total) for name, total in output.sums.items()}
        return {"loss": output.loss.detach()} | figures | gradients(task)

    def body(world: World) -> dict[str, list[float]]:
        own = results(take(whole, *list(pairwise(cuts))[world.rank]))
        return {name: all_reduce_sum(value.double()).flatten().tolist() for name, value in own.items()}

    expected = {name: value.double().flatten() for name, value in results(whole).items()}
    assert expected["logit_scale"].abs() > 1e-4
    for found in run_ranks(body, len(cuts) - 1):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(
                torch.tensor(found[name], dtype=torch.float64), value, atol=1e-9, rtol=1e-6,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip


def test_without_the_others_rows_it_would_be_another_loss() -> None:
    """What the test above can see."""
    task = make_task("retrieval", "dense")
    whole = make_micro_batch("retrieval", 9)
    parts = [task(take(whole, start, end), {"retrieval": 9.0}).loss.item() for start, end in ((0, 5), (5, 9))]
    assert abs(sum(parts) - task(whole, {"retrieval": 9.0}).loss.item()) > 0.01


def test_gathered_rows_and_their_gradient() -> None:
    """Ranks hold two, no and one row; every rank weighs all rows with its own number."""

    def body(world: World) -> tuple[list[Any], int, list[Any]]:
        own = torch.arange(4.0).view(2, 2)[: (2, 0, 1)[world.rank]] + 10 * world.rank
        own.requires_grad_()
        rows, first = gather_rows(own)
        (rows * (world.rank + 1) * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
        return rows.tolist(), first, own.grad.tolist()  # type: ignore[union-attr]

    rows = [[0.0, 1.0], [2.0, 3.0], [20.0, 21.0]]
    # 1 + 2 + 3 ranks' weights, times that of the row.
    assert run_ranks(body, 3) == [(rows, 0, [[6, 6], [12, 12]]), (rows, 2, []), (rows, 2, [[18, 18]])]
    own = torch.ones(2, 3)
    assert gather_rows(own) == (own, 0)
