"""Folders of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.pack_images import main
from mhmoe_vl.data.decode import decode_image, image_member
from mhmoe_vl.data.shards import ShardReader, find_shards, read_index
from tests.unit.data.files import encoded, image_bytes


def packed(folder: Path) -> dict[str, bytes]:
    """File name -> image."""
    images, reader = {}, ShardReader()
    for shard in find_shards(folder):
        index = read_index(shard)
        assert index.kind == "image"
        for sample in index.samples:
            members = reader.read(index, sample)
            images[json.loads(members["json"])["file"]] = image_member(members)
    return images


def test_nested_folders(tmp_path: Path) -> None:
    files = ["b/2.png", "b/10.JPG", "a.jpeg", "b/c/ü x.png", "a.png"]
    for number, file in enumerate(files):
        (tmp_path / "in" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / file).write_bytes(image_bytes(number))
    for ignored in ("notes.txt", ".hidden.jpg", ".git/x.jpg"):
        (tmp_path / "in" / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / ignored).write_bytes(b"x")
    # a.jpeg and a.png would both be called "a": the second is listed as a duplicate.
    assert main(["--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--max-skipped", "1"]) == 0
    assert packed(tmp_path / "out") == {file: image_bytes(number) for number, file in enumerate(files[:4])}
    assert '"duplicate_key"' in (tmp_path / "out/skipped.jsonl").read_text()


def test_every_kind_of_picture(tmp_path: Path) -> None:
    pictures = {
        "gray.jpg": encoded(Image.new("L", (40, 30), 100), "JPEG"),
        "cmyk.jpg": encoded(Image.new("CMYK", (40, 30)), "JPEG"),
        "alpha.png": encoded(Image.new("RGBA", (40, 30)), "PNG"),
        "deep.png": encoded(Image.fromarray(np.full((30, 40), 25700, dtype=np.uint16)), "PNG"),
        "palette.gif": encoded(Image.new("P", (40, 30)), "GIF"),
        "modern.webp": encoded(Image.new("RGB", (40, 30)), "WEBP"),
    }
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    assert main(["--images", str(tmp_path), "--out", str(tmp_path / "kept")]) == 0
    assert packed(tmp_path / "kept") == pictures
    assert main(["--images", str(tmp_path), "--out", str(tmp_path / "small"), "--image-size", "15"]) == 0
    small = {name: decode_image(data) for name, data in packed(tmp_path / "small").items()}
    assert {image.size for image in small.values()} == {(20, 15)}
    np.testing.assert_allclose(np.asarray(small["deep.png"]), 100, atol=1)
    np.testing.assert_allclose(np.asarray(small["alpha.png"]), 255, atol=1)


def test_broken_images_over_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(10):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(number)[: 300 if number == 3 else None])
    options = ["--images", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="65"):
        main(options)
    captured = capsys.readouterr()
    assert "3.jpg: broken image" in " ".join(captured.out.split())
    assert "10.0% of the source was unusable" in captured.err
    assert len(packed(tmp_path / "out")) == 9
    assert main([*options, "--max-skipped", "0.1"]) == 0


def test_the_usage_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--samples-per-shard", "0"], ["--max-skipped", "5"], ["--workers", "-1"]):
        with pytest.raises(SystemExit):
            main(["--images", str(tmp_path), "--out", str(tmp_path / "out"), *options])
        assert "must be" in capsys.readouterr().err
