"""What captioning learns from: BEiT-3 leaves out the tokens that it finds hardest."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.testing import assert_close

from mhmoe_vl.data.batch import Batch
from mhmoe_vl.distributed.collectives import all_reduce_sum
from mhmoe_vl.distributed.world import World
from mhmoe_vl.tasks.base import Task
from tests.distributed.fork_harness import run_ranks
from tests.unit.tasks.builders import gradients, make_batch, make_task, take


def make_captioner(*, step: int) -> Task:
    """Of a run that leaves out the worst after step 3."""
    task = make_task("captioning", "dense", options={"drop_worst_ratio": 0.2, "drop_worst_after": 3})
    task.step = step
    return task


def losses_of(task: Task, batch: Batch) -> Tensor:
    """Loss of every hidden token, one after the other, with 0.9 on it and 0.1 shared out over all tokens."""
    with torch.no_grad():
        encoded = task.encoder(
            batch.image, batch.text_ids, text_valid=batch.text_valid, sample_seed=batch.seed, pattern="captioning"
        )
        log_p_BLV = task.mlm_head(encoded.text).log_softmax(-1)
    assert batch.text_targets is not None
    places = (batch.text_targets != -100).nonzero().tolist()
    return torch.stack(
        [-(0.9 * log_p_BLV[b, t, batch.text_targets[b, t]] + 0.1 * log_p_BLV[b, t].mean()) for b, t in places]
    )


def test_the_worst_tokens_are_left_out_by_hand() -> None:
    """The mean over the easiest four fifths, rounded down, in later steps than the third, in training alone."""
    task, batch = make_captioner(step=3), make_batch("captioning", 5)
    losses = losses_of(task, batch).sort().values
    num = len(losses)
    assert num % 5 > 0
    assert_close(task({"x": batch}, {"captioning": num}).loss.detach(), losses.mean())
    task.step = 4
    output = task({"x": batch}, {"captioning": num})
    assert_close(output.loss.detach(), losses[: int(0.8 * num)].mean())
    # Figures are of all tokens, and so compare with those of other steps.
    assert_close(output.sums["captioning"], losses.sum())
    output = task.eval()({"x": batch}, {"captioning": num})
    assert_close(output.loss, output.sums["captioning"] / num)


def test_a_token_that_is_left_out_teaches_nothing() -> None:
    task, batch = make_captioner(step=4), make_batch("captioning", 2)
    targets = torch.full_like(batch.text_targets, -100)
    targets[0, 1], targets[1, 1] = 3, 4
    batch = replace(batch, text_targets=targets)
    worst = int(losses_of(task, batch).argmax())
    task({"x": batch}, {"captioning": 2}).loss.backward()
    with_both = gradients(task)
    targets[worst] = -100
    task.zero_grad()
    task({"x": batch}, {"captioning": 1}).loss.backward()
    for name, gradient in gradients(task).items():
        assert_close(with_both[name], gradient, atol=1e-12, rtol=0, msg=name)


def test_no_token_or_a_single_one() -> None:
    task, batch = make_captioner(step=4), make_batch("captioning", 1)
    none, one = torch.full_like(batch.text_targets, -100), torch.full_like(batch.text_targets, -100)
    one[0, 1] = 5
    assert task({"x": replace(batch, text_targets=none)}, {"captioning": 0}).loss == 0
    alone = replace(batch, text_targets=one)
    assert_close(task({"x": alone}, {"captioning": 1}).loss.detach(), losses_of(task, alone).mean())


def test_the_worst_are_those_of_all_ranks() -> None:
    """However the captions of a micro-batch are dealt out; a rank may have none."""
    whole = {"x": make_batch("captioning", 9)}
    task = make_captioner(step=4)
    totals = task.num_targets([whole])
    output = task(whole, totals)
    output.loss.backward()
    expected = gradients(task)

    def body(world: World) -> None:
        part = take(whole, *((0, 9), (9, 9), (9, 9))[world.rank]) if world.world_size == 3 else None
        part = part or take(whole, *((0, 4), (4, 9))[world.rank])
        task = make_captioner(step=4)
        loss = task(part, totals).loss
        loss.backward()
        assert_close(all_reduce_sum(loss), output.loss.detach())
        for name, gradient in gradients(task).items():
            assert_close(all_reduce_sum(gradient), expected[name], atol=1e-10, rtol=1e-8, msg=name)

    for world_size in (2, 3):
        run_ranks(body, world_size)
