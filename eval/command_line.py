"""The command line that the evaluations share: predict, score, or one after the other."""

from __future__ import annotations

import argparse
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from mhmoe_vl.distributed.collectives import fail_together
from mhmoe_vl.distributed.world import World, launched_rank, open_world
from mhmoe_vl.errors import ConfigError, DataError, UserError, exit_on_user_error
from mhmoe_vl.evaluation.score_card import ScoreCard
from mhmoe_vl.train.trained import cost_of, seed_of, train_shards


class Evaluation(ABC):
    """What differs between the tasks.

    Attributes:
        task: ``vqa``, ``nlvr2``, ``captioning``, ``retrieval`` or ``classification``.
        predictions_name: name of the results file, the official one where there is one, inside a run directory.
        batch_size: default of ``--batch-size``.
        counts_training_data: whether its baselines are counted on training shards.
    """

    task: ClassVar[str]
    predictions_name: ClassVar[str]
    batch_size: ClassVar[int]
    counts_training_data: ClassVar[bool] = True

    @abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Options of this task alone."""

    @abstractmethod
    def predict(self, run: Path, out: Path, args: argparse.Namespace, world: World) -> None:
        """Write the predictions of ``run`` to ``out``. Collective; rank 0 writes."""

    @abstractmethod
    def predict_blind(self, args: argparse.Namespace, world: World) -> None:
        """Write the predictions of the blind baseline, if it needs a model. Collective; rank 0 writes."""

    @abstractmethod
    def score(self, args: argparse.Namespace, train_data: Sequence[str] | None) -> ScoreCard:
        """Score ``args.predictions``; ``train_data`` are the shards that baselines may be counted on."""


def evaluate(evaluation: Evaluation, argv: Sequence[str] | None = None) -> int:
    """Run one evaluation from the command line."""
    task = evaluation.task
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog=f"python -m eval.{task}")
    parser.add_argument("step", nargs="?", choices=("predict", "score", "all"), default="all")
    # Torchrun takes --run for an abbreviation of its own --run-path, wherever it stands.
    parser.add_argument(
        "--run", "--run-dir", type=Path, help="directory of a fine-tuning run; under torchrun write --run-dir"
    )
    parser.add_argument("--data", nargs="+", required=True, help="shards of the split")
    parser.add_argument("--predictions", type=Path, help=f"results file (default: RUN/{evaluation.predictions_name})")
    parser.add_argument("--train-data", nargs="+", help="shards that the baselines count (default: the run's)")
    parser.add_argument("--out", type=Path, help=f"score card JSON (default: RUN/{task}_score.json)")
    parser.add_argument("--batch-size", type=positive, default=evaluation.batch_size)
    evaluation.add_arguments(parser)
    args = parser.parse_args(argv)
    with exit_on_user_error(rank=launched_rank()), open_world() as world:
        with fail_together(UserError):
            if args.run is None and (args.step != "score" or args.predictions is None):
                raise ConfigError("--run: is required, unless step is 'score' and --predictions is given")
        args.predictions = args.predictions or args.run / evaluation.predictions_name
        if args.step in ("predict", "all"):
            evaluation.predict(args.run, args.predictions, args, world)
            evaluation.predict_blind(args, world)
        if args.step in ("score", "all") and world.is_main:
            card = replace(
                _score(evaluation, args),
                command=shlex.join(["python", "-m", f"eval.{task}", *argv]),
                seed=seed_of(args.run) if args.run else None,
                cost=cost_of(args.run) if args.run else {},
            )
            card.show()
            out = args.out or (args.run / f"{task}_score.json" if args.run else None)
            if out is not None:
                card.write(out)
    return 0


def _score(evaluation: Evaluation, args: argparse.Namespace) -> ScoreCard:
    """The score beside its baselines, or alone if the training shards that the run names cannot be read any more."""
    if args.train_data or not args.run or not evaluation.counts_training_data:
        return evaluation.score(args, args.train_data)
    shards = train_shards(args.run)
    try:
        if not shards:
            raise DataError("the run was trained on URLs alone")
        return evaluation.score(args, shards)
    except DataError as error:
        # Raises the same again if it is not the training shards that are to blame.
        card = evaluation.score(args, None)
        note = f"no baselines counted on training shards: {error}; name the shards with --train-data"
        return replace(card, notes=(*card.notes, note))


def positive(text: str) -> int:
    """Type of an option that counts things."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
