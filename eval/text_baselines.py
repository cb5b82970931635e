"""What questions and sentences give away without the images: a counted prior, and a model trained blind."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from eval.command_line import Evaluation
from mhmoe_vl.distributed.world import World
from mhmoe_vl.evaluation.prior import TextPrior

Id = TypeVar("Id", int, str)


class TwinEvaluation(Evaluation):
    """An evaluation that a twin trained without images can take as well."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        text = "run with task.blind=true; it answers in the predict step, and its score is printed as blind"
        parser.add_argument("--blind-run", type=Path, help=text)

    def predict_blind(self, args: argparse.Namespace, world: World) -> None:
        if args.blind_run is not None:
            self.predict(args.blind_run, self.twin_predictions(args.blind_run), args, world)

    def twin_predictions(self, blind_run: Path) -> Path:
        """Where the twin's answers are."""
        return blind_run / self.predictions_name


@dataclass(frozen=True)
class TextBaselines:
    """Accuracy in percent of what answers without looking; None where there is nothing to count on.

    Attributes:
        majority: of the most frequent answer.
        blind: of the better text-only answerer.
        notes: which answerer that is.
    """

    majority: float | None
    blind: float | None
    notes: tuple[str, ...]


def text_baselines(
    accuracy: Callable[[Mapping[Id, str]], float],
    texts: Mapping[Id, str],
    prior: TextPrior | None,
    twin: Mapping[Id, str] | None,
) -> TextBaselines:
    """Score the baselines of a task that answers texts about images.

    Args:
        accuracy: of predictions, in percent.
        texts: question or sentence of every item.
        prior: counted on the training split, if that is at hand.
        twin: predictions of a model trained without images, if there is one.
    """
    majority = None if prior is None else accuracy(dict.fromkeys(texts, prior.majority))
    by_prior = None if prior is None else accuracy({key: prior.answer(text) for key, text in texts.items()})
    by_twin = None if twin is None else accuracy(twin)
    known = {"the text-only prior counted on the training split": by_prior, "the text-only twin": by_twin}
    scored = {name: value for name, value in known.items() if value is not None}
    if not scored:
        return TextBaselines(majority, None, ())
    best = max(scored, key=lambda name: scored[name])
    others = "".join(f" ({name}: {value:.2f})" for name, value in scored.items() if name != best)
    return TextBaselines(majority, scored[best], (f"blind is {best}{others}",))
