"""Distinct experts by class of words, by place within words, and by word.

Shape suffixes: R rows of text, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from mhmoe_vl.analysis.result import ClassDivergence, WordDivergence
from mhmoe_vl.analysis.words import PIECE_PLACES, SPECIAL, WORD_CLASSES, WordSplitter
from mhmoe_vl.data.batch import Batch

_GROUPS = (*WORD_CLASSES, *PIECE_PLACES)
_NUM_EXTREMES = 20
_MIN_WORD_COUNT = 5


class WordSums:
    """Running sums over pieces, in groups; and over the occurrences of every word.

    Attributes:
        min_count: words that occur less often are not ranked: the mean of a few occurrences is noise.
    """

    def __init__(self, splitter: WordSplitter, *, min_count: int = _MIN_WORD_COUNT) -> None:
        self.splitter, self.min_count = splitter, min_count
        #: Pieces of each group, and the sums over them: of their means over layers, and in each layer.
        self._pieces = torch.zeros(len(_GROUPS), dtype=torch.long)
        self._means = torch.zeros(len(_GROUPS), dtype=torch.float64)
        self._counts: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        #: Number of occurrences, sum of their means, and class.
        self._words: dict[str, tuple[int, float, str]] = {}

    def add(self, batch: Batch, distinct: Mapping[str, Tensor]) -> None:
        """Take up a batch.

        Args:
            distinct: int64 ``[R, L]`` on the CPU, of every sparse layer, by name.
        """
        assert batch.text_ids is not None
        ids_RL = batch.text_ids.cpu()
        valid_RL = torch.ones_like(ids_RL, dtype=torch.bool) if batch.text_valid is None else batch.text_valid.cpu()
        mean_RL = torch.stack([of_layer.double() for of_layer in distinct.values()]).mean(0)
        groups_2RL = torch.full((2, *ids_RL.shape), -1)
        for row in range(ids_RL.shape[0]):
            for text, cut_first, cut_last in self._texts(batch, row, int(valid_RL[row].sum())):
                self._add_text(
                    ids_RL[row, text].tolist(),
                    mean_RL[row, text].tolist(),
                    groups_2RL[:, row, text],
                    slice(int(cut_first), -1 if cut_last else None),
                )
        for groups_RL in groups_2RL:
            chosen = groups_RL >= 0
            groups = groups_RL[chosen]
            counts = torch.bincount(groups, minlength=len(_GROUPS))
            self._pieces += counts
            self._means += torch.bincount(groups, mean_RL[chosen], minlength=len(_GROUPS))
            for name, of_layer in distinct.items():
                sums = torch.bincount(groups, of_layer[chosen].double(), minlength=len(_GROUPS))
                self._counts[name] = self._counts.get(name, 0) + counts
                self._sums[name] = self._sums.get(name, 0) + sums

    def _texts(self, batch: Batch, row: int, length: int) -> Iterator[tuple[slice, bool, bool]]:
        """Where the texts of a row are, less padding on the right, and whether the row cuts their first and their last
        word: of a packed row, texts that do not begin with ``<s>``, and those that ``</s>`` does not follow."""
        assert batch.text_ids is not None
        if batch.text_positions is None or batch.text_targets is None:
            yield slice(0, length), False, False
            return
        starts = (batch.text_positions[row, :length] == 0).nonzero().flatten().tolist()
        for start, end in pairwise([*starts, length]):
            is_begun = int(batch.text_ids[row, start]) != self.splitter.bos_id
            is_broken = int(batch.text_targets[row, end - 1]) != self.splitter.eos_id
            yield slice(start, end), is_begun, is_broken

    def _add_text(self, ids: list[int], means: list[float], groups_2L: Tensor, whole: slice) -> None:
        """Args:
        whole: which of the words are not cut.
        """
        pieces = self.splitter.pieces(ids)
        for place, piece in enumerate(pieces):
            if piece.word < 0:
                groups_2L[0, place] = _GROUPS.index(SPECIAL)
        for word in self.splitter.words(pieces)[whole]:
            places = list(word.places)
            groups_2L[0, places] = _GROUPS.index(word.word_class)
            if word.word_class != "punctuation":
                groups_2L[1, places] = _GROUPS.index(PIECE_PLACES[1])
                groups_2L[1, places[0]] = _GROUPS.index(PIECE_PLACES[0])
            count, total, _ = self._words.get(word.text, (0, 0.0, ""))
            mean = sum(means[place] for place in places) / len(places)
            self._words[word.text] = (count + 1, total + mean, word.word_class)

    def classes(self) -> list[ClassDivergence]:
        """Of all groups that occur."""
        return [
            ClassDivergence(
                name=group,
                num_pieces=num_pieces,
                mean=float(self._means[index] / num_pieces),
                by_layer={
                    name: float(self._sums[name][index] / count)
                    for name, of_layer in self._counts.items()
                    if (count := int(of_layer[index]))
                },
            )
            for index, (group, num_pieces) in enumerate(zip(_GROUPS, self._pieces.tolist(), strict=True))
            if num_pieces
        ]

    def extremes(self) -> tuple[list[WordDivergence], list[WordDivergence]]:
        """The words with the highest and the lowest means; no word is in both."""
        ranked = sorted(
            (
                WordDivergence(word, of_class, count, total / count)
                for word, (count, total, of_class) in self._words.items()
                if count >= self.min_count
            ),
            key=lambda word: (-word.mean, word.word),
        )
        num = min(_NUM_EXTREMES, len(ranked) // 2)
        return ranked[:num], ranked[::-1][:num]
