"""What can be scored without looking: majority and text-only priors, counted on the training split.

A score means nothing without these beside it. The text-only prior remembers, for every training text, the best
answer to it; a text it has never seen is answered like the longest opening words that it has.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: Answer and how much a training text speaks for it.
Votes = Mapping[str, float]


class TextPrior:
    """Best answer given the text alone, by counting.

    Args:
        examples: (text, votes for each answer) of the training split.

    Raises:
        ValueError: no examples.
    """

    def __init__(self, examples: Iterable[tuple[str, Votes]]) -> None:
        by_opening: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for text, votes in examples:
            words = _words(text)
            for length in range(len(words) + 1):
                by_opening[words[:length]].update(votes)
        if not by_opening:
            raise ValueError("a prior needs at least one example")
        self._best = {opening: _winner(votes) for opening, votes in by_opening.items()}

    @property
    def majority(self) -> str:
        """The best answer to everything."""
        return self._best[()]

    def answer(self, text: str) -> str:
        """The best answer to this text, or to its longest known opening."""
        words = _words(text)
        openings = (words[:length] for length in range(len(words), -1, -1))
        return next(self._best[opening] for opening in openings if opening in self._best)


def vqa_prior(annotations: Sequence[Mapping[str, Any]]) -> TextPrior:
    """Prior over answers, with each training question's soft scores as votes."""
    return TextPrior((a["question"], a["labels"]) for a in annotations)


def nlvr2_prior(examples: Sequence[Mapping[str, Any]]) -> TextPrior:
    """Prior over ``"True"`` and ``"False"``."""
    return TextPrior((e["sentence"], {str(bool(e["label"])): 1.0}) for e in examples)


def _words(text: str) -> tuple[str, ...]:
    return (*text.lower().split(), "</s>")


def _winner(votes: Counter[str]) -> str:
    """The answer with most votes; the first in the alphabet among equals, so that runs agree."""
    return min(votes, key=lambda answer: (-votes[answer], answer)) if votes else ""
