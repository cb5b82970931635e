"""python -m eval.nlvr2 --run runs/nlvr2 --data data/nlvr2-dev

Predict (writes the official CSV, ``identifier,True``, into the run directory) and score. As separate steps:
  python -m eval.nlvr2 predict --run runs/nlvr2 --data data/nlvr2-test --predictions predictions.csv     needs the model
  python -m eval.nlvr2 score --predictions predictions.csv --data data/nlvr2-dev --train-data data/nlvr2-train
Under torchrun, which takes --run for its own, the split is shared out over the processes:
  torchrun --nproc-per-node 2 -m eval.nlvr2 --run-dir runs/nlvr2 --data data/nlvr2-dev
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from eval.command_line import evaluate
from eval.text_baselines import TwinEvaluation, text_baselines
from mhmoe_vl.distributed.world import World
from mhmoe_vl.evaluation.nlvr2_accuracy import load_nlvr2_predictions, nlvr2_accuracy, write_nlvr2_predictions
from mhmoe_vl.evaluation.predict import predict_nlvr2
from mhmoe_vl.evaluation.prior import nlvr2_prior
from mhmoe_vl.evaluation.score_card import ScoreCard
from mhmoe_vl.evaluation.truth import nlvr2_examples
from mhmoe_vl.tasks.nlvr2 import Nlvr2Task
from mhmoe_vl.train.trained import load_trained


class Nlvr2Evaluation(TwinEvaluation):
    """Sentences about two images: accuracy, and consistency over the pairs that share a sentence."""

    task = "nlvr2"
    predictions_name = "nlvr2_predictions.csv"
    batch_size = 64

    def predict(self, run: Path, out: Path, args: argparse.Namespace, world: World) -> None:
        trained = load_trained(run, world, task_kind="nlvr2")
        batches = trained.batches(args.data, batch_size=args.batch_size)
        predictions = predict_nlvr2(cast(Nlvr2Task, trained.task), batches)
        if world.is_main:
            write_nlvr2_predictions(out, predictions)
            print(f"{out}: {len(predictions)} judgements")

    def score(self, args: argparse.Namespace, train_data: Sequence[str] | None) -> ScoreCard:
        examples = nlvr2_examples(args.data)
        labels = {example["identifier"]: bool(example["label"]) for example in examples}

        def accuracy(judgements: Mapping[str, str]) -> float:
            return 100 * nlvr2_accuracy({key: text == "True" for key, text in judgements.items()}, labels).accuracy

        twin = load_nlvr2_predictions(self.twin_predictions(args.blind_run)) if args.blind_run else None
        score = nlvr2_accuracy(load_nlvr2_predictions(args.predictions), labels)
        baselines = text_baselines(
            accuracy,
            {example["identifier"]: example["sentence"] for example in examples},
            nlvr2_prior(nlvr2_examples(train_data)) if train_data else None,
            None if twin is None else {key: str(value) for key, value in twin.items()},
        )
        return ScoreCard(
            task=self.task,
            metric="accuracy",
            score=100 * score.accuracy,
            majority=baselines.majority,
            blind=baselines.blind,
            n=score.n,
            details={"consistency": 100 * score.consistency},
            notes=baselines.notes,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; see the top of this file."""
    return evaluate(Nlvr2Evaluation(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
