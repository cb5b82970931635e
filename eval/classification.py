"""python -m eval.classification --run runs/classification --data data/imagenet-val

Predict (writes the five best classes of every image into the run directory) and score with top-1 and top-5 accuracy.
As separate steps:
  python -m eval.classification predict --run runs/classification --data SHARDS --predictions classes.json
  python -m eval.classification score --predictions classes.json --data SHARDS --train-data data/imagenet-train
Under torchrun, which takes --run for its own, the split is shared out over the processes:
  torchrun --nproc-per-node 2 -m eval.classification --run-dir runs/classification --data data/imagenet-val
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from eval.command_line import Evaluation, evaluate
from mhmoe_vl.distributed.world import World
from mhmoe_vl.evaluation.classification_accuracy import (
    classification_accuracy,
    commonest_classes,
    load_class_predictions,
    write_class_predictions,
)
from mhmoe_vl.evaluation.predict import predict_classes
from mhmoe_vl.evaluation.score_card import ScoreCard
from mhmoe_vl.evaluation.truth import class_labels, labelled_images
from mhmoe_vl.tasks.classification import ClassificationConfig, ClassificationTask
from mhmoe_vl.train.build import load_classes
from mhmoe_vl.train.trained import load_trained


class ClassificationEvaluation(Evaluation):
    """Classes of images; the baseline always names the commonest classes of the training split."""

    task = "classification"
    predictions_name = "class_predictions.json"
    batch_size = 128

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """None of its own."""

    def predict(self, run: Path, out: Path, args: argparse.Namespace, world: World) -> None:
        trained = load_trained(run, world, task_kind="classification")
        classes = load_classes(cast(ClassificationConfig, trained.config.task).classes)
        batches = trained.batches(args.data, batch_size=args.batch_size)
        predictions = predict_classes(cast(ClassificationTask, trained.task), batches, classes)
        if world.is_main:
            write_class_predictions(out, predictions)
            print(f"{out}: {len(predictions)} images classified")

    def predict_blind(self, args: argparse.Namespace, world: World) -> None:
        """Without images there is nothing to classify."""

    def score(self, args: argparse.Namespace, train_data: Sequence[str] | None) -> ScoreCard:
        labels = class_labels(args.data)
        score = classification_accuracy(load_class_predictions(args.predictions), labels)
        details: dict[str, float | None] = {"top-5": 100 * score.top_5}
        majority = None
        if train_data:
            constant = commonest_classes(name for _, name in labelled_images(train_data))
            of_constant = classification_accuracy(dict.fromkeys(labels, constant), labels)
            majority = 100 * of_constant.top_1
            details["top-5 of the commonest classes"] = 100 * of_constant.top_5
        return ScoreCard(
            task=self.task,
            metric="top-1 accuracy",
            score=100 * score.top_1,
            majority=majority,
            blind=None,
            n=score.n,
            details=details,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; see the top of this file."""
    return evaluate(ClassificationEvaluation(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
