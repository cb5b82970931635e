"""python -m eval.captioning --run runs/captioning --data data/karpathy-test

Predict (writes the official results JSON into the run directory) and score with BLEU, ROUGE-L, CIDEr, and METEOR and
SPICE where Java and their files are present. As separate steps:
  python -m eval.captioning predict --run runs/captioning --data SHARDS --predictions results.json     needs the model
  python -m eval.captioning score --predictions results.json --data SHARDS --train-data data/karpathy-train
Under torchrun, which takes --run for its own, the split is shared out over the processes:
  torchrun --nproc-per-node 2 -m eval.captioning --run-dir runs/captioning --data data/karpathy-test
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from eval.command_line import Evaluation, evaluate, positive
from mhmoe_vl.distributed.world import World
from mhmoe_vl.evaluation.beam_search import BeamSettings
from mhmoe_vl.evaluation.caption_scores import METRICS, load_caption_results, score_captions, write_caption_results
from mhmoe_vl.evaluation.constant_caption import best_constant_caption
from mhmoe_vl.evaluation.predict import predict_captions
from mhmoe_vl.evaluation.score_card import ScoreCard
from mhmoe_vl.evaluation.truth import caption_references
from mhmoe_vl.tasks.captioning import CaptioningTask
from mhmoe_vl.train.trained import load_trained


class CaptioningEvaluation(Evaluation):
    """Captions by beam search against all references of an image; blind is the same model without the image."""

    task = "captioning"
    predictions_name = "caption_predictions.json"
    batch_size = 32

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), metavar="METRIC")
        parser.add_argument("--num-beams", type=positive, default=BeamSettings.num_beams)
        parser.add_argument("--max-length", type=positive, default=BeamSettings.max_length)
        parser.add_argument("--length-penalty", type=float, default=BeamSettings.length_penalty)

    def predict(self, run: Path, out: Path, args: argparse.Namespace, world: World) -> None:
        self._predict(run, out, args, world, blind=False)

    def predict_blind(self, args: argparse.Namespace, world: World) -> None:
        self._predict(args.run, _blind_path(args.predictions), args, world, blind=True)

    def _predict(self, run: Path, out: Path, args: argparse.Namespace, world: World, *, blind: bool) -> None:
        trained = load_trained(run, world, task_kind="captioning")
        task = cast(CaptioningTask, trained.task)
        task.task_config = task.task_config.model_copy(update={"blind": blind or task.task_config.blind})
        # The start token takes one of the positions that the model was trained with.
        longest = trained.config.data.text_length - 1
        settings = BeamSettings(args.num_beams, min(args.max_length, longest), args.length_penalty)
        captions = predict_captions(
            task, trained.batches(args.data, batch_size=args.batch_size), trained.tokenizer, settings
        )
        if world.is_main:
            write_caption_results(out, captions)
            print(f"{out}: {len(captions)} captions{' without the image' if blind else ''}")

    def score(self, args: argparse.Namespace, train_data: Sequence[str] | None) -> ScoreCard:
        references = caption_references(args.data)
        scores = score_captions(load_caption_results(args.predictions), references, metrics=args.metrics)
        majority = blind = None
        unavailable = (f"{name}: {why}" for name, why in scores.unavailable.items())
        notes = [f"tokenizer: {scores.tokenizer}", *scores.notes, *unavailable]
        if train_data:
            captions = [caption for of_image in caption_references(train_data).values() for caption in of_image]
            constant, of_constant = best_constant_caption(captions, references)
            majority = 100 * of_constant.cider
            notes.append(f"best constant caption: {constant}")
        blind_path = _blind_path(args.predictions)
        if blind_path.is_file():
            blind = 100 * score_captions(load_caption_results(blind_path), references, metrics=()).cider
            notes.append("blind is this model decoding without the image")
        return ScoreCard(
            task=self.task,
            metric="CIDEr x 100",
            score=100 * scores.cider,
            majority=majority,
            blind=blind,
            n=scores.n,
            details={name: value for name, value in scores.percent().items() if name != "CIDEr"},
            notes=tuple(notes),
        )


def _blind_path(predictions: Path) -> Path:
    return predictions.with_name(f"{predictions.stem}_blind{predictions.suffix}")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; see the top of this file."""
    return evaluate(CaptioningEvaluation(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
