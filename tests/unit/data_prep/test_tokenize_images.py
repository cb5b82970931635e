"""Codes beside images: those of the views that are told, the same bytes however they are made, and verified."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_prep import pack_images, verify_shards
from data_prep.tokenize_images import main
from mhmoe_vl.data.coded_views import MEMBER, parse_codes
from mhmoe_vl.data.decode import decode_image
from mhmoe_vl.data.prepare.scan import scan_shard
from mhmoe_vl.data.shards import ShardReader, read_index, write_index
from mhmoe_vl.errors import OutputError
from mhmoe_vl.models.visual_codebook import VisualCodebook
from mhmoe_vl.train import tokenize_images
from tests.unit.data.files import image_bytes, pair_members, write_images, write_tar

SIZE, PATCH = 16, 4
NUM_CODES = 30


def tokenizer_of(seed: int) -> VisualCodebook:
    codes = torch.rand(NUM_CODES, 3 * PATCH**2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return VisualCodebook(codes, PATCH)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four images; a tokenizer beside their folder."""
    write_images(tmp_path / "images", range(12))
    options = ["--samples-per-shard", "4", "--images", str(tmp_path / "images")]
    assert pack_images.main([*options, "--out", str(tmp_path / "shards")]) == 0
    (tmp_path / "tokenizer.safetensors").write_bytes(tokenizer_of(0).serialized())
    return tmp_path / "shards"


def options(shards: Path, out: Path, *more: str) -> list[str]:
    tokenizer = str(shards.parent / "tokenizer.safetensors")
    return ["--shards", str(shards), "--tokenizer", tokenizer, "--image-size", str(SIZE), "--out", str(out), *more]


def members_of(folder: Path) -> dict[str, dict[str, bytes]]:
    indexes = [read_index(path) for path in sorted(folder.glob("*.tar"))]
    return {sample.key: ShardReader().read(index, sample) for index in indexes for sample in index.samples}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def look(members: Mapping[str, bytes], box: Any, flip: bool) -> torch.Tensor:
    """A view by Pillow alone."""
    picture = decode_image(members["jpg"])
    if box is not None:
        left, top, width, height = box
        picture = picture.crop((left, top, left + width, top + height))
    picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return pixels.flip(-1) if flip else pixels


@pytest.mark.parametrize("num_views", [0, 1, 5])
def test_codes_are_those_of_the_views(shards: Path, tmp_path: Path, num_views: int) -> None:
    assert main(options(shards, tmp_path / "coded", "--views", str(num_views), "--crop-scale", "0.3")) == 0
    before, after = members_of(shards), members_of(tmp_path / "coded")
    assert before.keys() == after.keys()
    seen = set()
    for key, members in after.items():
        origin, views = parse_codes(members.pop(MEMBER))
        assert members == before[key]
        assert origin.tokenizer == hashlib.sha256((tmp_path / "tokenizer.safetensors").read_bytes()).hexdigest()
        assert (origin.image_size, len(views)) == (SIZE, max(1, num_views))
        assert (origin.crop_scale, origin.flip) == ((0.3, True) if num_views > 1 else (None, False))
        for coded in views:
            if num_views < 2:
                assert coded.view == (None, False)
            else:
                left, top, width, height = coded.view.box  # type: ignore[misc]
                assert left + width <= 24
                assert top + height <= 16
                assert width * height >= 0.25 * 24 * 16  # less than asked for by rounding alone
            image = look(members, *coded.view)
            assert list(coded.codes) == tokenizer_of(0).encode(image[None])[0].tolist()
            seen.add((coded.view, coded.codes))
    assert len(seen) == 12 * max(1, num_views)
    if num_views > 1:
        assert 10 < sum(view.flip for view, _ in seen) < 50


def test_the_result_is_the_same_for_every_number_of_workers_and_after_an_interruption(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, workers, resumed = tmp_path / "a/coded", tmp_path / "b/coded", tmp_path / "c/coded"
    assert main(options(shards, alone, "--views", "2")) == 0
    assert main(options(shards, workers, "--views", "2", "--workers", "2")) == 0
    assert bytes_of(workers) == bytes_of(alone)
    write = tokenize_images._write_shard

    def full(job: Any) -> Any:
        if job.place.path.name.startswith("coded-00001"):
            raise OutputError("the disk is full")
        return write(job)

    monkeypatch.setattr(tokenize_images, "_write_shard", full)
    with pytest.raises(SystemExit, match="73"):
        main(options(shards, resumed, "--views", "2"))
    first = resumed / "unfinished/coded-00000.tar"
    inode = first.stat().st_ino
    monkeypatch.setattr(tokenize_images, "_write_shard", write)
    assert main(options(shards, resumed, "--views", "2")) == 0
    assert bytes_of(resumed) == bytes_of(alone)
    assert (resumed / "coded-00000.tar").stat().st_ino == inode


def test_other_codes_do_not_replace_those_that_are_there(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "coded"
    assert main(options(shards, out)) == 0
    before = bytes_of(out)
    with pytest.raises(SystemExit, match="73"):
        main(options(shards, out, "--views", "2"))
    assert "holds a data set with other crop_scale, flip, views; add --overwrite" in capsys.readouterr().err
    (tmp_path / "tokenizer.safetensors").write_bytes(tokenizer_of(1).serialized())
    with pytest.raises(SystemExit, match="73"):
        main(options(shards, out))
    assert "holds a data set with other tokenizer; add --overwrite" in capsys.readouterr().err
    assert bytes_of(out) == before
    assert main(options(shards, out, "--overwrite")) == 0
    manifest = json.loads((out / "manifest.json").read_bytes())
    digest = hashlib.sha256((tmp_path / "tokenizer.safetensors").read_bytes()).hexdigest()
    assert (manifest["settings"]["tokenizer"], manifest["settings"]["views"]) == (digest, 1)
    for members in members_of(out).values():
        origin, (coded,) = parse_codes(members[MEMBER])
        assert origin.tokenizer == digest
        assert list(coded.codes) == tokenizer_of(1).encode(look(members, None, False)[None])[0].tolist()


def test_images_that_cannot_be_decoded_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [part for number in range(30) for part in pair_members(f"p{number:02d}", number)]
    members[2 * 7] = (members[2 * 7][0], image_bytes(7)[:300])
    write_index(scan_shard(write_tar(tmp_path / "shards/x.tar", members)))
    (tmp_path / "tokenizer.safetensors").write_bytes(tokenizer_of(0).serialized())
    assert main(options(tmp_path / "shards", tmp_path / "coded")) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "samples 29, items 29, shards 1" in out
    assert "x.tar: p07: broken image header" in out
    assert json.loads((tmp_path / "coded/skipped.jsonl").read_text())["reason"] == "broken_image"
    assert {"jpg", "txt", MEMBER} == set(members_of(tmp_path / "coded")["p08"])


def test_webdataset_reads_the_codes(shards: Path, tmp_path: Path) -> None:
    assert main(options(shards, tmp_path / "coded")) == 0
    path = str(tmp_path / "coded/coded-00000.tar")
    samples = list(webdataset.WebDataset(path, shardshuffle=False).decode("pil"))
    assert len(samples) == 4
    for sample in samples:
        assert len(sample[MEMBER]["views"][0]["codes"]) == (SIZE // PATCH) ** 2
        assert sample["jpg"].size == (24, 16)


def rewrite(shard: Path, change: Any) -> None:
    """The tar with the codes of its second sample changed, or left out where the change gives None; with its index."""
    with tarfile.open(shard) as tar:
        members = [(entry.name, tar.extractfile(entry).read()) for entry in tar]  # type: ignore[union-attr]
    place = [name for name, _ in members if name.endswith(MEMBER)][1]
    changed = [(name, change(data) if name == place else data) for name, data in members]
    write_tar(shard, [(name, data) for name, data in changed if data is not None])
    write_index(replace(scan_shard(shard, kind="image"), path=shard))


def test_verification_knows_codes(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(shards, tmp_path / "coded")) == 0
    assert verify_shards.main(["--decode", str(tmp_path / "coded")]) == 0
    (tmp_path / "coded/manifest.json").unlink()
    for number, (change, reason) in enumerate(
        (
            (lambda data: None, "no_codes"),
            (lambda data: data.replace(b'"flip":false,"codes"', b'"flip":0,"codes"'), "bad_codes"),
            (lambda data: data.replace(b'"image_size":16', b'"image_size":32'), "mixed_codes"),
        )
    ):
        rewrite(tmp_path / f"coded/coded-{number:05d}.tar", change)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="65"):
            verify_shards.main([str(tmp_path / f"coded/coded-{number:05d}.tar")])
        out, err = capsys.readouterr()
        assert reason in out
        assert "1 problems in 1 files" in err


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--views", "-1"], 2, "--views: must be at least 0"),
        (["--crop-scale", "0"], 2, "--crop-scale: must be above 0"),
        (["--image-size", "18"], 64, "--image-size 18 must be a multiple of the 4 px of a patch"),
        (["--views", "2", "--no-crop", "--no-flip"], 64, "--views 2: without crops and flips all views are the same"),
        (["--shards", "absent"], 65, "no shards at absent"),
        (["--tokenizer", "absent"], 65, "absent: no such visual tokenizer"),
    ],
)
def test_bad_requests_end_in_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, message: str
) -> None:
    with pytest.raises(SystemExit, match=str(code)):
        main([*options(shards, tmp_path / "coded"), *more])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "coded").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="64"):
        main(options(shards, tmp_path / "coded", "--device", "cuda"))
    assert "--device cuda: there is no CUDA device" in capsys.readouterr().err


def test_shards_without_images_and_mixed_ones_are_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_index(scan_shard(write_tar(tmp_path / "pairs/x.tar", pair_members("a"))))
    write_index(scan_shard(write_tar(tmp_path / "texts/x.tar", [("a.txt", b"text")])))
    for paths, message in (
        ([tmp_path / "texts"], "texts/x.tar: is a shard of kind 'text'; image, pair, class have codes"),
        ([shards, tmp_path / "pairs"], "pairs/x.tar: is a shard of kind 'pair', and"),
    ):
        with pytest.raises(SystemExit, match="65"):
            main([*options(shards, tmp_path / "coded"), "--shards", *map(str, paths)])
        assert message in capsys.readouterr().err
