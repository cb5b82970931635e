"""Files appear complete or not at all, and no two writers share a temporary name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhmoe_vl.data.files import check_writable, completed, write_atomically
from mhmoe_vl.errors import OutputError


def test_atomic_writing(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"1")
    write_atomically(tmp_path / "a", b"2")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"2")]
    with pytest.raises(OutputError, match="cannot write: No such file"):
        write_atomically(tmp_path / "absent" / "a", b"")


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"old")

    def write_half() -> None:
        with completed(tmp_path / "a") as temporary:
            temporary.write_bytes(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    with completed(tmp_path / "a") as first, completed(tmp_path / "a") as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


def test_whether_a_file_can_be_written_is_known_beforehand(tmp_path: Path) -> None:
    check_writable(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for path, message in [("absent/a", "No such file"), ("file/a", "Not a directory"), ("", "is a folder")]:
        with pytest.raises(OutputError, match=message):
            check_writable(tmp_path / path)
