"""The parts that all tasks share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mhmoe_vl.moe import MoE, MultiHeadMoE
from mhmoe_vl.tasks.base import Task, TaskOutput, masked_cross_entropy
from tests.unit.tasks.builders import TASKS, make_micro_batch, make_task


class Recording(nn.Module):
    """The identity, which remembers what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(x)
        return x


def test_cross_entropy_by_hand() -> None:
    head = Recording()
    logits = torch.tensor([[[1.0, 2.0, 0.0], [9.0, 9.0, 9.0]], [[0.0, 0.0, 0.0], [3.0, 1.0, 1.0]]])
    targets = torch.tensor([[1, -100], [2, 1]])
    loss, num_right = masked_cross_entropy(head, logits, targets)
    expected = (
        -math.log(math.e**2 / (math.e + math.e**2 + 1))
        + math.log(3)
        - math.log(math.e / (math.e**3 + 2 * math.e))
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert num_right == 1  # the first; of the second's equal scores the first class is taken
    # The head has seen the three positions with a target, and no other.
    (seen,) = head.calls
    assert_close(seen, logits[targets != -100])


def test_logits_are_widened_before_the_softmax() -> None:
    hidden = torch.randn(1, 4, 8, dtype=torch.bfloat16)
    assert masked_cross_entropy(nn.Identity(), hidden, torch.zeros(1, 4, dtype=torch.long))[0].dtype == torch.float32


def test_nothing_to_predict() -> None:
    head = nn.Linear(3, 5)
    loss, num_right = masked_cross_entropy(head, torch.randn(2, 2, 3), torch.full((2, 2), -100))
    assert (loss.item(), num_right.item()) == (0, 0)
    loss.backward()
    assert not head.weight.grad.any()


def test_figures_are_summed() -> None:
    output = TaskOutput(loss=torch.zeros(()))
    output.record("x", torch.tensor(3.0, requires_grad=True), torch.tensor(2))
    output.record("x", torch.tensor(1.0), torch.tensor(4))
    assert (output.sums["x"].item(), output.counts["x"].item()) == (4, 6)
    assert not output.sums["x"].requires_grad


@pytest.mark.parametrize("kind", TASKS)
def test_head_parameters_are_those_outside_the_encoder(kind: str) -> None:
    task = make_task(kind)
    names = {name for name, p in task.named_parameters() if any(p is head for head in task.head_parameters())}
    # The released recipe of VQA multiplies the rate of the classifier, and not that of the pooler.
    others = ("encoder.", "vqa_head.pooler.")
    assert names == {name for name, _ in task.named_parameters() if not name.startswith(others)}
    assert names


def test_a_tied_head_is_of_the_encoder() -> None:
    task = make_task("captioning", tie_embeddings=True)
    assert task.mlm_head.linear.weight is task.encoder.text_embedding.tokens.weight
    assert [p.shape for p in task.head_parameters()] == [(30,)]


def routers(task: Task) -> dict[str, nn.Module]:
    pools = {
        f"block{layer}/{name}": ffn
        for layer, block in enumerate(task.encoder.blocks)
        for name, ffn in block.ffn.pools.items()
    }
    return {
        name: (ffn.moe if isinstance(ffn, MultiHeadMoE) else ffn).router
        for name, ffn in pools.items()
        if isinstance(ffn, MoE | MultiHeadMoE)
    }


@pytest.mark.parametrize("ffn", ["smoe", "mhmoe"])
@pytest.mark.parametrize("rate", [0.0, 0.125])
def test_loss_free_balancing(ffn: str, rate: float) -> None:
    task = make_task("pretrain", ffn, vl_ffn_layers=1, moe={"selection_bias_rate": rate})
    batches = make_micro_batch("pretrain", 5)
    output = task(batches, task.num_targets([batches]))
    assert output.load_E.keys() == routers(task).keys() == {"block1/vision", "block1/text", "block1/joint"}
    task.update_selection_bias(output.load_E)
    for name, router in routers(task).items():
        load = output.load_E[name].double()
        assert_close(router.selection_bias_E, rate * torch.sign(load.mean() - load))
        assert router.selection_bias_E.any() == (rate > 0)
    task.train()
    again = task(batches, task.num_targets([batches]))
    changed = [name for name, load in output.load_E.items() if not torch.equal(again.load_E[name], load)]
    assert bool(changed) == (rate > 0)


@pytest.mark.parametrize(
    ("experts", "names"),
    [
        ("per_modality", {"block1/vision", "block1/text", "block1/joint/vision", "block1/joint/text"}),
        ("shared", {"block1/shared/vision", "block1/shared/text", "block1/joint/vision", "block1/joint/text"}),
    ],
)
def test_routing_is_reported_by_pool_and_modality(experts: str, names: set[str]) -> None:
    task = make_task("pretrain", moe={"experts": experts}, vl_ffn_layers=1)
    batches = make_micro_batch("pretrain", 3)
    output = task(batches, task.num_targets([batches]))
    assert output.routing.keys() == names
    # A class token and 16 patches, four sub-tokens each, alone and in pairs.
    alone = "block1/vision" if experts == "per_modality" else "block1/shared/vision"
    assert output.routing[alone].num_rows == output.routing["block1/joint/vision"].num_rows == 3 * 17 * 4
    num_text = {name: int(batches[name].text_valid.sum()) for name in ("text", "pair")}
    assert output.routing["block1/joint/text"].num_rows == 4 * num_text["pair"]
    assert output.routing[alone.replace("vision", "text")].num_rows == 4 * num_text["text"]
    for pool, load_E in output.load_E.items():
        of_pool = [stats.load_E for name, stats in output.routing.items() if name.startswith(pool)]
        assert torch.equal(torch.stack(of_pool).sum(0), load_E)


def test_dense_models_have_no_auxiliary_loss() -> None:
    task = make_task("vqa", "dense")
    output = task(make_micro_batch("vqa", 3), {"vqa": 3})
    assert (output.routing, output.load_E, output.shares) == ({}, {}, {})
    task.update_selection_bias({})
