"""The compiled part: what is said of it, and what happens where it is absent or of another day."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mhmoe_vl.moe import MultiHeadMoE, compiled
from tests.unit.moe.builders import needs_loops


def test_explain_says_whether_there_is_one() -> None:
    assert compiled.STATE in MultiHeadMoE(8, 8, 2, 2).explain("cpu").reason


def test_absent_ones_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "EXTENSION_SUFFIXES", [".nothing"])
    assert compiled._load() == (None, "loops not compiled (not built: pip install found no C compiler)")
    broken = tmp_path / "_compiled.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(compiled, "_library", lambda: broken)
    found, reason = compiled._load()
    assert found is None
    assert "not compiled" in reason


@needs_loops
def test_a_build_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions may want other arguments."""
    assert compiled._load()[0] is not None
    monkeypatch.setattr(compiled, "checksum", lambda sources: sum(map(len, sources)))
    assert compiled._load() == (None, "loops not compiled (built from other sources: run pip install again)")


def test_both_sides_take_sums_over_the_same_groups_of_rows() -> None:
    """Python makes the room that C fills."""
    header = (Path(compiled.__file__).parent / "vector.h").read_text()
    assert re.findall(r"#define GROUP_ROWS (\d+)", header) == [str(compiled.GROUP_ROWS)]
