"""python -m data_prep.pack_text wiki.txt books.jsonl.zst --documents paragraphs --out data/text

Text files to shards of documents: .jsonl (one object per line), .tsv (last column of each line), and any other file
as plain UTF-8 text cut up by --documents; each also as .gz or .zst, and folders of them. One data set per language:

    python -m data_prep.pack_text corpus --per-language --deduplicate --holdout 0.01 --out data/text

Files are streamed: memory does not grow with the corpus but for a bit per document (--deduplicate) and the list of what
could not be used.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mhmoe_vl.data.files import TEMPORARY_SUFFIX
from mhmoe_vl.data.prepare.command_line import pack_parts, packing_of, packing_parser, parts_of, print_reports
from mhmoe_vl.data.prepare.documents import (
    DOCUMENT_UNITS,
    Reading,
    files_by_language,
    read_documents,
    text_files_in,
)
from mhmoe_vl.data.prepare.duplicates import Duplicates, find_duplicates
from mhmoe_vl.data.prepare.packing import Packing, PackingReport, output_folder, text_of
from mhmoe_vl.data.prepare.records import Records, make_key
from mhmoe_vl.errors import ConfigError, exit_on_user_error


def main(argv: Sequence[str] | None = None) -> int:
    """Pack text; see the top of this file."""
    args = _parse(argv)
    with exit_on_user_error():
        if args.languages and not args.per_language:
            raise ConfigError("--languages: chooses among the languages of --per-language; add that")
        reports = [report for data_set in _data_sets(args) for report in _pack(args, data_set)]
        return print_reports(reports, args.max_skipped)


@dataclass(frozen=True)
class _DataSet:
    directory: Path
    name: str
    files: list[Path]
    reading: Reading


def _data_sets(args: argparse.Namespace) -> list[_DataSet]:
    """One, or with --per-language one for each."""
    reading = Reading(args.documents, args.text_field, args.language, args.language_from_name)
    name = args.name or args.out.resolve().name
    if not args.per_language:
        return [_DataSet(args.out, make_key(name), text_files_in(args.files), reading)]
    languages: Mapping[str, list[Path]] = files_by_language(args.files, args.languages)
    return [
        _DataSet(args.out / language, make_key(f"{name}-{language}"), files, replace(reading, language=language))
        for language, files in languages.items()
    ]


def _pack(args: argparse.Namespace, data_set: _DataSet) -> list[PackingReport]:
    settings = {
        "sources": [path.name for path in data_set.files],
        "unit": data_set.reading.unit,
        "text_field": data_set.reading.text_field,
        "language": data_set.reading.language,
        "language_from_name": data_set.reading.language_from_name,
        "deduplicate": args.deduplicate,
    }
    packing: Packing = replace(
        packing_of(args, "text"),
        directory=data_set.directory,
        name=data_set.name,
        keys_ascend=True,
        settings=settings,
    )
    duplicates: Duplicates | None = None
    if args.deduplicate:
        for part in parts_of(packing, args.holdout):
            output_folder(part)  # refuses before the long look at all documents, not after it
        duplicates = find_duplicates(
            data_set.files,
            data_set.reading,
            folder=data_set.directory.with_name(f".{data_set.directory.name}.hashes{TEMPORARY_SUFFIX}"),
            num_workers=args.workers,
        )
        packing = replace(
            packing, facts={"num_documents": duplicates.num_documents, "num_duplicates": duplicates.number}
        )

    def read() -> Records:
        documents = read_documents(data_set.files, data_set.reading)
        return documents if duplicates is None else duplicates.without(documents)

    reports = pack_parts(packing, read, args.holdout, identity=text_of)
    if duplicates is not None:
        print(
            f"{data_set.directory}: left out {duplicates.number} of {duplicates.num_documents} documents, which had "
            "the text of an earlier one"
        )
    return reports


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = packing_parser(__doc__, has_images=False)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="text files, and folders of them")
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
    language.add_argument(
        "--per-language",
        action="store_true",
        help="write a data set OUT/de for what is in FILE/de/, FILE/de.txt or de.jsonl.gz, and so on",
    )
    parser.add_argument(
        "--languages", nargs="+", metavar="CODE", help="with --per-language: these alone (default: all that are there)"
    )
    parser.add_argument(
        "--deduplicate",
        action="store_true",
        help="leave out documents whose text an earlier one of the same data set has, exactly",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
