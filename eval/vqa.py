"""python -m eval.vqa --run runs/vqa --data data/vqa-val

Predict (writes the official results JSON into the run directory) and score. As separate steps:
  python -m eval.vqa predict --run runs/vqa --data data/vqa-test --predictions results.json     needs the model
  python -m eval.vqa score --predictions results.json --data data/vqa-val --train-data data/vqa-train     does not
Under torchrun the split is shared out over the processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from mhmoe_vl.distributed.world import World, open_world
from mhmoe_vl.errors import ConfigError, exit_on_user_error
from mhmoe_vl.evaluation.predict import predict_vqa
from mhmoe_vl.evaluation.prior import vqa_prior
from mhmoe_vl.evaluation.score_card import ScoreCard
from mhmoe_vl.evaluation.truth import vqa_annotations
from mhmoe_vl.evaluation.vqa_accuracy import load_vqa_results, vqa_accuracy, write_vqa_results
from mhmoe_vl.tasks.vqa import VqaConfig, VqaTask
from mhmoe_vl.train.build import load_answers
from mhmoe_vl.train.trained import cost_of, load_trained, train_shards


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m eval.vqa", description="VQA predictions and accuracy.")
    parser.add_argument("step", nargs="?", choices=("predict", "score", "all"), default="all")
    parser.add_argument("--run", type=Path, help="directory of a fine-tuning run")
    parser.add_argument("--data", nargs="+", required=True, help="shards of the split")
    parser.add_argument("--predictions", type=Path, help="results JSON (default: RUN/vqa_predictions.json)")
    parser.add_argument("--train-data", nargs="+", help="shards that the baselines count (default: the run's)")
    parser.add_argument("--blind-run", type=Path, help="run with task.blind=true, whose score is printed as blind")
    parser.add_argument("--evaluator", choices=("2021", "2017"), default="2021", help="version of the official script")
    parser.add_argument("--out", type=Path, help="score card JSON (default: RUN/vqa_score.json)")
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args(argv)
    with exit_on_user_error(), open_world() as world:
        if args.run is None and (args.step != "score" or args.predictions is None):
            raise ConfigError("--run: is required, unless step is 'score' and --predictions is given")
        args.predictions = args.predictions or args.run / "vqa_predictions.json"
        if args.step in ("predict", "all"):
            _predict(args.run, args, world, args.predictions)
        if args.step in ("score", "all"):
            if args.blind_run is not None:
                _predict(args.blind_run, args, world, args.blind_run / "vqa_predictions.json")
            if world.is_main:
                _score(args)
    return 0


def _predict(run: Path, args: argparse.Namespace, world: World, out: Path) -> None:
    trained = load_trained(run, world, task_kind="vqa")
    answers = load_answers(cast(VqaConfig, trained.config.task).answers)
    predictions = predict_vqa(
        cast(VqaTask, trained.task), trained.batches(args.data, batch_size=args.batch_size), answers
    )
    if world.is_main:
        write_vqa_results(out, predictions)
        print(f"{out}: {len(predictions)} answers")


def _score(args: argparse.Namespace) -> None:
    annotations = vqa_annotations(args.data)
    score = vqa_accuracy(load_vqa_results(args.predictions), annotations, version=args.evaluator)
    majority = blind = None
    notes: list[str] = []
    train_data = args.train_data or (train_shards(args.run) if args.run else None)
    if train_data is not None:
        prior = vqa_prior(vqa_annotations(train_data))
        questions = {a["question_id"]: a["question"] for a in annotations}
        majority = vqa_accuracy(dict.fromkeys(questions, prior.majority), annotations, version=args.evaluator).overall
        by_text = {question_id: prior.answer(text) for question_id, text in questions.items()}
        blind = vqa_accuracy(by_text, annotations, version=args.evaluator).overall
        notes.append("blind is the question-only prior counted on the training split")
    if args.blind_run is not None:
        results = args.blind_run / "vqa_predictions.json"
        of_twin = vqa_accuracy(load_vqa_results(results), annotations, version=args.evaluator).overall
        notes = [
            f"blind is the better of the question-only prior ({_text(blind)}) and the text-only twin ({of_twin:.2f})"
        ]
        blind = of_twin if blind is None else max(blind, of_twin)
    card = ScoreCard(
        task="vqa",
        metric=f"accuracy (official evaluator, {args.evaluator})",
        score=score.overall,
        majority=majority,
        blind=blind,
        n=score.n,
        details={f"answer type {name}": value for name, value in sorted(score.per_answer_type.items())},
        cost=cost_of(args.run) if args.run else {},
        notes=tuple(notes),
    )
    card.show()
    out = args.out or (args.run / "vqa_score.json" if args.run else None)
    if out is not None:
        card.write(out)


def _text(value: float | None) -> str:
    return "not available" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
