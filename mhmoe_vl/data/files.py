"""Files that appear complete or not at all, whenever the process or the machine dies."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mhmoe_vl.errors import DataError, OutputError

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def completed(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; the file is renamed at the end, or removed on an exception.

    No two writers get the same name: what is left running of a killed program never writes into the file of the
    program that was started in its place.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either absent, old or complete.

    Raises:
        OutputError: the file cannot be written.
    """
    with completed(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_writable(path: Path) -> None:
    """Find out before long work, not after it, whether ``path`` can be written at its end.

    Raises:
        OutputError: ``path`` is a folder, or its folder is absent or not writable.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file in it")
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror}; make its folder, or choose another --out") from None


def sha256_of(path: str | Path) -> str:
    """Of the content of a file, in hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from None
