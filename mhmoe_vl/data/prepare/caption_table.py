"""Tables of image paths and captions: ``.csv`` and ``.tsv`` with a header, or ``.jsonl``."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mhmoe_vl.data.prepare.json_files import read_json_lines
from mhmoe_vl.data.prepare.pairs import pair_record
from mhmoe_vl.data.prepare.records import ImageRoot, Records, make_key
from mhmoe_vl.data.shards import Skip
from mhmoe_vl.errors import DataError, suggest


def read_caption_table(path: Path, images: ImageRoot, *, image_column: str, caption_columns: Sequence[str]) -> Records:
    """Records in the order in which their images first appear; rows with the same image become one record.

    Raises:
        DataError: another file type, an unreadable file, or a column that is not there.
    """
    captions: dict[str, list[Any]] = {}
    for entry in _rows(path):
        if isinstance(entry, Skip):
            yield entry
            continue
        place, row = entry
        for column in (image_column, *caption_columns):
            if column not in row:
                known = [str(name) for name in row]
                near = suggest(column, known)
                raise DataError(f"{path}: {place}: has no column '{column}'{near}; columns: {', '.join(known)}")
        file = row[image_column]
        if isinstance(file, str) and file:
            captions.setdefault(file, []).extend(row[column] for column in caption_columns)
        else:
            yield Skip(place, "no_image_path", f"'{image_column}' is {file!r}")
    for file, texts in captions.items():
        yield from pair_record(make_key(str(Path(file).with_suffix(""))), file, file, texts, images)


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]] | Skip]:
    if path.suffix == ".jsonl":
        yield from read_json_lines(path)
    elif path.suffix in (".csv", ".tsv"):
        yield from _csv_rows(path, "\t" if path.suffix == ".tsv" else ",")
    else:
        raise DataError(f"{path}: a caption table must end in .csv, .tsv or .jsonl")


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[str, Mapping[str, Any]] | Skip]:
    try:
        # Bytes that are not UTF-8 become surrogates: the caption check finds them and blames the right row.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=delimiter)
            for row in reader:
                yield f"{path.name}:{reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path}: not a table: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from None
