"""Texts of any length into rows of one length.

A text that is longer than a row is cut into pieces, and pieces share rows. Attention keeps pieces apart and positions
start again in each, so that *how* they are packed changes nothing but the padding: a rank packs what it is dealt, and a
run on another number of ranks computes the same.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Part of a text: input ids, the id that follows each of them, and the seed of the sample."""

    ids: list[int]
    targets: list[int]
    seed: int


def pieces_of(ids: list[int], targets: list[int], seed: int, row_length: int) -> list[Piece]:
    """A text as pieces of at most ``row_length`` tokens: every target is in exactly one of them."""
    return [
        Piece(ids[start : start + row_length], targets[start : start + row_length], seed)
        for start in range(0, len(ids), row_length)
    ]


def pack_pieces(pieces: Sequence[Piece], row_length: int) -> list[list[Piece]]:
    """Rows of pieces, each of at most ``row_length`` tokens together: best fit, the longest first.

    Best-fit decreasing needs at most 11/9 of the fewest rows, and one (Johnson, 1973); equally long pieces keep their
    order, so that the same pieces give the same rows.
    """
    rows: list[list[Piece]] = []
    # (room, number) of rows that are not full, in order.
    open_rows: list[tuple[int, int]] = []
    for piece in sorted(pieces, key=lambda piece: -len(piece.ids)):
        fitting = bisect_left(open_rows, (len(piece.ids), 0))
        if fitting < len(open_rows):
            room, number = open_rows.pop(fitting)
            rows[number].append(piece)
        else:
            room, number = row_length, len(rows)
            rows.append([piece])
        if room > len(piece.ids):
            insort(open_rows, (room - len(piece.ids), number))
    return rows
