"""The benchmark runs and records; what it measures is no test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import moe
from benchmarks.measure import paired_ratios
from mhmoe_vl.moe import MultiHeadMoE, routing_stats


def test_every_subject_is_timed_or_left_out_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "x.json"
    command = ["--cells", "32,4,2,24", "--num-tokens", "16", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    assert moe.main(command) == 0
    assert not torch.distributed.is_initialized()
    result = json.loads(out.read_text())
    timed = {row["subject"] for row in result["results"] if "skipped" not in row}
    left_out = {row["subject"]: row["skipped"] for row in result["results"] if "skipped" in row}
    assert timed >= {"floor", "mhmoe auto", "mhmoe loop", "mhmoe segments", "smoe auto", "dense", "gshard einsum"}
    assert timed | left_out.keys() == {"floor", *moe.SUBJECTS}
    assert "CUDA" in left_out["mhmoe fused"]
    kept = {
        row["subject"]: row["kept_mb"]
        for row in result["results"]
        if row.get("pass") == "forward + backward" and row["subject"] != "floor"
    }
    assert 0 < kept["mhmoe segments"] < kept["mhmoe loop"]
    assert {"processor", "num_threads"} <= result["hardware"].keys()
    assert result["environment"]["git_commit"]
    assert out.with_suffix(".svg").stat().st_size > 1000
    assert "ratio to the floor" in capsys.readouterr().out


def test_the_peak_is_that_of_the_layer(tmp_path: Path) -> None:
    """8,192 rows of 512 hidden values are 17 MB. The loop holds at least two such tensors at once."""
    out = tmp_path / "x.json"
    command = ["--cells", "64,4,1,512", "--num-tokens", "2048", "--repeats", "1", "--device", "cpu", "--peak"]
    assert moe.main([*command, "--subjects", "mhmoe loop", "--out", str(out)]) == 0
    peak = {row["subject"]: row.get("peak_mb") for row in json.loads(out.read_text())["results"]}
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux counts the memory of a process")
    assert 35 < peak["mhmoe loop"] < 200


def test_gradients_of_weights_are_no_part_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four experts of 16 x 24 and back with biases, a router, head and merge layers, 4 bytes each."""
    monkeypatch.setattr(moe, "peak_bytes", lambda run, device: run() or 1_000_000)
    num_params = 4 * (2 * 16 * 24 + 24 + 16) + 16 * 4 + 2 * (64 * 64 + 64)
    work = moe.Work(moe.Cell(64, 4, 1, 24), 4, 16)
    assert moe._peak("mhmoe loop", work, torch.float32, torch.device("cpu")) == 1_000_000 - 4 * num_params


@pytest.mark.parametrize("skew", [1.0, 3.0])
def test_skew_gives_one_expert_a_multiple_of_the_mean_load(skew: float) -> None:
    torch.manual_seed(0)
    layer = MultiHeadMoE(32, 24, 8, 4)
    figures = moe._skew(layer, torch.randn(512, 32), skew)
    assert figures["max_load"] >= 0.9 * skew
    load_E = routing_stats(layer(torch.randn(512, 32))[1]).load_E.double()
    assert float(load_E[0] / load_E.mean()) == pytest.approx(skew, rel=0.2)


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
