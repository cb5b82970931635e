"""python -m data_prep.verify_shards --decode data/coco-train

Read every byte of shards and compare them with their indexes and the manifest of their folder; --decode also decodes
every image, and --write-index makes an index for tars that were written elsewhere, for example by img2dataset. Exits
with 65 if there are problems.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from mhmoe_vl.data.prepare.command_line import positive_int, print_skips
from mhmoe_vl.data.prepare.verify import ShardCheck, verify_shards
from mhmoe_vl.data.shards import KINDS, find_shards
from mhmoe_vl.errors import DataError, exit_on_user_error


def main(argv: Sequence[str] | None = None) -> int:
    """Verify shards; see the top of this file."""
    args = _parse(argv)
    with exit_on_user_error():
        # What a manifest lists and is absent belongs in the report.
        shards = find_shards(args.shards, check_manifest=False)
        checks = verify_shards(
            shards,
            kind=args.kind,
            decode=args.decode,
            write_indexes=args.write_index,
            num_workers=args.workers,
        )
        _report(checks, len(shards))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="folders, tars, globs, or x-{00000..00009}.tar")
    parser.add_argument("--decode", action="store_true", help="also decode every image")
    parser.add_argument("--write-index", action="store_true", help="write an index where it is missing or outdated")
    parser.add_argument("--kind", choices=KINDS, help="what the shards hold (default: guessed from the files in them)")
    parser.add_argument("--workers", type=positive_int, default=1, metavar="N", help="processes (default 1)")
    return parser.parse_args(argv)


def _report(checks: Sequence[ShardCheck], num_shards: int) -> None:
    indexes = [check.index for check in checks if check.index]
    problems = [problem for check in checks for problem in check.problems]
    kinds = ", ".join(sorted({index.kind for index in indexes})) or "unknown kind"
    num_samples, num_items = sum(i.num_samples for i in indexes), sum(i.num_items for i in indexes)
    print(f"{num_shards} shards of {kinds}: {num_samples} usable samples with {num_items} items")
    if problems:
        print_skips(Console(), problems, title="problems")
        affected = sum(bool(check.problems) for check in checks)
        raise DataError(f"{len(problems)} problems in {affected} files; see the table above")


if __name__ == "__main__":
    raise SystemExit(main())
