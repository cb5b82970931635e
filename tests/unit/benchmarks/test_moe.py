"""The benchmark runs and records; what it measures is no test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import moe
from benchmarks.measure import paired_ratios


def test_every_subject_is_timed_or_left_out_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "x.json"
    command = ["--cells", "32,4,2,24", "--num-tokens", "16", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    assert moe.main(command) == 0
    result = json.loads(out.read_text())
    timed = {row["subject"] for row in result["results"] if "skipped" not in row}
    left_out = {row["subject"]: row["skipped"] for row in result["results"] if "skipped" in row}
    assert timed >= {"floor", "mhmoe auto", "mhmoe loop", "mhmoe segments", "smoe auto", "dense", "gshard einsum"}
    assert timed | left_out.keys() == {"floor", *moe.SUBJECTS}
    assert "CUDA" in left_out["mhmoe fused"]
    assert {"processor", "num_threads"} <= result["hardware"].keys()
    assert result["environment"]["git_commit"]
    assert out.with_suffix(".svg").stat().st_size > 1000
    assert "ratio to the floor" in capsys.readouterr().out


def test_ratios_are_paired() -> None:
    """A machine that is ten times slower in the second repeat changes no ratio."""
    assert paired_ratios([2.0, 20.0], [1.0, 10.0]) == {
        "median_ms": 11000.0,
        "median_ratio": 2.0,
        "min_ratio": 2.0,
        "max_ratio": 2.0,
    }


def test_a_cell_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        moe.main(["--cells", "32,4"])
    assert "'32,4' is not dim,num_experts,top_k,ffn_dim" in capsys.readouterr().err
