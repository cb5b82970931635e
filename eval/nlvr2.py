"""python -m eval.nlvr2 --run runs/nlvr2 --data data/nlvr2-dev

Predict (writes the official CSV, ``identifier,True``, into the run directory) and score. As separate steps:
  python -m eval.nlvr2 predict --run runs/nlvr2 --data data/nlvr2-test --predictions predictions.csv     needs the model
  python -m eval.nlvr2 score --predictions predictions.csv --data data/nlvr2-dev --train-data data/nlvr2-train
Under torchrun the split is shared out over the processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from mhmoe_vl.distributed.world import World, open_world
from mhmoe_vl.errors import ConfigError, exit_on_user_error
from mhmoe_vl.evaluation.nlvr2_accuracy import load_nlvr2_predictions, nlvr2_accuracy, write_nlvr2_predictions
from mhmoe_vl.evaluation.predict import predict_nlvr2
from mhmoe_vl.evaluation.prior import nlvr2_prior
from mhmoe_vl.evaluation.score_card import ScoreCard
from mhmoe_vl.evaluation.truth import nlvr2_examples
from mhmoe_vl.tasks.nlvr2 import Nlvr2Task
from mhmoe_vl.train.trained import cost_of, load_trained, train_shards


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m eval.nlvr2", description="NLVR2 predictions and accuracy.")
    parser.add_argument("step", nargs="?", choices=("predict", "score", "all"), default="all")
    parser.add_argument("--run", type=Path, help="directory of a fine-tuning run")
    parser.add_argument("--data", nargs="+", required=True, help="shards of the split")
    parser.add_argument("--predictions", type=Path, help="CSV (default: RUN/nlvr2_predictions.csv)")
    parser.add_argument("--train-data", nargs="+", help="shards that the baselines count (default: the run's)")
    parser.add_argument("--blind-run", type=Path, help="run with task.blind=true, whose score is printed as blind")
    parser.add_argument("--out", type=Path, help="score card JSON (default: RUN/nlvr2_score.json)")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args(argv)
    with exit_on_user_error(), open_world() as world:
        if args.run is None and (args.step != "score" or args.predictions is None):
            raise ConfigError("--run: is required, unless step is 'score' and --predictions is given")
        args.predictions = args.predictions or args.run / "nlvr2_predictions.csv"
        if args.step in ("predict", "all"):
            _predict(args.run, args, world, args.predictions)
        if args.step in ("score", "all"):
            if args.blind_run is not None:
                _predict(args.blind_run, args, world, args.blind_run / "nlvr2_predictions.csv")
            if world.is_main:
                _score(args)
    return 0


def _predict(run: Path, args: argparse.Namespace, world: World, out: Path) -> None:
    trained = load_trained(run, world, task_kind="nlvr2")
    batches = trained.batches(args.data, batch_size=args.batch_size)
    predictions = predict_nlvr2(cast(Nlvr2Task, trained.task), batches)
    if world.is_main:
        write_nlvr2_predictions(out, predictions)
        print(f"{out}: {len(predictions)} judgements")


def _score(args: argparse.Namespace) -> None:
    examples = nlvr2_examples(args.data)
    labels = {example["identifier"]: bool(example["label"]) for example in examples}
    score = nlvr2_accuracy(load_nlvr2_predictions(args.predictions), labels)
    majority = blind = None
    notes: list[str] = []
    train_data = args.train_data or (train_shards(args.run) if args.run else None)
    if train_data is not None:
        prior = nlvr2_prior(nlvr2_examples(train_data))
        majority = 100 * nlvr2_accuracy(dict.fromkeys(labels, prior.majority == "True"), labels).accuracy
        by_text = {e["identifier"]: prior.answer(e["sentence"]) == "True" for e in examples}
        blind = 100 * nlvr2_accuracy(by_text, labels).accuracy
        notes.append("blind is the sentence-only prior counted on the training split")
    if args.blind_run is not None:
        results = args.blind_run / "nlvr2_predictions.csv"
        of_twin = 100 * nlvr2_accuracy(load_nlvr2_predictions(results), labels).accuracy
        notes = [f"blind is the better of the sentence-only prior and the text-only twin ({of_twin:.2f})"]
        blind = of_twin if blind is None else max(blind, of_twin)
    card = ScoreCard(
        task="nlvr2",
        metric="accuracy",
        score=100 * score.accuracy,
        majority=majority,
        blind=blind,
        n=score.n,
        details={"consistency": 100 * score.consistency},
        cost=cost_of(args.run) if args.run else {},
        notes=tuple(notes),
    )
    card.show()
    out = args.out or (args.run / "nlvr2_score.json" if args.run else None)
    if out is not None:
        card.write(out)


if __name__ == "__main__":
    raise SystemExit(main())
