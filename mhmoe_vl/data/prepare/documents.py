"""Text files to documents: one per line, per paragraph or per file, JSON lines, and the last column of ``.tsv``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mhmoe_vl.data.decode import clean_text, decode_text
from mhmoe_vl.data.prepare.json_files import read_json_lines
from mhmoe_vl.data.prepare.records import Record, Records
from mhmoe_vl.data.shards import Skip
from mhmoe_vl.errors import DataError, suggest

DOCUMENT_UNITS = ("lines", "paragraphs", "file")

_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_documents(
    paths: Sequence[Path],
    *,
    unit: str = "lines",
    text_field: str = "text",
    language: str | None = None,
    language_from_name: bool = False,
) -> Records:
    """Documents of kind ``text``, cleaned line by line; blank ones are not documents.

    Args:
        unit: one of :data:`DOCUMENT_UNITS`, for files other than ``.jsonl`` and ``.tsv``; paragraphs are separated by
            blank lines.
        text_field: the field of ``.jsonl`` files that holds the text.
        language: stored with every document.
        language_from_name: store the file's name without its extension as the language instead.

    Raises:
        DataError: a file is absent, unreadable or UTF-16, or no line has the text field.
    """
    for file_number, path in enumerate(paths):
        fields = {"source": path.name}
        stored_language = path.stem if language_from_name else language
        if stored_language:
            fields["language"] = stored_language
        for number, document in enumerate(_documents(path, unit, text_field)):
            if isinstance(document, Skip):
                yield document
                continue
            yield Record(f"{file_number:04d}-{number:09d}", text=document, fields=fields)


def _documents(path: Path, unit: str, text_field: str) -> Iterator[str | Skip]:
    if path.suffix == ".jsonl":
        documents = _json_documents(path, text_field)
    elif path.suffix == ".tsv":
        documents = _raw_documents(path, "lines", last_column=True)
    else:
        documents = _raw_documents(path, unit, last_column=False)
    for document in documents:
        text = document if isinstance(document, Skip) else _clean_document(document)
        if text:
            yield text


def _json_documents(path: Path, text_field: str) -> Iterator[str | Skip]:
    for entry in read_json_lines(path):
        if isinstance(entry, Skip):
            yield entry
            continue
        place, row = entry
        if text_field not in row:
            raise DataError(f"{path}: {place}: has no '{text_field}'{suggest(text_field, list(row))}; see --text-field")
        text = row[text_field]
        yield text if isinstance(text, str) else Skip(place, "bad_text", f"'{text_field}' is not a string")


def _raw_documents(path: Path, unit: str, *, last_column: bool) -> Iterator[str | Skip]:
    for line_number, data in _split(path, unit):
        try:
            text = decode_text(data)
        except DataError as error:
            yield Skip(f"{path.name}:{line_number}", "not_utf8", str(error))
        else:
            yield text.rstrip("\r\n").rpartition("\t")[2] if last_column else text


def _split(path: Path, unit: str) -> Iterator[tuple[int, bytes]]:
    """Pieces of a file with the number of their first line, without reading more of it than one piece."""
    try:
        with path.open("rb") as file:
            if file.read(2) in _UTF_16_MARKS:
                raise DataError(f"{path}: is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8")
            file.seek(0)
            if unit == "file":
                yield 1, file.read()
                return
            lines: list[bytes] = []
            number = 0
            for number, line in enumerate(file, start=1):
                if unit == "lines":
                    yield number, line
                elif line.strip():
                    lines.append(line)
                elif lines:
                    yield number - len(lines), b"".join(lines)
                    lines = []
            if lines:
                yield number - len(lines) + 1, b"".join(lines)
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from None


def _clean_document(text: str) -> str:
    """Keep line breaks, which carry meaning in verse and code, and clean what is between them."""
    return "\n".join(clean_text(line) for line in text.replace("\r\n", "\n").strip().split("\n"))
