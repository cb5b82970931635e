"""python -m data_prep.pack_text wiki.txt books.jsonl --documents paragraphs --out data/text

Text files to shards of documents: .jsonl (one object per line), .tsv (last column of each line), and any other file
as plain UTF-8 text cut up by --documents.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mhmoe_vl.data.prepare.command_line import packing_of, packing_parser, run_packing
from mhmoe_vl.data.prepare.documents import DOCUMENT_UNITS, read_documents
from mhmoe_vl.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> int:
    """Pack text; see the top of this file."""
    args = _parse(argv)
    reading = {
        "unit": args.documents,
        "text_field": args.text_field,
        "language": args.language,
        "language_from_name": args.language_from_name,
    }
    with exit_on_user_error():
        settings = {"sources": [path.name for path in args.files], **reading}
        packing = replace(packing_of(args, "text"), settings=settings)
        return run_packing(args, packing, lambda: read_documents(args.files, **reading))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = packing_parser(__doc__, has_images=False)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument(
        "--documents",
        choices=DOCUMENT_UNITS,
        default="lines",
        help="what a document is in plain text; paragraphs are separated by blank lines (default lines)",
    )
    parser.add_argument("--text-field", default="text", help="of .jsonl files (default text)")
    language = parser.add_mutually_exclusive_group()
    language.add_argument("--language", metavar="CODE", help="stored with each document")
    language.add_argument(
        "--language-from-name", action="store_true", help="of de.txt, for example, the language is de"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
