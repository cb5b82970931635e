"""JSON and JSON-lines annotation files, with errors that name the file and the entry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mhmoe_vl.data.decode import decode_json
from mhmoe_vl.data.prepare.text_files import open_text
from mhmoe_vl.data.shards import Skip
from mhmoe_vl.errors import DataError


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Raises:
        DataError: absent, unreadable, not UTF-8 or not JSON.
    """
    try:
        return decode_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def objects_of(path: Path, fields: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The list of objects ``fields[name]`` of the JSON file ``path``.

    Raises:
        DataError: there is no such list, or an entry is not an object.
    """
    rows = fields.get(name)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: must have a list of objects '{name}'; its keys are {', '.join(fields) or 'none'}")
    return rows


def text_of(path: Path, row: Mapping[str, Any], name: str) -> str:
    """The string ``row[name]``, which every entry of this format must have.

    Raises:
        DataError: it is not there, or not a string.
    """
    return _field_of(path, row, name, (str,), "a string")


def id_of(path: Path, row: Mapping[str, Any], name: str) -> int | str:
    """The identifier ``row[name]``, which every entry of this format must have.

    Raises:
        DataError: it is not there, or neither an integer nor a string.
    """
    return _field_of(path, row, name, (int, str), "an integer or a string")


def _field_of(path: Path, row: Mapping[str, Any], name: str, types: tuple[type, ...], expected: str) -> Any:
    if name not in row:
        raise DataError(f"{path}: an entry has no '{name}'; it has {', '.join(row) or 'nothing'}")
    # True is an int to Python, and not to JSON.
    if type(row[name]) not in types:
        entry = json.dumps({key: value for key, value in row.items() if not isinstance(value, (list, dict))})
        raise DataError(f"{path}: '{name}' must be {expected}, not {json_type(row[name])} in {entry[:200]}")
    return row[name]


def json_type(value: Any) -> str:
    """What a parsed value is to the reader of a JSON file."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return "a number"


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]] | Skip]:
    """Each line of a file of one JSON object per line, with its place ``name:line``; blank lines are passed over.

    Args:
        path: may be compressed, see :func:`open_text`.

    Raises:
        DataError: absent, unreadable or damaged.
    """
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path.name}:{number}"
            if not line.strip():
                continue
            try:
                row = decode_json(line)
            except DataError as error:
                yield Skip(place, "bad_json", str(error))
            else:
                yield place, row
