"""A score with everything that it has to be read beside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mhmoe_vl.evaluation.results_files import write_text


@dataclass(frozen=True)
class ScoreCard:
    """Result of one evaluation.

    Attributes:
        task: ``vqa``, ``nlvr2``, ``captioning``, ``retrieval`` or ``classification``.
        metric: name of the headline figure, with the evaluator's version where there are several.
        score, majority, blind: the headline figure of the model, of the best constant answer (retrieval: of a random
            order), and without images, in percent (CIDEr times 100). None where a baseline could not be computed, or
            where there is none: retrieval and classification ask nothing that could be answered without the image.
        n: scored items.
        details: further figures.
        seed: of the run that was scored, if it is known.
        cost: parameters and FLOPs of the model and time of its training, if they are known.
        command: what was typed to get this card.
        notes: remarks that belong beside the score.
    """

    task: str
    metric: str
    score: float
    majority: float | None
    blind: float | None
    n: int
    details: Mapping[str, float | None] = field(default_factory=dict)
    seed: int | None = None
    cost: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    command: str = ""

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @property
    def constant(self) -> str:
        """What :attr:`majority` is called."""
        return {"captioning": "best constant caption", "retrieval": "chance"}.get(self.task, "majority")

    @property
    def has_text(self) -> bool:
        """Whether there is a text to answer blindly."""
        return self.task not in ("retrieval", "classification")

    def show(self) -> None:
        """Print as a table."""
        table = Table(title=f"{self.task}: {self.metric}", show_header=False)
        rows: list[tuple[str, str]] = [
            ("score", f"{self.score:.2f}"),
            (self.constant, _number(self.majority)),
            *((("blind (text only)", _number(self.blind)),) if self.has_text else ()),
            ("n", str(self.n)),
            *((name, _number(value)) for name, value in self.details.items()),
            *((("seed", str(self.seed)),) if self.seed is not None else ()),
            *((name.replace("_", " "), _cost(value)) for name, value in self.cost.items()),
        ]
        for row in rows:
            table.add_row(*row)
        console = Console()
        console.print(table)
        for note in self.notes:
            console.print(f"note: {note}", soft_wrap=True)


def _cost(value: float | str | None) -> str:
    return "not available" if value is None else value if isinstance(value, str) else f"{value:,}"


def _number(value: float | None) -> str:
    return "not available" if value is None else f"{value:.2f}"
