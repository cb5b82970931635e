"""The benchmarks of whole steps run and record; what they measure is no test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import plan, train
from benchmarks.measure import saved_bytes
from mhmoe_vl.moe import KINDS

SIZES = {
    "data": {"batch_size": 6, "text_length": 8},
    "model": {
        "dim": 64, "depth": 2, "num_heads": 2, "ffn_dim": 256, "image_size": 32, "vocab_size": 50,
        "num_visual_codes": 16, "moe.match": "none",
    },
}  # fmt: skip
TINY = [f"{section}.{key}={value}" for section, values in SIZES.items() for key, value in values.items()]


def test_every_kind_takes_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.json"
    assert train.main(["--repeats", "1", "--device", "cpu", "--out", str(out), "--set", *TINY]) == 0
    result = json.loads(out.read_text())
    rows = {row["kind"]: row for row in result["results"]}
    assert list(rows) == list(KINDS)
    assert rows["dense"]["median_ratio"] == 1
    for row in rows.values():
        # Two of each source: 5 tokens of an image, 8 of a text.
        assert row["tokens_per_second"] / row["images_per_second"] == pytest.approx(2 * (5 + 8 + 13) / 4)
        assert row["memory_bytes"] == row["saved_bytes"] + 12 * row["num_params"]
        assert row["mfu"] > 0
    assert rows["dense"]["num_params"] < rows["smoe"]["num_params"]
    assert rows["fine_grained"]["num_assignments_per_token"] == 2
    assert {"processor", "num_threads"} <= result["hardware"].keys()
    assert float(result["settings"]["matmul_flops_per_second"]) > 0
    assert out.with_suffix(".svg").stat().st_size > 1000
    assert "MFU" in capsys.readouterr().out


def test_predictions_are_set_against_measurements(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    options = ["--rounds", "1", "--steps", "1", "--kinds", "mhmoe", "--device", "cpu", "--out", str(out)]
    assert plan.main([*options, "--set", *TINY]) == 0
    (row,) = json.loads(out.read_text())["results"]
    assert row["predicted_states"] == row["measured_states"]
    assert row["predicted_activations"] == pytest.approx(row["measured_activations"], rel=0.25)
    assert len(row["rounds"]) == 1
    assert row["time_ratio"] > 0


def test_saved_bytes_by_hand() -> None:
    """A product keeps its input; parameters do not count, nor does a tensor that is saved twice."""
    linear, x = nn.Linear(3, 5, bias=False), torch.randn(7, 3)
    assert saved_bytes(lambda: linear(x), linear) == 7 * 3 * 4
    assert saved_bytes(lambda: linear(x) + linear(x[:2]).sum(), linear) == 7 * 3 * 4


def test_process_time_is_of_one_thread_on_a_cpu() -> None:
    with pytest.raises(SystemExit, match="OMP_NUM_THREADS=1"):
        train.clock_named("process", torch.device("cuda"))
