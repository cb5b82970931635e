r"""The health of a visual tokenizer:

    python -m mhmoe_vl.analysis.codebook --tokenizer data/visual_codebook.safetensors --shards data/images-val \
        --image-size 224 --out runs/codebook.html

Encodes images of shards and writes one page that opens from disk, and a JSON file with all numbers beside it. Warns, on
stderr too, if the codebook has collapsed. docs/analysis.md defines the figures.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mhmoe_vl.analysis.codebook.measure import measure_tokenizer
from mhmoe_vl.data.files import check_writable
from mhmoe_vl.data.prepare.command_line import positive_int
from mhmoe_vl.errors import ConfigError, exit_on_user_error
from mhmoe_vl.evaluation.results_files import write_text
from mhmoe_vl.report.codebook_page import render_codebook
from mhmoe_vl.train.metrics import read_metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write both files; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m mhmoe_vl.analysis.codebook", description="The health of a visual tokenizer."
    )
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="the tokenizer to look at")
    parser.add_argument("--shards", nargs="+", required=True, help="shards with images: directories, files, globs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="page; FILE.json is beside it")
    parser.add_argument(
        "--image-size",
        type=positive_int,
        metavar="N",
        help="images become this square (default: what a trained tokenizer was trained on; 224 for k-means patches)",
    )
    parser.add_argument(
        "--max-images", type=positive_int, default=1000, metavar="N", help="drawn at random (default 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default 0)")
    parser.add_argument("--workers", type=positive_int, default=1, metavar="N", help="processes that decode images")
    arguments = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    with exit_on_user_error():
        if arguments.out.suffix != ".html":
            raise ConfigError(f"--out {arguments.out}: must end in .html; the JSON file gets the same name")
        numbers = arguments.out.with_suffix(".json")
        for path in (arguments.out, numbers):
            check_writable(path)
        health = measure_tokenizer(
            arguments.tokenizer,
            arguments.shards,
            image_size=arguments.image_size,
            max_images=arguments.max_images,
            seed=arguments.seed,
            num_workers=arguments.workers,
        )
        for warning in health.warnings:
            sys.stderr.write(f"warning: {arguments.tokenizer}: {warning}\n")
        # A tokenizer that was trained lies in its run directory.
        folder = arguments.tokenizer.parent
        page = render_codebook(
            health,
            training=read_metrics(folder, "train"),
            held_out=read_metrics(folder, "validation"),
            command=shlex.join(["python", "-m", "mhmoe_vl.analysis.codebook", *given]),
        )
        for path, text in ((numbers, health.as_json()), (arguments.out, page)):
            write_text(path, text)
            sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
