"""The headline figures of all evaluated tasks as one small JSON file, for scripts and continuous integration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mhmoe_vl.evaluation.results_files import write_text
from mhmoe_vl.evaluation.score_card import ScoreCard


def headline_scores(cards: Sequence[ScoreCard]) -> dict[str, dict[str, float | int | None]]:
    """Score, baselines and number of items by task: accuracies in percent, CIDEr times 100, as in the cards."""
    return {
        card.task: {"score": card.score, "majority": card.majority, "blind": card.blind, "n": card.n} for card in cards
    }


def write_scores(path: Path, cards: Sequence[ScoreCard]) -> None:
    """Write :func:`headline_scores`.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(path, json.dumps(headline_scores(cards), indent=2) + "\n")
