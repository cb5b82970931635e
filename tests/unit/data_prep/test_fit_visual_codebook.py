"""Fitting a visual codebook from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import pack_images
from data_prep.fit_visual_codebook import main
from mhmoe_vl.data.prepare.scan import scan_shard
from mhmoe_vl.data.shards import write_index
from mhmoe_vl.models.visual_codebook import VisualCodebook
from tests.unit.data.files import image_bytes, write_images, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", range(40))
    pack_images.main(["--images", str(tmp_path / "images"), "--out", str(tmp_path / "shards")])
    return tmp_path / "shards"


def options(shards: Path, out: Path) -> list[str]:
    return [
        "--shards", str(shards), "--out", str(out), "--num-codes", "20", "--image-size", "16", "--patch-size", "4"
    ]  # fmt: skip


def test_workers_do_not_change_the_codes(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    assert main(options(shards, files[0])) == 0
    assert "20 codes of 4-px patches from 640 patches of 40 images; 20 codes used" in capsys.readouterr().out
    assert main([*options(shards, files[1]), "--workers", "2"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(VisualCodebook.load(files[0]).codes_KC.unique(dim=0)) == 20


def test_images_that_cannot_be_decoded_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [(f"{number}.jpg", image_bytes(number)[: 300 if number == 3 else None]) for number in range(20)]
    write_index(scan_shard(write_tar(tmp_path / "x.tar", members)))
    assert main(options(tmp_path, tmp_path / "codes.safetensors")) == 0
    out = capsys.readouterr().out
    assert "of 19 images" in out
    assert "x.tar: 3: broken image header" in " ".join(out.split())


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--num-codes", "0"], 2, "--num-codes: must be at least 1"),
        (["--patch-size", "0"], 2, "--patch-size: must be at least 1"),
        (["--image-size", "-16"], 2, "--image-size: must be at least 1"),
        (["--max-images", "0"], 2, "--max-images: must be at least 1"),
        (["--seed", "-1"], 2, "--seed: must be from 0 to"),
        (["--patch-size", "5"], 64, "--patch-size 5 must divide --image-size 16"),
        (["--num-codes", "700"], 65, "--num-codes 700: the images have only 640 different patches"),
        (["--shards", "absent"], 65, "no shards at absent"),
        # Noticed before the shards are even looked at.
        (["--out", "absent/codes", "--shards", "absent"], 73, "absent/codes: cannot write"),
    ],
)
def test_bad_requests_end_in_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, message: str
) -> None:
    with pytest.raises(SystemExit, match=str(code)):
        main([*options(shards, tmp_path / "codes.safetensors"), *more])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "codes.safetensors").exists()
