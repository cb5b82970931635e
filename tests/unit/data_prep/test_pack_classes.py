"""Folders of classes, as ImageNet's."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.pack_classes import main
from mhmoe_vl.data.decode import image_member
from mhmoe_vl.data.prepare.scan import scan_shard
from mhmoe_vl.data.samples import class_of
from mhmoe_vl.data.shards import ShardReader, find_shards, read_index
from tests.unit.data.files import image_bytes, write_tar

TRAIN = ["n2/a.jpg", "n10/b.JPEG", "n10/deep/c.png", "n1/a.jpg", "ü x/d.jpg"]


def write(folder: Path, files: Sequence[str]) -> Path:
    for number, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(image_bytes(number))
    return folder


def packed(folder: Path) -> dict[str, tuple[str, bytes]]:
    """File name -> class and image."""
    found, reader = {}, ShardReader()
    for shard in find_shards(folder):
        index = read_index(shard)
        assert index.kind == "class"
        for sample in index.samples:
            members = reader.read(index, sample)
            found[json.loads(members["json"])["file"]] = (class_of(members), image_member(members))
    return found


def classes(folder: Path) -> list[str]:
    content = json.loads((folder / "classes.json").read_text())
    assert content["num_classes"] == len(content["classes"])
    return content["classes"]


def skips(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    return [(skip["source"], skip["reason"]) for skip in map(json.loads, lines)]


def test_the_first_folder_is_the_class(tmp_path: Path) -> None:
    (write(tmp_path / "in", TRAIN) / "empty").mkdir()
    assert main(["--images", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert packed(tmp_path / "out") == {
        file: (file.partition("/")[0], image_bytes(number)) for number, file in enumerate(TRAIN)
    }
    # In the order of torchvision's ImageFolder.
    assert classes(tmp_path / "out") == ["n1", "n10", "n2", "ü x"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["kind"], manifest["num_classes"], manifest["num_samples"]) == ("class", 4, 5)


def test_another_split_has_the_classes_of_the_training_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train", TRAIN)
    assert main(["--images", str(tmp_path / "train"), "--out", str(tmp_path / "packed")]) == 0
    write(tmp_path / "val", ["n10/x.jpg", "n3/y.jpg", "z.jpg", "n1/q.jpg"])
    (tmp_path / "val" / "n1" / "broken.jpg").write_bytes(image_bytes()[:300])
    options = ["--images", str(tmp_path / "val"), "--out", str(tmp_path / "out")]
    options += ["--classes", str(tmp_path / "packed" / "classes.json")]
    with pytest.raises(SystemExit, match="65"):
        main(options)
    assert "60.0% of the source was unusable" in capsys.readouterr().err
    assert main([*options, "--max-skipped", "1"]) == 0
    assert {file: name for file, (name, _) in packed(tmp_path / "out").items()} == {
        "n10/x.jpg": "n10",
        "n1/q.jpg": "n1",
    }
    assert sorted(skips(tmp_path / "out")) == [
        ("n1/broken.jpg", "broken_image"), ("n3/y.jpg", "unknown_class"), ("z.jpg", "no_class"),
    ]  # fmt: skip
    assert classes(tmp_path / "out") == classes(tmp_path / "packed")
    assert "no image of 2 classes, first n2" in capsys.readouterr().out


def test_interrupted_or_not_the_bytes_are_the_same(tmp_path: Path) -> None:
    files = [f"c{number % 3}/{number}.jpg" for number in range(9)]
    write(tmp_path / "in", files)
    options = ["--images", str(tmp_path / "in"), "--name", "x", "--samples-per-shard", "4"]
    assert main([*options, "--out", str(tmp_path / "a")]) == 0
    assert main([*options, "--out", str(tmp_path / "b"), "--workers", "2"]) == 0
    # As if interrupted before the last shard was written and the manifest moved.
    unfinished = tmp_path / "b" / "unfinished"
    unfinished.mkdir()
    state = {"settings": json.loads((tmp_path / "b" / "manifest.json").read_text())["settings"]}
    (unfinished / "state.json").write_text(json.dumps(state | {"overwrite": False, "replaces": []}))
    for name in ("x-00000.tar", "x-00000.idx.json"):
        os.replace(tmp_path / "b" / name, unfinished / name)
    for path in (tmp_path / "b").glob("*.*"):
        path.unlink()
    assert main([*options, "--out", str(tmp_path / "b")]) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_another_list_of_classes_is_another_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in", ["a/1.jpg", "b/2.jpg"])
    options = ["--images", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main(options) == 0
    write(tmp_path / "in", ["c/3.jpg"])
    with pytest.raises(SystemExit, match="73"):
        main(options)
    assert "holds a data set with other classes_sha256; add --overwrite" in capsys.readouterr().err
    assert main([*options, "--overwrite"]) == 0
    assert classes(tmp_path / "out") == ["a", "b", "c"]


def test_a_holdout_has_the_same_classes(tmp_path: Path) -> None:
    write(tmp_path / "in", [f"c{number % 4}/{number}.jpg" for number in range(40)])
    assert main(["--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--holdout", "0.3"]) == 0
    train, val = packed(tmp_path / "out"), packed(tmp_path / "out-val")
    assert len(train) + len(val) == 40
    assert not train.keys() & val.keys()
    assert classes(tmp_path / "out") == classes(tmp_path / "out-val") == ["c0", "c1", "c2", "c3"]


@pytest.mark.parametrize(
    ("files", "listed", "message"),
    [
        (["a.jpg"], None, "no image lies in a folder of its own class"),
        ([], None, "no image lies in a folder of its own class"),
        (["a/b.jpg"], "[]", r"classes.json: JSON must be an object, not list"),
        (["a/b.jpg"], '{"classes": [1]}', "classes.json: has no list 'classes' of strings"),
        (["a/b.jpg"], '{"classes": ["x"]}', "1 of 1 entries were skipped as unknown_class, first a/b.jpg: 'a' is not"),
    ],
)
def test_what_cannot_be_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[str], listed: str | None, message: str
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", files)
    options = ["--images", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    if listed is not None:
        (tmp_path / "classes.json").write_text(listed)
        options += ["--classes", str(tmp_path / "classes.json")]
    with pytest.raises(SystemExit, match="65"):
        main(options)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shards_made_elsewhere(tmp_path: Path) -> None:
    """The class is what tells them from plain images; a caption is what pairs have."""
    kinds = {"class": {"class": "dog"}, "pair": {"caption": "a dog", "class": "dog"}, "image": {"class": 3}}
    for kind, fields in kinds.items():
        members = [("a.jpg", image_bytes()), ("a.json", json.dumps(fields).encode())]
        assert scan_shard(write_tar(tmp_path / f"{kind}.tar", members)).kind == kind
    members = [("a.jpg", image_bytes()), ("a.json", b'{"class": "dog"}'), ("b.jpg", image_bytes()), ("b.json", b"{}")]
    index = scan_shard(write_tar(tmp_path / "x.tar", [*members, ("c.jpg", image_bytes())]), kind="class")
    assert [sample.key for sample in index.samples] == ["a"]
    assert [(skip.source, skip.reason) for skip in index.skipped] == [("b", "malformed"), ("c", "incomplete")]
