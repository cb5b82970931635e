"""What each task predicts from what, and how it is scored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from mhmoe_vl.tasks.nlvr2 import Nlvr2Task
from mhmoe_vl.tasks.pretrain import PretrainTask
from mhmoe_vl.tasks.vqa import VqaTask
from tests.unit.tasks.builders import byte_images, make_batch, make_micro_batch, make_task

WEIGHTS = {"mim_weight": 2.0, "mlm_weight": 0.5, "pair_mim_weight": 3.0, "pair_mlm_weight": 0.25}


def test_pretraining_predicts_hidden_patches_and_tokens() -> None:
    task = make_task("pretrain", "dense", options=WEIGHTS)
    assert isinstance(task, PretrainTask)
    batches = make_micro_batch("pretrain", 4)
    totals = task.num_targets([batches, batches])
    output = task(batches, totals)
    expected = torch.zeros(())
    for source, batch in batches.items():
        encoded = task.encoder(batch.image, batch.text_ids, text_valid=batch.text_valid, image_mask=batch.image_mask)
        prefix = "pair_" if source == "pair" else ""
        if batch.image is not None:
            hidden = batch.image_mask
            logits = task.mim_head(encoded.vision[:, 1:][hidden])
            codes = task.codebook.encode(batch.image)[hidden]
            loss = F.cross_entropy(logits, codes, reduction="sum")
            assert totals[f"{prefix}mim"] == 2 * len(codes)
            assert_close(output.sums[f"{prefix}mim"], loss)
            assert output.counts[f"{prefix}mim_accuracy"] == len(codes)
            assert output.sums[f"{prefix}mim_accuracy"] == (logits.argmax(-1) == codes).sum()
            expected = expected + WEIGHTS[f"{prefix}mim_weight"] * loss / (2 * len(codes))
        if batch.text_targets is not None:
            rows = batch.text_targets >= 0
            loss = F.cross_entropy(task.mlm_head(encoded.text[rows]), batch.text_targets[rows], reduction="sum")
            assert totals[f"{prefix}mlm"] == 2 * int(rows.sum())
            assert_close(output.sums[f"{prefix}mlm"], loss)
            expected = expected + WEIGHTS[f"{prefix}mlm_weight"] * loss / (2 * int(rows.sum()))
    assert_close(output.loss, expected)


def test_hidden_patches_are_hidden() -> None:
    """Of the image under the mask only the targets remain."""
    task = make_task("pretrain", "dense")
    batch = make_batch("image", 2)
    mask = batch.image_mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = replace(batch, image=torch.where(mask, byte_images(2, seed=9), batch.image))
    hidden = [task.encoder(b.image, image_mask=b.image_mask).vision for b in (batch, other)]
    assert torch.equal(hidden[0], hidden[1])
    totals = task.num_targets([{"image": batch}])
    assert task({"image": batch}, totals).loss != task({"image": other}, totals).loss


def test_vqa_by_hand() -> None:
    task = make_task("vqa", "dense")
    assert isinstance(task, VqaTask)
    batch = make_batch("vqa", 3)
    output = task({"vqa": batch}, {"vqa": 12})
    logits = task.logits(batch)[0]
    probability, scores = torch.sigmoid(logits.double()), batch.answer_scores.double()
    loss = -(scores * probability.log() + (1 - scores) * (1 - probability).log()).sum()
    assert_close(output.loss.double(), loss / 12, atol=1e-5, rtol=1e-5)
    assert task.num_targets([{"vqa": batch}, {"vqa": batch}]) == {"vqa": 6}
    right = sum(float(scores[row, logits[row].argmax()]) for row in range(3))
    assert output.sums["vqa_accuracy"].item() == pytest.approx(right)
    assert output.counts["vqa_accuracy"] == 3


def test_nlvr2_is_two_passes() -> None:
    task = make_task("nlvr2")
    assert isinstance(task, Nlvr2Task)
    batch = make_batch("nlvr2", 3)
    left, right = (
        task.encoder(image, batch.text_ids, text_valid=batch.text_valid) for image in (batch.image, batch.right_image)
    )
    features = [torch.stack([encoded.vision[:, 0], encoded.text[:, 0]], dim=1) for encoded in (left, right)]
    expected = task.nlvr2_head(*features)
    assert_close(task.logits(batch)[0], expected)
    output = task({"nlvr2": batch}, {"nlvr2": 3})
    assert output.sums["nlvr2_accuracy"] == (expected.argmax(-1) == batch.label).sum()
    swapped = replace(batch, image=batch.right_image, right_image=batch.image)
    assert not torch.isclose(task.logits(swapped)[0], expected).any()


def test_nlvr2_examples_without_a_label_do_not_count() -> None:
    task = make_task("nlvr2", "dense")
    batch = make_batch("nlvr2", 4)
    unlabelled = replace(batch, label=torch.tensor([1, -1, 0, -1]))
    assert task.num_targets([{"nlvr2": unlabelled}]) == {"nlvr2": 2}
    output = task({"nlvr2": unlabelled}, {"nlvr2": 2})
    assert output.counts["nlvr2_accuracy"] == output.counts["nlvr2"] == 2
    logits = task.logits(batch)[0]
    assert_close(output.loss, F.cross_entropy(logits[[0, 2]], torch.tensor([1, 0])))


@pytest.mark.parametrize("kind", ["vqa", "nlvr2", "captioning"])
@pytest.mark.parametrize("blind", [False, True])
def test_blind_tasks_ignore_the_images(kind: str, blind: bool) -> None:
    task = make_task(kind, options={"blind": blind})
    batch = make_batch(kind, 3)
    other = replace(batch, image=byte_images(3, seed=7))
    totals = task.num_targets([{kind: batch}])
    losses = [task({kind: b}, totals).loss.item() for b in (batch, other)]
    assert (losses[0] == losses[1]) == blind
    if kind == "nlvr2":
        other = replace(batch, right_image=byte_images(3, seed=7))
        assert (task({kind: other}, totals).loss.item() == losses[0]) == blind


def test_captions_are_predicted_from_the_image_and_what_comes_before() -> None:
    task = make_task("captioning", "dense", options={"label_smoothing": 0.0})
    batch = make_batch("captioning", 2)
    valid = torch.ones(2, 6, dtype=torch.bool)
    targets = torch.full((2, 6), -100)
    targets[:, 3] = torch.tensor([5, 6])
    batch = replace(batch, text_valid=valid, text_targets=targets)
    assert task.num_targets([{"captioning": batch}]) == {"captioning": 2}

    def loss(changed: slice) -> float:
        ids = batch.text_ids.clone()
        ids[:, changed] = (ids[:, changed] + 1) % 30
        return task({"captioning": replace(batch, text_ids=ids)}, {"captioning": 2}).loss.item()

    unchanged = loss(slice(0, 0))
    assert loss(slice(4, 6)) == pytest.approx(unchanged, rel=1e-6)
    for before in range(4):
        assert loss(slice(before, before + 1)) != pytest.approx(unchanged, rel=1e-4)


def test_label_smoothing_is_for_training() -> None:
    batches = make_micro_batch("captioning", 3)
    smoothed, plain = (make_task("captioning", "dense", options={"label_smoothing": rate}) for rate in (0.3, 0.0))
    totals = plain.num_targets([batches])
    assert smoothed(batches, totals).loss != plain(batches, totals).loss
    assert torch.equal(smoothed.eval()(batches, totals).loss, plain.eval()(batches, totals).loss)
