"""python -m eval.vqa --run runs/vqa --data data/vqa-val

Predict (writes the official results JSON into the run directory) and score. As separate steps:
  python -m eval.vqa predict --run runs/vqa --data data/vqa-test --predictions results.json     needs the model
  python -m eval.vqa score --predictions results.json --data data/vqa-val --train-data data/vqa-train     does not
Under torchrun, which takes --run for its own, the split is shared out over the processes:
  torchrun --nproc-per-node 2 -m eval.vqa --run-dir runs/vqa --data data/vqa-val
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from eval.command_line import evaluate
from eval.text_baselines import TwinEvaluation, text_baselines
from mhmoe_vl.distributed.world import World
from mhmoe_vl.evaluation.predict import predict_vqa
from mhmoe_vl.evaluation.prior import vqa_prior
from mhmoe_vl.evaluation.score_card import ScoreCard
from mhmoe_vl.evaluation.truth import vqa_annotations
from mhmoe_vl.evaluation.vqa_accuracy import load_vqa_results, vqa_accuracy, write_vqa_results
from mhmoe_vl.tasks.vqa import VqaConfig, VqaTask
from mhmoe_vl.train.build import load_answers
from mhmoe_vl.train.trained import load_trained


class VqaEvaluation(TwinEvaluation):
    """Answers to questions, by the official evaluator."""

    task = "vqa"
    predictions_name = "vqa_predictions.json"
    batch_size = 128

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--evaluator", choices=("2021", "2017"), default="2021", help="version of the official one")

    def predict(self, run: Path, out: Path, args: argparse.Namespace, world: World) -> None:
        trained = load_trained(run, world, task_kind="vqa")
        answers = load_answers(cast(VqaConfig, trained.config.task).answers)
        batches = trained.batches(args.data, batch_size=args.batch_size)
        predictions = predict_vqa(cast(VqaTask, trained.task), batches, answers)
        if world.is_main:
            write_vqa_results(out, predictions)
            print(f"{out}: {len(predictions)} answers")

    def score(self, args: argparse.Namespace, train_data: Sequence[str] | None) -> ScoreCard:
        annotations = vqa_annotations(args.data)

        def accuracy(answers: Mapping[int, str]) -> float:
            return vqa_accuracy(answers, annotations, version=args.evaluator).overall

        score = vqa_accuracy(load_vqa_results(args.predictions), annotations, version=args.evaluator)
        baselines = text_baselines(
            accuracy,
            {a["question_id"]: a["question"] for a in annotations},
            vqa_prior(vqa_annotations(train_data)) if train_data else None,
            load_vqa_results(self.twin_predictions(args.blind_run)) if args.blind_run else None,
        )
        return ScoreCard(
            task=self.task,
            metric=f"accuracy (official evaluator, {args.evaluator})",
            score=score.overall,
            majority=baselines.majority,
            blind=baselines.blind,
            n=score.n,
            details={f"answer type {name}": value for name, value in sorted(score.per_answer_type.items())},
            notes=baselines.notes,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; see the top of this file."""
    return evaluate(VqaEvaluation(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
