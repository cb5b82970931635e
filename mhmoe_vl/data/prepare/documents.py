"""Text files to documents: one per line, per paragraph or per file, JSON lines, and the last column of ``.tsv``."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mhmoe_vl.data.decode import clean_document, decode_text
from mhmoe_vl.data.prepare.json_files import read_json_lines
from mhmoe_vl.data.prepare.records import Record, Records
from mhmoe_vl.data.prepare.text_files import COMPRESSIONS, open_text, plain_name
from mhmoe_vl.data.shards import Skip
from mhmoe_vl.errors import DataError, suggest

DOCUMENT_UNITS = ("lines", "paragraphs", "file")

#: What counts as text in a folder, compressed or not.
_TEXT_SUFFIXES = (".txt", ".jsonl", ".tsv")


@dataclass(frozen=True)
class Reading:
    """How documents are read from files.

    Attributes:
        unit: one of :data:`DOCUMENT_UNITS`, for files other than ``.jsonl`` and ``.tsv``; paragraphs are separated by
            blank lines.
        text_field: the field of ``.jsonl`` files that holds the text.
        language: stored with every document.
        language_from_name: store the file's name without its extensions as the language instead.
    """

    unit: str = "lines"
    text_field: str = "text"
    language: str | None = None
    language_from_name: bool = False


_LINES = Reading()


def read_documents(paths: Sequence[Path], reading: Reading = _LINES) -> Records:
    """Documents of kind ``text``, cleaned line by line; blank ones are not documents. Keys ascend.

    Raises:
        DataError: a file is absent, unreadable, damaged or UTF-16, or no line has the text field.
    """
    width = max(4, len(str(len(paths) - 1)))
    for file_number, path in enumerate(paths):
        fields = {"source": path.name}
        stored_language = plain_name(path).stem if reading.language_from_name else reading.language
        if stored_language:
            fields["language"] = stored_language
        for number, document in enumerate(_documents(path, reading)):
            if isinstance(document, Skip):
                yield document
                continue
            yield Record(f"{file_number:0{width}d}-{number:09d}", text=document, fields=fields)


def text_files_in(paths: Sequence[Path]) -> list[Path]:
    """The files among ``paths``, and in the place of a folder all text files in it, sorted.

    Raises:
        DataError: a folder without any.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.is_file() and plain_name(p).suffix in _TEXT_SUFFIXES)
        if not inside:
            endings = ", ".join(f"*{suffix}" for suffix in _TEXT_SUFFIXES)
            raise DataError(f"{path}: has no text files ({endings}, or these with {' or '.join(COMPRESSIONS)})")
        files += inside
    return files


def files_by_language(paths: Sequence[Path], languages: Sequence[str] | None = None) -> Mapping[str, list[Path]]:
    """Text files by language: what ``de/...``, ``de.txt`` or ``de.jsonl.gz`` in a folder, or given so, begins with.

    Args:
        languages: take these alone.

    Raises:
        DataError: there is nothing of one of ``languages``.
    """
    found: dict[str, list[Path]] = {}
    for path in paths:
        for file in text_files_in([path]):
            inside = file.relative_to(path).parts if path.is_dir() else (file.name,)
            language = inside[0] if len(inside) > 1 else plain_name(Path(inside[0])).stem
            found.setdefault(language, []).append(file)
    for language in languages or ():
        if language not in found:
            raise DataError(
                f"{', '.join(map(str, paths))}: no folder or file of language '{language}'"
                f"{suggest(language, list(found))}; there are {', '.join(sorted(found))}"
            )
    return {language: found[language] for language in languages or sorted(found)}


def _documents(path: Path, reading: Reading) -> Iterator[str | Skip]:
    suffix = plain_name(path).suffix
    if suffix == ".jsonl":
        documents = _json_documents(path, reading.text_field)
    elif suffix == ".tsv":
        documents = _raw_documents(path, "lines", last_column=True)
    else:
        documents = _raw_documents(path, reading.unit, last_column=False)
    for document in documents:
        text = document if isinstance(document, Skip) else clean_document(document)
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
    with open_text(path) as file:
        for line_number, data in _split(file, unit):
            try:
                text = decode_text(data)
            except DataError as error:
                yield Skip(f"{path.name}:{line_number}", "not_utf8", str(error))
            else:
                yield text.rstrip("\r\n").rpartition("\t")[2] if last_column else text


def _split(file: io.BufferedReader, unit: str) -> Iterator[tuple[int, bytes]]:
    """Pieces of a file with the number of their first line, without reading more of it than one piece."""
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
