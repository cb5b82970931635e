"""python -m data_prep.train_text_tokenizer data/coco-train data/text --vocab-size 16000 --out data/tokenizer.json

A tokenizer from the texts, captions, questions and sentences of shards, and from the lines of text files. With --clip
nothing is learnt: the file holds CLIP's vocabulary as it ships with open_clip; nor with --sentencepiece, which takes
over a unigram model with the ids of XLM-RoBERTa, such as the beit3.spm of the released BEiT-3 checkpoints.

There is no --workers: the tokenizers library learns on all cores by itself; RAYON_NUM_THREADS=N limits it to N.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from tokenizers import Tokenizer

from mhmoe_vl.data.files import check_writable, write_atomically
from mhmoe_vl.data.prepare.command_line import fraction, positive_int, print_skips
from mhmoe_vl.data.prepare.corpus import iterate_texts, sample_by_temperature
from mhmoe_vl.data.prepare.progress import show_progress
from mhmoe_vl.data.prepare.sentencepiece import sentencepiece_tokenizer
from mhmoe_vl.data.prepare.text_tokenizer import (
    TOKENIZER_MODELS,
    clip_tokenizer,
    tokenizer_statistics,
    train_tokenizer,
)
from mhmoe_vl.data.shards import Skip
from mhmoe_vl.errors import ConfigError, OutputError, exit_on_user_error


def main(argv: Sequence[str] | None = None) -> int:
    """Make a tokenizer; see the top of this file."""
    args = _parse(argv)
    with exit_on_user_error():
        if not args.clip and not args.sentencepiece and not args.sources:
            raise ConfigError(
                "no texts to learn from: name folders of shards or text files, or take --clip or --sentencepiece"
            )
        if args.out.exists() and not args.overwrite:
            raise OutputError(f"{args.out}: exists; add --overwrite, or choose another --out")
        check_writable(args.out)
        skipped: list[Skip] = []
        tokenizer = _make(args)
        statistics = (
            tokenizer_statistics(tokenizer, _counted(iterate_texts(args.sources, skipped), "measuring"))
            if args.sources
            else None
        )
        write_atomically(args.out, tokenizer.to_str(pretty=True).encode())
        print(f"{args.out}: vocabulary of {tokenizer.get_vocab_size()} tokens")
        if statistics:
            print(
                f"{statistics.num_texts} texts of {statistics.mean_length:.1f} tokens on average, "
                f"{statistics.unknown_share:.3%} of them unknown"
            )
        if skipped:
            print_skips(Console(), skipped, title=f"skipped {len(skipped)} lines")
    return 0


def _make(args: argparse.Namespace) -> Tokenizer:
    if args.clip:
        return clip_tokenizer()
    if args.sentencepiece:
        return sentencepiece_tokenizer(args.sentencepiece)
    return _train(args)


def _train(args: argparse.Namespace) -> Tokenizer:
    options = {"vocab_size": args.vocab_size, "model": args.model, "lowercase": args.lowercase}
    texts = sample_by_temperature(args.sources, args.sampling_alpha, [])
    if sys.stderr.isatty():
        return train_tokenizer(texts, **options, show_progress=True)
    return train_tokenizer(_counted(texts, "learning from"), **options)


def _counted(texts: Iterator[str], what: str) -> Iterator[str]:
    return show_progress(texts, label=f"{what} texts", amount=lambda _: 1)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="folders of shards, tars, and text files")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="tokenizer.json to write")
    parser.add_argument("--vocab-size", type=positive_int, default=16000, metavar="N", help="(default 16000)")
    parser.add_argument("--model", choices=TOKENIZER_MODELS, default="bpe", help="bpe works on bytes (default bpe)")
    parser.add_argument(
        "--sampling-alpha",
        type=fraction,
        default=1.0,
        metavar="A",
        help="texts of each source count as if there were n ** A instead of n of them, as data.sampling_alpha does in "
        "training; XLM takes 0.5 (default 1: as they are)",
    )
    parser.add_argument("--lowercase", action="store_true", help="make no difference between upper and lower case")
    ready = parser.add_mutually_exclusive_group()
    ready.add_argument("--clip", action="store_true", help="write CLIP's vocabulary; sources are only measured")
    ready.add_argument(
        "--sentencepiece", type=Path, metavar="FILE", help="take over a unigram model; sources are only measured"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
