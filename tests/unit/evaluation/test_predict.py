"""Predictions over a split: the best answer of every sample, by its own id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mhmoe_vl.data.batch import Batch
from mhmoe_vl.errors import DataError
from mhmoe_vl.evaluation import predict
from mhmoe_vl.evaluation.beam_search import BeamSettings
from mhmoe_vl.evaluation.predict import predict_captions, predict_nlvr2, predict_vqa
from tests.unit.evaluation.captioner import Scores, make_captioner, make_tokenizer
from tests.unit.tasks.builders import NUM_ANSWERS, make_batch, make_task

ANSWERS = [f"answer {number}" for number in range(NUM_ANSWERS)]
SETTINGS = BeamSettings(1, 4, 0.0)


def batches(kind: str, *ids: tuple[str, ...]) -> list[Batch]:
    return [replace(make_batch(kind, len(of_one), seed=n), sample_ids=of_one) for n, of_one in enumerate(ids)]


def test_vqa() -> None:
    task = make_task("vqa", drop_path=0.5)
    split = batches("vqa", ("12", "7"), ("5",), ())
    found = predict_vqa(task, split, ANSWERS)
    assert not task.training
    expected = {}
    for batch in split:
        encoded = task.encoder(batch.image, batch.text_ids, text_valid=batch.text_valid)
        scores = task.vqa_head(encoded.vision[:, 0])
        expected |= {int(name): ANSWERS[row.argmax()] for name, row in zip(batch.sample_ids, scores, strict=True)}
    assert found == expected
    assert list(found) == [12, 7, 5]
    # Training would have dropped branches of these samples.
    assert not torch.equal(task.train().logits(split[0])[0], task.eval().logits(split[0])[0])


def test_nlvr2() -> None:
    task = make_task("nlvr2")
    split = batches("nlvr2", ("dev-1-0-0", "dev-1-0-1", "dev-2-0-0"), ("dev-3-0-0",))
    found = predict_nlvr2(task, split)
    probabilities = {
        name: F.softmax(row, dim=-1)[1].item()
        for batch in split
        for name, row in zip(batch.sample_ids, task.logits(batch)[0], strict=True)
    }
    assert found == {name: probability > 0.5 for name, probability in probabilities.items()}
    assert all(isinstance(judged, bool) for judged in found.values())


def test_captions() -> None:
    task, tokenizer = make_captioner(end_bias=-9.0).train(), make_tokenizer()
    split = [
        replace(batch, text_ids=None, text_valid=None, text_targets=None)
        for batch in batches("captioning", ("139", "9"), ("4",))
    ]
    found = predict_captions(task, split, tokenizer, SETTINGS)
    assert not task.training
    assert list(found) == [139, 9, 4]
    for batch in split:
        for name, image in zip(batch.sample_ids, batch.image, strict=True):
            first = Scores(task, image, tokenizer).after(())
            words = found[int(name)].split()
            assert len(words) == 4
            assert tokenizer.tokenizer.token_to_id(words[0]) == max(first, key=first.__getitem__)


def test_image_ids_that_cannot_be_scored() -> None:
    with pytest.raises(DataError, match=r"image ids must be whole numbers .*'a1'; repack with numeric ids"):
        predict_captions(make_captioner(), batches("captioning", ("a1",)), make_tokenizer(), SETTINGS)


@pytest.mark.parametrize("kind", ["vqa", "nlvr2", "captioning"])
def test_a_broken_sample_is_not_replaced_by_its_neighbour(kind: str) -> None:
    whole, broken = batches(kind, ("1", "2"), ("3", "4"))
    split = [whole, replace(broken, problems=("shard-000001.tar: x: broken JPEG image", "another"))]
    predictors: dict[str, Callable[[], object]] = {
        "vqa": lambda: predict_vqa(make_task(kind), split, ANSWERS),
        "nlvr2": lambda: predict_nlvr2(make_task(kind), split),
        "captioning": lambda: predict_captions(make_captioner(), split, make_tokenizer(), SETTINGS),
    }
    with pytest.raises(DataError, match=r"cannot evaluate on broken samples: shard-000001.tar: x: broken JPEG image$"):
        predictors[kind]()


def test_predictions_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "gather_objects", lambda own: [own, {"99": "from the other rank"}])
    found = predict_vqa(make_task("vqa"), batches("vqa", ("1",)), ANSWERS)
    assert found.keys() == {1, 99}
    assert found[99] == "from the other rank"
