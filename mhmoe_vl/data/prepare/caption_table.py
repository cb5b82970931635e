"""Tables of image paths and captions: ``.csv`` and ``.tsv`` (without quoting) with a header, or ``.jsonl``."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mhmoe_vl.data.prepare.json_files import read_json_lines
from mhmoe_vl.data.prepare.pairs import pair_record
from mhmoe_vl.data.prepare.records import ImageRoot, Records, make_keys
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
            captions.setdefault(os.path.normpath(file), []).extend(row[column] for column in caption_columns)
        else:
            yield Skip(place, "no_image_path", f"'{image_column}' is {file!r}")
    for key, (file, texts) in zip(make_keys(list(captions)), captions.items(), strict=True):
        yield from pair_record(key, file, file, texts, images)


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]] | Skip]:
    if path.suffix == ".jsonl":
        yield from read_json_lines(path)
    elif path.suffix in (".csv", ".tsv"):
        yield from _table_rows(path)
    else:
        raise DataError(f"{path}: a caption table must end in .csv, .tsv or .jsonl")


def _table_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]] | Skip]:
    # Between tabs a quote is a character like any other. Between commas it can be left open by mistake, and would
    # then swallow rows up to the next one.
    is_tsv = path.suffix == ".tsv"
    start = 1
    try:
        # Bytes that are not UTF-8 become surrogates: the caption check finds them and blames the right row.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            if is_tsv:
                reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                reader = csv.reader(lines, strict=True)
            header = next(reader, [])
            start = reader.line_num + 1
            for fields in reader:
                place, start = f"{path.name}:{start}", reader.line_num + 1
                if len(fields) == len(header):
                    yield place, dict(zip(header, fields, strict=True))
                elif fields:
                    detail = f"has {len(fields)} fields, and the header has {len(header)}"
                    yield Skip(place, "wrong_number_of_fields", detail)
    except csv.Error as error:
        remedy = "" if is_tsv else "; is a quote left open? One inside of a quoted field must be written twice"
        raise DataError(f"{path}: cannot read the row that starts in line {start}: {error}{remedy}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from None
