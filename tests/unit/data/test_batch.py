"""Examples to batches."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from mhmoe_vl.data.batch import Batch, Example, collate
from mhmoe_vl.data.masking import IGNORE

PAD = 9


def example(number: int, text: list[int]) -> Example:
    """Every field filled, so that a field that collate forgets is noticed."""
    return Example(
        sample_id=f"s{number}",
        seed=2**62 + number,
        image=torch.full((3, 4, 4), number, dtype=torch.uint8),
        right_image=torch.full((3, 4, 4), number + 100, dtype=torch.uint8),
        image_mask=torch.tensor([True, False, False, number == 1]),
        image_codes=torch.tensor([5, 6, 7, number]),
        text_ids=text,
        text_targets=[IGNORE, *text[1:]],
        answer_scores=torch.tensor([0.3, number]),
        label=number,
    )


def test_texts_are_padded_to_the_longest_and_the_rest_is_stacked() -> None:
    examples = [example(0, [1, 5, 2]), example(1, [1, 5, 6, 7, 2])]
    batch = collate(examples, examples[0], pad_id=PAD, problems=["one"])
    assert len(batch) == 2
    assert batch.sample_ids == ("s0", "s1")
    assert batch.seed.tolist() == [2**62, 2**62 + 1]
    assert batch.text_ids.tolist() == [[1, 5, 2, PAD, PAD], [1, 5, 6, 7, 2]]  # type: ignore[union-attr]
    assert batch.text_valid.tolist() == [[True, True, True, False, False], [True] * 5]  # type: ignore[union-attr]
    assert batch.text_targets.tolist() == [[IGNORE, 5, 2, IGNORE, IGNORE], [IGNORE, 5, 6, 7, 2]]  # type: ignore[union-attr]
    assert batch.image[1].unique().tolist() == [1]  # type: ignore[index]
    assert batch.right_image[1].unique().tolist() == [101]  # type: ignore[index]
    assert batch.image_mask.sum(1).tolist() == [1, 2]  # type: ignore[union-attr]
    assert batch.image_codes.tolist() == [[5, 6, 7, 0], [5, 6, 7, 1]]  # type: ignore[union-attr]
    assert batch.answer_scores.tolist() == [[pytest.approx(0.3), 0], [pytest.approx(0.3), 1]]  # type: ignore[union-attr]
    assert batch.label.tolist() == [0, 1]  # type: ignore[union-attr]
    assert batch.problems == ("one",)


def test_an_empty_batch_has_the_fields_types_and_shapes_of_its_kind() -> None:
    template = example(0, [1, 5, 2])
    full, empty = collate([template], template, pad_id=PAD), collate([], template, pad_id=PAD)
    assert len(empty) == 0
    for field in fields(Batch):
        expected, found = getattr(full, field.name), getattr(empty, field.name)
        if isinstance(expected, Tensor):
            assert found.dtype == expected.dtype, field.name
            assert found.shape[0] == 0
            if field.name not in ("text_ids", "text_valid", "text_targets"):
                assert found.shape[1:] == expected.shape[1:], field.name
    assert empty.text_ids.shape == (0, 2)  # type: ignore[union-attr]


def test_fields_that_a_kind_lacks_are_none() -> None:
    only_text = Example("a", 0, text_ids=[1, 2])
    for examples in ([only_text], []):
        batch = collate(examples, only_text, pad_id=PAD)
        present = {field.name for field in fields(Batch) if getattr(batch, field.name) is not None}
        assert present == {"sample_ids", "seed", "text_ids", "text_valid", "problems"}


def test_moving_a_batch_moves_every_tensor_and_keeps_the_rest() -> None:
    packed = Example("d", 0, text_ids=[1, 2], text_targets=[2, 3], row_length=4, num_bytes=3, num_characters=3)
    mixed = Example("m", 0, label=1, other_label=2, label_share=torch.tensor(0.25))
    names = set()
    for template in (example(0, [1, 5, 2]), packed, mixed):
        batch = collate([template], template, pad_id=PAD, problems=["p"])
        moved = batch.to(torch.device("meta"))
        assert (moved.sample_ids, moved.problems) == ((template.sample_id,), ("p",))
        tensors = {f.name: getattr(moved, f.name) for f in fields(Batch) if isinstance(getattr(batch, f.name), Tensor)}
        assert all(tensor.is_meta for tensor in tensors.values())
        names |= set(tensors)
    assert names == {field.name for field in fields(Batch)} - {"sample_ids", "problems"}
