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
from mhmoe_vl.evaluation.predict import (
    embed_images,
    embed_texts,
    predict_captions,
    predict_classes,
    predict_nlvr2,
    predict_vqa,
)
from tests.unit.data.builders import word_tokenizer
from tests.unit.evaluation.captioner import Scores, make_captioner, make_tokenizer
from tests.unit.tasks.builders import NUM_ANSWERS, NUM_CLASSES, make_batch, make_task

ANSWERS = [f"answer {number}" for number in range(NUM_ANSWERS)]
CLASSES = [f"class {number}" for number in range(NUM_CLASSES)]
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


def test_classes_from_the_best_down() -> None:
    task = make_task("classification", drop_path=0.5)
    split = batches("classification", ("a", "b"), ("c",), ())
    found = predict_classes(task, split, CLASSES)
    assert list(found) == ["a", "b", "c"]
    for batch in split:
        for name, row in zip(batch.sample_ids, task.logits(batch)[0], strict=True):
            assert found[name] == [CLASSES[index] for index in sorted(range(NUM_CLASSES), key=lambda i: -row[i])]


def test_embeddings_of_images_and_of_every_different_text() -> None:
    task = make_task("retrieval", drop_path=0.5)
    split = batches("retrieval", ("7", "x"), ("5",), ())
    images = embed_images(task, split)
    assert not task.training
    assert list(images) == ["7", "x", "5"]
    torch.testing.assert_close(images["5"], task.embed_images(split[1].image)[0][0])
    # Ids of words begin at 5, and the model knows 30. The longest is cut.
    tokenizer = word_tokenizer(25)
    texts = ["w1 w2 w3", "w9", "w1 w2 w3", "w4 w5 w6 w7 w8 w9"]
    found = embed_texts(task, texts, tokenizer, text_length=6, batch_size=2)
    assert found.keys() == set(texts)
    for text, embedding in found.items():
        alone = task.embed_texts(torch.tensor([tokenizer.encode(text, 6)]), None)[0][0]
        torch.testing.assert_close(embedding, alone)
    assert embed_texts(task, [], tokenizer, text_length=6, batch_size=2) == {}


def test_images_with_one_id() -> None:
    with pytest.raises(DataError, match="1 of 3 images have the id of another one"):
        embed_images(make_task("retrieval"), batches("retrieval", ("7", "x"), ("7",)))


def test_image_ids_that_cannot_be_scored() -> None:
    with pytest.raises(DataError, match=r"image ids must be whole numbers .*'a1'; repack with numeric ids"):
        predict_captions(make_captioner(), batches("captioning", ("a1",)), make_tokenizer(), SETTINGS)


@pytest.mark.parametrize("kind", ["vqa", "nlvr2", "captioning", "retrieval", "classification"])
def test_a_broken_sample_is_not_replaced_by_its_neighbour(kind: str) -> None:
    whole, broken = batches(kind, ("1", "2"), ("3", "4"))
    split = [whole, replace(broken, problems=("shard-000001.tar: x: broken JPEG image", "another"))]
    predictors: dict[str, Callable[[], object]] = {
        "vqa": lambda: predict_vqa(make_task(kind), split, ANSWERS),
        "nlvr2": lambda: predict_nlvr2(make_task(kind), split),
        "captioning": lambda: predict_captions(make_captioner(), split, make_tokenizer(), SETTINGS),
        "retrieval": lambda: embed_images(make_task(kind), split),
        "classification": lambda: predict_classes(make_task(kind), split, CLASSES),
    }
    with pytest.raises(DataError, match=r"cannot evaluate on broken samples: shard-000001.tar: x: broken JPEG image$"):
        predictors[kind]()


def test_predictions_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "gather_objects", lambda own: [own, {"99": "from the other rank"}])
    found = predict_vqa(make_task("vqa"), batches("vqa", ("1",)), ANSWERS)
    assert found.keys() == {1, 99}
    assert found[99] == "from the other rank"
