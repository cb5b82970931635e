"""The benchmark of tokens runs and records; what it measures is no test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import tokens
from data_prep import pack_images
from mhmoe_vl.models.visual_codebook import VisualCodebook
from tests.unit.data.files import write_images


def test_ways_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images", range(5))
    pack_images.main(["--images", str(tmp_path / "images"), "--out", str(tmp_path / "shards")])
    codes = torch.rand(20, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (tmp_path / "tokenizer").write_bytes(VisualCodebook(codes, 4).serialized())
    options = ["--shards", str(tmp_path / "shards"), "--tokenizer", str(tmp_path / "tokenizer"), "--image-size", "16"]
    out = tmp_path / "x.json"
    assert tokens.main([*options, "--num-images", "12", "--repeats", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["results"]
    assert found["agreement"] == 1
    assert list(found["images_per_second"]) == ["load", "on-line", "off-line", "make"]
    assert all(len(times) == 2 for times in found["seconds"].values())
    assert "agree on 100.0000% of the patches" in capsys.readouterr().out
