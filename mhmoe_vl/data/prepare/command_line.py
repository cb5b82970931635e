"""What the ``data_prep`` packing scripts have in common: options, running, and the closing table."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mhmoe_vl.data.prepare.packing import (
    SKIPPED,
    NothingPackedError,
    Packing,
    PackingReport,
    key_of,
    output_folder,
    pack,
    split_holdout,
)
from mhmoe_vl.data.prepare.records import Record, make_key
from mhmoe_vl.data.shards import Skip
from mhmoe_vl.errors import DataError

_EXAMPLES_SHOWN = 3


def packing_parser(
    description: str | None, *, has_images: bool = True, has_holdout: bool = True
) -> argparse.ArgumentParser:
    """A parser with the options of every packing script."""
    parser = output_parser(description)
    parser.add_argument("--samples-per-shard", type=positive_int, default=1000, metavar="N")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="pack at most N samples (per data set)")
    if has_images:
        parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="image paths are relative to it")
        parser.add_argument(
            "--image-size",
            type=positive_int,
            metavar="N",
            help="make images whose shorter side is longer than N pixels smaller (default: keep the original files)",
        )
    if has_holdout:
        parser.add_argument(
            "--holdout",
            type=holdout_share,
            metavar="SHARE",
            help="write this share of the samples, chosen by hash of the key (texts: of the text), to a second data "
            "set OUT-val",
        )
    return parser


def output_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of everything that writes a data set."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the data set to write")
    parser.add_argument("--name", help="shards are called NAME-00000.tar (default: the name of --out)")
    parser.add_argument(
        "--workers", type=positive_int, default=1, metavar="N", help="processes; the result is the same"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the data set that is in --out, once the new one is complete"
    )
    parser.add_argument(
        "--max-skipped",
        type=fraction,
        default=0.05,
        metavar="SHARE",
        help="exit with 65 if a larger share of the source was unusable (default 0.05)",
    )
    return parser


def packing_of(args: argparse.Namespace, kind: str) -> Packing:
    """The :class:`Packing` that the options of :func:`packing_parser` describe."""
    return Packing(
        kind=kind,
        directory=args.out,
        name=make_key(args.name or args.out.resolve().name),
        images=getattr(args, "images", None),
        image_size=getattr(args, "image_size", None),
        samples_per_shard=args.samples_per_shard,
        limit=args.limit,
        num_workers=args.workers,
        overwrite=args.overwrite,
    )


def holdout_directory(directory: Path) -> Path:
    """Where ``--holdout`` writes the held-out part of the data set ``directory``."""
    return directory.with_name(directory.name + "-val")


def run_packing(args: argparse.Namespace, packing: Packing, read: Callable[[], Iterable[Record | Skip]]) -> int:
    """Pack what ``read()`` gives, as :func:`pack_parts`; print what happened.

    Raises:
        DataError: after all is written, if more than ``--max-skipped`` was unusable.
    """
    return print_reports(pack_parts(packing, read, getattr(args, "holdout", None)), args.max_skipped)


def pack_parts(
    packing: Packing,
    read: Callable[[], Iterable[Record | Skip]],
    holdout: float | None,
    *,
    identity: Callable[[Record], str] = key_of,
) -> list[PackingReport]:
    """Pack what ``read()`` gives, with a ``holdout`` into two folders.

    Args:
        read: is called for each folder; if it gives a list, the progress bar knows its length.
        identity: what decides by its hash which part a record belongs to.
    """
    if holdout is None:
        return [pack(read(), packing)]

    def records(*, held_out: bool) -> Iterable[Record | Skip]:
        source = read()
        part = split_holdout(source, holdout, held_out=held_out, identity=identity)
        return list(part) if isinstance(source, Sequence) else part

    def has_records(entries: Iterable[Record | Skip]) -> bool:
        return any(isinstance(entry, Record) for entry in entries)

    train, val = parts_of(packing, holdout)
    for part in (train, val):
        output_folder(part)
    reports: list[PackingReport] = []
    # The small part first: if it turns out to be empty, nothing has been written.
    for part in (val, train):
        try:
            reports.append(pack(records(held_out=part is val), part))
        except NothingPackedError:
            is_empty = not has_records(records(held_out=part is val))
            if is_empty and has_records(read()):
                raise DataError(
                    f"--holdout {holdout:g}: {'selects none' if part is val else 'leaves none'} of the records; "
                    "choose another share, or pack without --holdout"
                ) from None
            if part is train or not is_empty:
                raise
            # There are no records at all: the train part, which has all the skips, will tell why.
    return reports[::-1]


def parts_of(packing: Packing, holdout: float | None) -> list[Packing]:
    """What is written where: all, or with a ``holdout`` the larger part and the smaller."""
    if holdout is None:
        return [packing]
    settings = {**packing.settings, "holdout": holdout}
    val = replace(
        packing,
        directory=holdout_directory(packing.directory),
        name=f"{packing.name}-val",
        settings={**settings, "part": "val"},
    )
    return [replace(packing, settings={**settings, "part": "train"}), val]


def positive_int(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def fraction(text: str) -> float:
    """An argparse type: 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {value}")
    return value


def holdout_share(text: str) -> float:
    """An argparse type: a part, neither nothing nor everything."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 1, not {value}")
    return value


def print_skips(console: Console, skipped: Sequence[Skip], *, title: str) -> None:
    """A table of reasons with their number and a few examples."""
    by_reason: Mapping[str, list[Skip]] = defaultdict(list)
    for skip in skipped:
        by_reason[skip.reason].append(skip)
    table = Table("reason", "number", "examples", title=title, title_justify="left")
    for reason, skips in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        examples = "\n".join(f"{skip.source}: {skip.detail}" for skip in skips[:_EXAMPLES_SHOWN])
        table.add_row(reason, str(len(skips)), escape(printable(examples)))
    console.print(table)


def printable(text: str) -> str:
    """``text`` with escapes for what a terminal cannot show, such as the bytes of an undecodable file name."""
    return text.encode(errors="backslashreplace").decode()


def print_reports(reports: Sequence[PackingReport], max_skipped: float) -> int:
    """Counts, and reasons for what was left out.

    Raises:
        DataError: more than ``max_skipped`` of a source was unusable.
    """
    console = Console()
    for report in reports:
        place = printable(str(report.directory))
        console.print(
            f"{place}: samples {report.num_samples}, items {report.num_items}, shards {report.num_shards}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        if report.skipped:
            title = f"skipped {len(report.skipped)} ({report.skipped_share:.1%}), see {place}/{SKIPPED}"
            print_skips(console, report.skipped, title=title)
    worst = max(report.skipped_share for report in reports)
    if worst > max_skipped:
        raise DataError(
            f"{worst:.1%} of the source was unusable, more than --max-skipped {max_skipped:.1%}; the rest is packed: "
            "mend the source and pack again with --overwrite, or allow it with a larger --max-skipped"
        )
    return 0
