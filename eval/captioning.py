"""python -m eval.captioning --run runs/captioning --data data/coco-karpathy-test

Predict (writes the official results JSON into the run directory) and score with BLEU, ROUGE-L, CIDEr, and METEOR and
SPICE where Java and their files are present. As separate steps:
  python -m eval.captioning predict --run runs/captioning --data SHARDS --predictions results.json     needs the model
  python -m eval.captioning score --predictions results.json --data SHARDS --train-data data/coco-karpathy-train
Under torchrun the split is shared out over the processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from mhmoe_vl.distributed.world import World, open_world
from mhmoe_vl.errors import ConfigError, exit_on_user_error
from mhmoe_vl.evaluation.beam_search import BeamSettings
from mhmoe_vl.evaluation.caption_scores import METRICS, load_caption_results, score_captions, write_caption_results
from mhmoe_vl.evaluation.constant_caption import best_constant_caption
from mhmoe_vl.evaluation.predict import predict_captions
from mhmoe_vl.evaluation.score_card import ScoreCard
from mhmoe_vl.evaluation.truth import caption_references
from mhmoe_vl.tasks.captioning import CaptioningTask
from mhmoe_vl.train.trained import cost_of, load_trained, train_shards


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m eval.captioning", description="Captions and their scores.")
    parser.add_argument("step", nargs="?", choices=("predict", "score", "all"), default="all")
    parser.add_argument("--run", type=Path, help="directory of a fine-tuning run")
    parser.add_argument("--data", nargs="+", required=True, help="shards of the split")
    parser.add_argument("--predictions", type=Path, help="results JSON (default: RUN/caption_predictions.json)")
    parser.add_argument("--train-data", nargs="+", help="shards with candidates for the constant caption")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), metavar="METRIC")
    parser.add_argument("--out", type=Path, help="score card JSON (default: RUN/captioning_score.json)")
    parser.add_argument("--num-beams", type=int, default=BeamSettings.num_beams)
    parser.add_argument("--max-length", type=int, default=BeamSettings.max_length)
    parser.add_argument("--length-penalty", type=float, default=BeamSettings.length_penalty)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args(argv)
    with exit_on_user_error(), open_world() as world:
        if args.run is None and (args.step != "score" or args.predictions is None):
            raise ConfigError("--run: is required, unless step is 'score' and --predictions is given")
        args.predictions = args.predictions or args.run / "caption_predictions.json"
        if args.step in ("predict", "all"):
            _predict(args, world, blind=False, out=args.predictions)
            _predict(args, world, blind=True, out=_blind_path(args.predictions))
        if args.step in ("score", "all") and world.is_main:
            _score(args)
    return 0


def _blind_path(predictions: Path) -> Path:
    return predictions.with_name(f"{predictions.stem}_blind{predictions.suffix}")


def _predict(args: argparse.Namespace, world: World, *, blind: bool, out: Path) -> None:
    trained = load_trained(args.run, world, task_kind="captioning")
    task = cast(CaptioningTask, trained.task)
    if blind:
        task.task_config = task.task_config.model_copy(update={"blind": True})
    # The start token takes one of the positions that the model was trained with.
    longest = trained.config.data.text_length - 1
    settings = BeamSettings(args.num_beams, min(args.max_length, longest), args.length_penalty)
    batches = trained.batches(args.data, batch_size=args.batch_size)
    captions = predict_captions(task, batches, trained.tokenizer, settings)
    if world.is_main:
        write_caption_results(out, captions)
        print(f"{out}: {len(captions)} captions{' without the image' if blind else ''}")


def _score(args: argparse.Namespace) -> None:
    references = caption_references(args.data)
    scores = score_captions(load_caption_results(args.predictions), references, metrics=args.metrics)
    majority = blind = None
    notes = [f"tokenizer: {scores.tokenizer}", *scores.notes, *(f"{n}: {why}" for n, why in scores.unavailable.items())]
    train_data = args.train_data or (train_shards(args.run) if args.run else None)
    if train_data is not None:
        captions = [caption for of_image in caption_references(train_data).values() for caption in of_image]
        constant, of_constant = best_constant_caption(captions, references)
        majority = 100 * of_constant.cider
        notes.append(f"best constant caption: {constant}")
    if _blind_path(args.predictions).is_file():
        blind = 100 * score_captions(load_caption_results(_blind_path(args.predictions)), references, metrics=()).cider
        notes.append("blind is this model decoding without the image")
    details = {name: value for name, value in scores.percent().items() if name != "CIDEr"}
    card = ScoreCard(
        task="captioning",
        metric="CIDEr x 100",
        score=100 * scores.cider,
        majority=majority,
        blind=blind,
        n=scores.n,
        details=details,
        cost=cost_of(args.run) if args.run else {},
        notes=tuple(notes),
    )
    card.show()
    out = args.out or (args.run / "captioning_score.json" if args.run else None)
    if out is not None:
        card.write(out)


if __name__ == "__main__":
    raise SystemExit(main())
