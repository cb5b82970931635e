"""Texts of any length into rows of one length."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_vl.data.batch import Example, collate
from mhmoe_vl.data.masking import IGNORE
from mhmoe_vl.data.rows import Piece, pack_pieces, pieces_of


def piece(length: int, seed: int = 0) -> Piece:
    return Piece(list(range(length)), list(range(1, length + 1)), seed)


def test_rows_by_hand() -> None:
    """7 opens a row and 6 another; 4 fits behind 6, where it leaves nothing, 3 behind 7, and 2 needs a third row."""
    rows = pack_pieces([piece(length) for length in (3, 6, 2, 7, 4)], 10)
    assert [[len(p.ids) for p in row] for row in rows] == [[7, 3], [6, 4], [2]]


def test_the_fullest_row_that_has_room_is_taken() -> None:
    rows = pack_pieces([piece(length, seed) for seed, length in enumerate((6, 8, 2, 2))], 10)
    assert [[p.seed for p in row] for row in rows] == [[1, 2], [0, 3]]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
@settings(max_examples=60, deadline=None)
def test_every_piece_is_in_one_row_and_rows_are_full(lengths: list[int], row_length: int) -> None:
    pieces = [piece(length, seed) for seed, length in enumerate(lengths)]
    rows = pack_pieces(pieces, row_length)
    assert sorted(p.seed for row in rows for p in row) == list(range(len(pieces)))
    filled = [sum(len(p.ids) for p in row) for row in rows]
    assert max(filled, default=0) <= row_length
    # Best-fit decreasing: 11/9 of the fewest rows, for which the sum is a lower bound that needs room for halves.
    assert len(rows) <= math.ceil(2 * sum(lengths) / row_length) + 1
    assert all(a + b > row_length for a, b in itertools.pairwise(filled))
    assert rows == pack_pieces(pieces, row_length)


def test_a_long_text_loses_nothing() -> None:
    ids, targets = list(range(100, 123)), list(range(101, 124))
    pieces = pieces_of(ids, targets, 5, 10)
    assert [len(p.ids) for p in pieces] == [10, 10, 3]
    assert [i for p in pieces for i in p.ids] == ids
    assert [t for p in pieces for t in p.targets] == targets


def example(number: int, length: int) -> Example:
    ids = [10 * number + place for place in range(length + 1)]
    return Example(
        f"d{number}", number, text_ids=ids[:-1], text_targets=ids[1:], row_length=5, num_bytes=3 * length,
        num_characters=length,
    )  # fmt: skip


def test_a_batch_by_hand() -> None:
    """Texts of 7 (which is 5 and 2), 3 and 1 tokens; ids are ten times the number of the text, and up."""
    examples = [example(1, 7), example(2, 3), example(3, 1)]
    batch = collate(examples, examples[0], pad_id=0)
    assert batch.text_ids.tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, 15, 16], [30, 0, 0, 0, 0]]
    assert batch.text_targets.tolist() == [[11, 12, 13, 14, 15], [21, 22, 23, 16, 17], [31, *[IGNORE] * 4]]
    assert batch.text_positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    assert batch.text_seed.tolist() == [[1] * 5, [2, 2, 2, 1, 1], [3, 0, 0, 0, 0]]
    assert torch.equal(batch.text_valid, batch.text_targets != IGNORE)
    assert (batch.num_bytes.tolist(), batch.num_characters.tolist()) == ([21, 9, 3], [7, 3, 1])
    assert (batch.sample_ids, batch.seed.tolist(), batch.label) == (("d1", "d2", "d3"), [1, 2, 3], None)


def test_rows_are_no_longer_than_the_fullest() -> None:
    examples = [example(1, 2), example(2, 1)]
    assert collate(examples, examples[0], pad_id=0).text_ids.tolist() == [[10, 11, 20]]


def test_a_rank_without_documents() -> None:
    batch = collate([], example(1, 3), pad_id=0)
    for tensor in (batch.text_ids, batch.text_valid, batch.text_targets, batch.text_positions, batch.text_seed):
        assert tensor.shape == (0, 2)
    assert batch.num_bytes.shape == batch.num_characters.shape == (0,)
