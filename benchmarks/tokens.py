"""python -m benchmarks.tokens --shards data/images --tokenizer data/visual_codebook.safetensors

Images a second that one process loads for masked image modeling: with crops drawn and the visual tokenizer called on
each batch (on-line), and with views and codes that lie in the shards (off-line); and how fast these are made. The ways
take turns within each repeat; figures are medians. Also says on how many patches both ways agree. Writes a table and a
JSON file.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from datetime import date
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import clock_named, take_turns, write_result
from mhmoe_vl.data.batch import Batch
from mhmoe_vl.data.image import ImageTransform
from mhmoe_vl.data.loader import ShardDataset, Source
from mhmoe_vl.data.plan import SampleRef
from mhmoe_vl.data.samples import ImageSamples, PatchMasking
from mhmoe_vl.data.stored_codes import StoredCodes
from mhmoe_vl.models.visual_tokenizer import AnyVisualTokenizer, load_visual_tokenizer
from mhmoe_vl.train.tokenize_images import Tokenization, tokenize_images


def main(argv: Sequence[str] | None = None) -> int:
    """Time, and write both; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="+", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the tokenizer")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    clock = clock_named(args.clock, device)
    tokenizer = load_visual_tokenizer(args.tokenizer).to(device)
    options = Tokenization(args.tokenizer, args.image_size, num_views=args.views, device=args.device)
    with tempfile.TemporaryDirectory() as folder:
        # A new folder each time: a data set that is there already is not made again.
        names = (Path(folder) / f"coded{number}" for number in count())
        make = partial(tokenize_images, args.shards, options, name="coded")
        coded = next(names)
        num_made = make(directory=coded).num_samples
        drawn, stored = (
            _dataset(shards, options, tokenizer, coded=c) for shards, c in ((args.shards, 0), ([coded], 1))
        )
        seconds = take_turns(
            {
                "load": lambda: _load(drawn, args.num_images),
                "on-line": lambda: _encode(tokenizer, _load(drawn, args.num_images), device),
                "off-line": lambda: _load(stored, args.num_images),
                "make": lambda: make(directory=next(names)),
            },
            repeats=args.repeats,
            device=device,
            clock=clock,
        )
        batch = _load(stored, args.num_images)
        agreement = float((_encode(tokenizer, batch, device) == batch.image_codes).double().mean())
    num_images = dict.fromkeys(("load", "on-line", "off-line"), args.num_images) | {"make": num_made * args.views}
    rates = {name: num_images[name] / statistics.median(times) for name, times in seconds.items()}
    _show(rates, agreement)
    out = args.out or Path("benchmarks/results") / f"tokens_{date.today():%Y%m%d}.json"
    result: dict[str, Any] = {"images_per_second": rates, "seconds": seconds, "agreement": agreement}
    write_result(out, vars(args), result)
    return 0


def _dataset(
    shards: Sequence[str | Path], options: Tokenization, tokenizer: AnyVisualTokenizer, *, coded: bool
) -> ShardDataset:
    grid = options.image_size // tokenizer.patch_size
    codes = StoredCodes(options.origin(), num_patches=grid**2, num_codes=tokenizer.num_codes) if coded else None
    transform = ImageTransform(options.image_size, options.augment)
    samples = ImageSamples(transform, PatchMasking(grid, 0.4), codes)
    return ShardDataset({"image": Source("image", shards, samples)}, seed=0, pad_id=0)


def _load(dataset: ShardDataset, num_images: int) -> Batch:
    size = len(dataset.indexed("image"))
    return dataset.batch("image", [SampleRef("image", number // size, number % size) for number in range(num_images)])


def _encode(tokenizer: AnyVisualTokenizer, batch: Batch, device: torch.device) -> torch.Tensor:
    assert batch.image is not None
    return tokenizer.encode(batch.image.to(device)).cpu()


def _show(rates: dict[str, float], agreement: float) -> None:
    meaning = {
        "load": "decode, crop, mask; no codes",
        "on-line": "the same, and the tokenizer on the batch",
        "off-line": "decode, stored view and codes, mask",
        "make": "views of data_prep.tokenize_images, with all it reads and writes",
    }
    table = Table("", "images/s", "", title="one process", title_justify="left")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.1f}", meaning[name])
    Console(width=120).print(table)
    print(f"codes off-line and on-line agree on {agreement:.4%} of the patches")


if __name__ == "__main__":
    raise SystemExit(main())
