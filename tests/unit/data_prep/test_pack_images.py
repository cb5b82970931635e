"""Folders of images."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.pack_images import main
from mhmoe_vl.data.decode import decode_image, image_member
from mhmoe_vl.data.prepare.records import make_key
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
    assert main(["--images", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert packed(tmp_path / "out") == {file: image_bytes(number) for number, file in enumerate(files)}


def keys(folder: Path) -> list[str]:
    return [sample.key for shard in find_shards(folder) for sample in read_index(shard).samples]


def test_images_that_differ_in_their_extension_only(tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "a.tif", "a.PNG", "b.png")):
        (tmp_path / name).write_bytes(image_bytes(number))
    assert main(["--images", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert keys(tmp_path / "out") == [make_key(name) for name in ("a.PNG", "a.png", "a.tif", "b")]
    assert packed(tmp_path / "out")["a.tif"] == image_bytes(1)


def test_what_is_ignored_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "notes.txt", "b.heic", ".hidden.jpg", ".git/x.jpg"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "in" / name).write_bytes(image_bytes())
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    options = ["--images", str(tmp_path / "in"), "--out", str(tmp_path / "in" / "out")]
    expected = {"hidden": 2, "other_extension": 2, "folder_read_elsewhere": 1}
    # What was packed into the same folder is no source the second time.
    for _ in range(2):
        assert main(options) == 0
        first_line = capsys.readouterr().out.split("\n")[0]
        assert "ignored: 2 hidden (first .git); 2 of another extension than jpg" in first_line
        assert "(first b.heic); 1 a link to a folder that is read elsewhere, or that holds this one" in first_line
        assert json.loads((tmp_path / "in/out/manifest.json").read_bytes())["num_ignored"] == expected
    assert set(packed(tmp_path / "in/out")) == {"a.jpg"}


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    for number, name in enumerate(("in/a.jpg", "elsewhere/b.jpg", "elsewhere/sub/c.jpg")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image_bytes(number))
    for link, target in [("in/link", "elsewhere"), ("in/twice", "elsewhere"), ("in/above", "."), ("in/self", "in")]:
        (tmp_path / link).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/sub/home").symlink_to(tmp_path / "in")
    assert main(["--images", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert packed(tmp_path / "out") == {
        name: image_bytes(number) for number, name in enumerate(("a.jpg", "link/b.jpg", "link/sub/c.jpg"))
    }


def test_what_only_looks_like_an_image_file_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "absent")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert main(["--images", str(tmp_path), "--out", str(tmp_path / "out"), "--max-skipped", "1"]) == 0
    skips = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [(skip["source"], skip["reason"]) for skip in skips] == [
        (name, "not_a_file") for name in ("gone.jpg", "loop.jpg", "pipe.jpg")
    ]


def test_file_names_that_are_not_utf8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = [b"\xff.jpg", b"\xfe.jpg", b"\xfd.txt"]
    for number, name in enumerate(names):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(image_bytes(number))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/broken\xff.jpg")).write_bytes(b"broken")
    assert main(["--images", str(tmp_path), "--out", str(tmp_path / "out"), "--max-skipped", "1"]) == 0
    assert packed(tmp_path / "out") == {os.fsdecode(name): image_bytes(i) for i, name in enumerate(names[:2])}
    assert "broken\\udcff.jpg" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("share", "message"),
    [("0.0001", "--holdout 0.0001: selects none of the records"), ("0.9999", "--holdout 0.9999: leaves none of the")],
)
def test_a_holdout_of_nothing_or_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: str, message: str
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(number))
    options = ["--images", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="65"):
        main([*options, "--holdout", share])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "empty" / "pipe.jpg")
    with pytest.raises(SystemExit, match="65"):
        main(["--images", str(tmp_path / "empty"), "--out", str(tmp_path / "out"), "--holdout", share])
    assert "1 of 1 entries were skipped as not_a_file" in capsys.readouterr().err


def test_both_folders_of_a_holdout_are_checked_before_either_is_written(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs.tar").touch()
    for number in range(9):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(number))
    with pytest.raises(SystemExit, match="73"):
        main(["--images", str(tmp_path), "--out", str(tmp_path / "out"), "--holdout", "0.5"])
    assert not (tmp_path / "out-val").exists()


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
    for options in (
        ["--samples-per-shard", "0"],
        ["--max-skipped", "5"],
        ["--workers", "-1"],
        ["--holdout", "0"],
        ["--holdout", "1"],
    ):
        with pytest.raises(SystemExit):
            main(["--images", str(tmp_path), "--out", str(tmp_path / "out"), *options])
        assert "must be" in capsys.readouterr().err
