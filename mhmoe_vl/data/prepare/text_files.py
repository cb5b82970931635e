"""Text files as streams of bytes, compressed or not: ``.gz``, and ``.zst`` with the zstandard package."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mhmoe_vl.errors import ConfigError, DataError

COMPRESSIONS = (".gz", ".zst")

_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_CHUNK_BYTES = 2**16


def plain_name(path: Path) -> Path:
    """``de.jsonl.zst`` -> ``de.jsonl``."""
    return path.with_suffix("") if path.suffix in COMPRESSIONS else path


@contextmanager
def open_text(path: Path) -> Iterator[io.BufferedReader]:
    """The decompressed content, from front to back, in constant memory.

    Raises:
        DataError: absent, unreadable, damaged, incomplete, or UTF-16; also while it is read.
        ConfigError: a ``.zst`` file, and no zstandard.
    """
    try:
        with _open(path) as file:
            if file.peek(2)[:2] in _UTF_16_MARKS:
                raise DataError(f"{path}: is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8")
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile, _DamagedError) as error:
        raise DataError(f"{path}: damaged or incomplete: {error}; get it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from None


def _open(path: Path) -> io.BufferedReader:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path))
    return path.open("rb")


class _DamagedError(Exception):
    """A compressed file that does not decompress."""


class _ZstdFile(io.RawIOBase):
    """All frames of a Zstandard file. The package's own reader takes a file that ends within a frame for complete."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise ConfigError(
                f"{path}: needs the package zstandard: pip install zstandard, or decompress it: zstd -d {path.name}"
            ) from None
        self._zstandard = zstandard
        self._file = path.open("rb")
        self._frame: Any = None
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._compressed = self._compressed or self._file.read(_CHUNK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise _DamagedError("it ends within a frame")
                return 0
            self._decompress()
        num_bytes = min(len(buffer), len(self._plain))
        buffer[:num_bytes] = self._plain[:num_bytes]
        self._plain = self._plain[num_bytes:]
        return num_bytes

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._plain = self._frame.decompress(self._compressed)
        except self._zstandard.ZstdError as error:
            raise _DamagedError(str(error)) from None
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        self._file.close()
        super().close()
