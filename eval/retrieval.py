"""python -m eval.retrieval --run runs/retrieval --data data/karpathy-test

Predict (writes the ten best captions of every image and the ten best images of every caption into the run directory)
and score with recall@1, 5 and 10, both ways. COCO's 5,000 test images are also scored in folds of 1,000:
  python -m eval.retrieval --run runs/retrieval --data data/karpathy-test --fold-size 1000
As separate steps:
  python -m eval.retrieval predict --run runs/retrieval --data SHARDS --predictions rankings.json     needs the model
  python -m eval.retrieval score --predictions rankings.json --data SHARDS     does not
Under torchrun, which takes --run for its own, the split is shared out over the processes:
  torchrun --nproc-per-node 2 -m eval.retrieval --run-dir runs/retrieval --data data/karpathy-test
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from eval.command_line import Evaluation, evaluate, positive
from mhmoe_vl.distributed.collectives import fail_together
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import UserError
from mhmoe_vl.evaluation.predict import embed_images, embed_texts
from mhmoe_vl.evaluation.retrieval_recall import (
    RetrievalPredictions,
    chance_recall,
    first_captions,
    fold_recall,
    folds_of,
    load_rankings,
    rank_folds,
    rank_pairs,
    retrieval_recall,
    write_rankings,
)
from mhmoe_vl.evaluation.score_card import ScoreCard
from mhmoe_vl.evaluation.truth import captions_by_image
from mhmoe_vl.tasks.retrieval import RetrievalTask
from mhmoe_vl.train.trained import load_trained


class RetrievalEvaluation(Evaluation):
    """Images and captions that find each other; the baseline is a random order."""

    task = "retrieval"
    predictions_name = "retrieval_rankings.json"
    batch_size = 128
    counts_training_data = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        text = "rank also within folds of N consecutive images, of which the mean is reported (COCO: 1000)"
        parser.add_argument("--fold-size", type=positive, metavar="N", help=text)
        text = "use the first N captions of every image (default: all, as BEiT-3 does; others take 5)"
        parser.add_argument("--captions-per-image", type=positive, metavar="N", help=text)

    def predict(self, run: Path, out: Path, args: argparse.Namespace, world: World) -> None:
        trained = load_trained(run, world, task_kind="retrieval")
        task = cast(RetrievalTask, trained.task)
        with fail_together(UserError):
            captions = first_captions(captions_by_image(args.data), args.captions_per_image)
            if args.fold_size is not None:
                list(folds_of(captions, args.fold_size))  # before anything is computed
        images = embed_images(task, trained.batches(args.data, batch_size=args.batch_size))
        texts = embed_texts(
            task,
            [text for of_image in captions.values() for text in of_image],
            trained.tokenizer,
            text_length=trained.config.data.text_length,
            batch_size=args.batch_size,
        )
        if world.is_main:
            predictions = RetrievalPredictions(
                rank_pairs(captions, images, texts),
                None if args.fold_size is None else rank_folds(captions, images, texts, args.fold_size),
                args.fold_size,
                args.captions_per_image,
            )
            write_rankings(out, predictions)
            print(f"{out}: {len(captions)} images and {sum(map(len, captions.values()))} captions ranked")

    def predict_blind(self, args: argparse.Namespace, world: World) -> None:
        """Without images there is nothing to rank."""

    def score(self, args: argparse.Namespace, train_data: Sequence[str] | None) -> ScoreCard:
        all_captions = captions_by_image(args.data)
        predictions = load_rankings(args.predictions)
        captions = first_captions(all_captions, predictions.captions_per_image)
        recall, chance = retrieval_recall(predictions.whole, captions), chance_recall(captions)
        details = recall.percent() | {"mean of the six": 100 * recall.mean_of_all} | chance.percent("chance: ")
        if predictions.folds is not None and predictions.fold_size is not None:
            of_folds = fold_recall(predictions.folds, captions, predictions.fold_size)
            details |= of_folds.percent(f"folds of {predictions.fold_size:,}: ")
        return ScoreCard(
            task=self.task,
            metric="mean of recall@1, image to text and text to image",
            score=100 * recall.mean_at_1,
            majority=100 * chance.mean_at_1,
            blind=None,
            n=recall.num_images,
            details=details,
            notes=(f"{recall.num_images:,} images, {recall.num_captions:,} captions",),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; see the top of this file."""
    return evaluate(RetrievalEvaluation(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
