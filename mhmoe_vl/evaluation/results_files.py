"""Result files of the official evaluators, and the check that predictions answer exactly what was asked."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any

from mhmoe_vl.errors import DataError, OutputError

_MAX_NAMED = 10


def read_results(path: str | Path, *, id_key: str, text_key: str) -> dict[int, str]:
    """Read a JSON list of ``{id_key: int, text_key: str}``; other keys of a row are ignored.

    Raises:
        DataError: unreadable file, malformed row, or an id that occurs twice.
    """
    rows = _read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of {{{id_key}, {text_key}}}, got {type(rows).__name__}")
    results: dict[int, str] = {}
    duplicates: list[int] = []
    for position, row in enumerate(rows):
        key = row.get(id_key) if isinstance(row, dict) else None
        text = row.get(text_key) if isinstance(row, dict) else None
        if not isinstance(key, int) or isinstance(key, bool) or not isinstance(text, str):
            raise DataError(
                f"{path}: row {position} is {json.dumps(row)[:200]}, "
                f"but must have {id_key} (integer) and {text_key} (string)"
            )
        if key in results:
            duplicates.append(key)
        results[key] = text
    if duplicates:
        raise DataError(f"{path}: {name_ids('duplicate', duplicates)}; every {id_key} must occur once")
    return results


def write_results(path: str | Path, results: Mapping[int, str], *, id_key: str, text_key: str) -> None:
    """Write what :func:`read_results` reads, which is what the official evaluation servers take.

    Raises:
        OutputError: the file cannot be written.
    """
    rows = [{id_key: key, text_key: text} for key, text in results.items()]
    write_text(path, json.dumps(rows, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file under a temporary name in its folder, then rename.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        os.replace(unfinished, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def check_same_ids(
    predicted: Collection[Hashable], expected: Collection[Hashable], *, what: str, allow_missing: bool = False
) -> None:
    """Raises:
    DataError: an id is only in ``predicted``, or (unless ``allow_missing``) only in ``expected``; up to ten are named.
    """
    predicted_set, expected_set = set(predicted), set(expected)
    problems = []
    if predicted_set - expected_set:
        problems.append(name_ids("unknown", [key for key in predicted if key not in expected_set]))
    if expected_set - predicted_set and not allow_missing:
        problems.append(name_ids("missing", [key for key in expected if key not in predicted_set]))
    if problems:
        raise DataError(
            f"{what}: {len(predicted)} predictions for {len(expected)} expected: {'; '.join(problems)}; "
            "predict every item of the evaluated split once, and no other"
        )


def name_ids(adjective: str, ids: Collection[Hashable]) -> str:
    """Such as ``3 missing ids (1, 5, 9)``; at most ten are named."""
    named = ", ".join(str(key) for key in list(ids)[:_MAX_NAMED])
    more = ", ..." if len(ids) > _MAX_NAMED else ""
    return f"{len(ids)} {adjective} id{'s' if len(ids) != 1 else ''} ({named}{more})"


def read_lines(path: str | Path) -> list[str]:
    """Lines of a UTF-8 file (a byte order mark is skipped), without the empty ones.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from None
    # Not str.splitlines(): a sentence may contain U+2028.
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
