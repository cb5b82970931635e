"""Classes from the mean of the patches, with the encoder trained along or frozen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch.nn import functional as F
from torch.testing import assert_close

from mhmoe_vl.tasks.classification import ClassificationTask
from mhmoe_vl.train.optimizer import OptimizerConfig, build_optimizer
from tests.unit.tasks.builders import NUM_CLASSES, gradients, make_batch, make_micro_batch, make_task


def test_by_hand() -> None:
    task = make_task("classification", "dense", options={"label_smoothing": 0.0})
    assert isinstance(task, ClassificationTask)
    batch = make_batch("classification", 4)
    patches = task.encoder(batch.image).vision[:, 1:].mean(1)
    head = task.classification_head
    normed = (patches - patches.mean(1, keepdim=True)) / (patches.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    scores = (normed * head.norm.weight + head.norm.bias) @ head.linear.weight.T + head.linear.bias
    assert scores.shape == (4, NUM_CLASSES)
    output = task({"x": batch}, {"classification": 8.0})
    assert batch.label is not None
    probabilities = scores.softmax(-1)[torch.arange(4), batch.label]
    assert_close(output.sums["classification"], -probabilities.log().sum())
    assert_close(output.loss, -probabilities.log().sum() / 8)
    assert output.sums["classification_accuracy"] == (scores.argmax(1) == batch.label).sum()
    assert output.counts["classification"] == 4
    assert task.num_targets([{"x": batch}, {"x": batch}]) == {"classification": 8}


def test_label_smoothing_is_for_training() -> None:
    smoothed, plain = (make_task("classification", "dense", options={"label_smoothing": s}) for s in (0.3, 0.0))
    batch = make_micro_batch("classification", 3)
    batch_of = batch["classification"]
    logits = plain.logits(batch_of)[0]  # type: ignore[operator]
    uniform = -logits.log_softmax(-1).mean(-1).sum()
    expected = 0.7 * F.cross_entropy(logits, batch_of.label, reduction="sum") + 0.3 * uniform
    assert_close(smoothed(batch, {"classification": 1.0}).loss, expected)
    assert torch.equal(
        smoothed.eval()(batch, {"classification": 1.0}).loss, plain.eval()(batch, {"classification": 1.0}).loss
    )


def test_a_mixed_image_is_of_both_classes() -> None:
    """Against timm's dense targets and their loss, smoothing included."""
    task = make_task("classification", "dense", options={"label_smoothing": 0.1})
    share_B = torch.tensor([1.0, 0.9, 0.3, 0.5])
    batch = make_batch("classification", 4)
    assert batch.label is not None
    logits_BC = task.logits(batch)[0]  # type: ignore[operator]
    # What the task says is the first label, the lesser of two, the greater second one, and one of two halves.
    said_B, none_B = logits_BC.argmax(1), (logits_BC.argmax(1) + 1) % NUM_CLASSES
    is_first_B = torch.tensor([True, False, False, True])
    other_B = torch.where(is_first_B, none_B, said_B)
    batch = replace(batch, label=torch.where(is_first_B, said_B, none_B), other_label=other_B, label_share=share_B)
    assert batch.label is not None
    # timm mixes a batch with itself turned round: the first row of (a, b) is a's.
    targets = [
        mixup_target(torch.stack([batch.label[n], other_B[n]]), NUM_CLASSES, float(share), 0.1)[0]
        for n, share in enumerate(share_B)
    ]
    expected = 4 * SoftTargetCrossEntropy()(logits_BC, torch.stack(targets).to(logits_BC))
    output = task({"x": batch}, {"classification": 1.0})
    assert_close(output.loss, expected.to(output.loss))
    assert output.sums["classification_accuracy"] == 3


def test_no_text_is_needed() -> None:
    task = make_task("classification", modalities=("vision",))
    task(make_micro_batch("classification", 2), {"classification": 2.0}).loss.backward()
    assert not any("text" in name for name, _ in task.named_parameters())


@pytest.mark.parametrize("ffn", ["dense", "mhmoe"])
def test_a_linear_probe_trains_the_head_alone(ffn: str) -> None:
    moe = {"balance_weight": 0.5, "selection_bias_rate": 0.1}
    options = {"linear_probe": True}
    task = make_task("classification", ffn, options=options, moe=moe, drop_path=0.5).train()
    batch = make_micro_batch("classification", 6)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    optimizer = build_optimizer(task, OptimizerConfig(learning_rate=0.1))
    trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    assert trained == sum(parameter.numel() for parameter in task.head_parameters())
    output = task(batch, {"classification": 6.0})
    output.loss.backward()
    found = gradients(task)
    assert {name for name, grad in found.items() if grad.any()} == {
        f"classification_head.{name}" for name in ("norm.weight", "norm.bias", "linear.weight", "linear.bias")
    }
    # No branch is dropped, and nothing but the head decides: the features are those of evaluation.
    again = replace(batch["classification"], seed=batch["classification"].seed + 7)
    assert torch.equal(task.logits(again)[0], task.eval().logits(batch["classification"])[0])  # type: ignore[operator]
    optimizer.step()
    task.update_selection_bias(output.load_E)
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("encoder."), name


def test_the_probe_s_head_learns_as_in_fine_tuning() -> None:
    batch = make_micro_batch("classification", 6)
    of_head = []
    for linear_probe in (False, True):
        task = make_task("classification", "dense", options={"linear_probe": linear_probe})
        task(batch, {"classification": 6.0}).loss.backward()
        of_head.append({name: grad for name, grad in gradients(task).items() if not name.startswith("encoder.")})
    for name, grad in of_head[0].items():
        assert_close(of_head[1][name], grad)
