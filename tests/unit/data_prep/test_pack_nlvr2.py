"""NLVR2 files, real and broken."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from data_prep.pack_nlvr2 import main
from mhmoe_vl.data.decode import decode_json, image_member
from mhmoe_vl.data.shards import ShardReader, find_shards, read_index
from tests.unit.data.files import image_bytes


def packed(folder: Path) -> dict[str, tuple[dict[str, Any], bytes, bytes]]:
    samples, reader = {}, ShardReader()
    for shard in find_shards(folder):
        index = read_index(shard)
        for sample in index.samples:
            members = reader.read(index, sample)
            fields = decode_json(members["json"])
            assert sample.num_items == len(fields["examples"])
            samples[sample.key] = (fields, image_member(members, "left"), image_member(members, "right"))
    return samples


def row(identifier: str, label: Any = "True", **fields: Any) -> dict[str, Any]:
    return {"identifier": identifier, "sentence": f"About {identifier}", "label": label, **fields}


def run(folder: Path, rows: list[Any], *options: str) -> dict[str, tuple[dict[str, Any], bytes, bytes]]:
    source = folder / "rows.json"
    source.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in rows))
    fixed = ["--examples", str(source), "--images", str(folder), "--out", str(folder / "out"), "--max-skipped", "1"]
    assert main([*fixed, *options]) == 0
    return packed(folder / "out")


def write_image(path: Path, seed: int) -> bytes:
    """JPEG content under a .png name, as in the published images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(seed))
    return image_bytes(seed)


def test_a_real_file(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "nlvr1/as_nlvr2"
    options = ["--examples", str(folder / "dev.json"), "--images", str(folder / "images"), "--out", str(tmp_path / "x")]
    assert main(options) == 0
    expected = defaultdict(list)
    for line in (folder / "dev.json").read_text().splitlines():
        fields = json.loads(line)
        pair = fields["identifier"].rsplit("-", 1)[0]
        expected[pair].append((" ".join(fields["sentence"].split()), fields["label"] == "True"))
    found = packed(tmp_path / "x")
    assert {
        pair: [(example["sentence"], example["label"]) for example in fields["examples"]]
        for pair, (fields, _, _) in found.items()
    } == expected
    for pair, (_, left, right) in found.items():
        assert left == (folder / f"images/dev/{pair}-img0.png").read_bytes()
        assert right == (folder / f"images/dev/{pair}-img1.png").read_bytes()


def test_rows_that_name_their_images(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "easy_vqa"
    source = tmp_path / "some.json"
    lines = (folder / "nlvr2_format/dev.json").read_text().splitlines()[:20]
    source.write_text("\n".join(lines))
    assert main(["--examples", str(source), "--images", str(folder), "--out", str(tmp_path / "x")]) == 0
    found = packed(tmp_path / "x")
    assert sum(len(fields["examples"]) for fields, _, _ in found.values()) == 20
    for fields in map(json.loads, lines):
        _, left, right = found[fields["identifier"].rsplit("-", 1)[0]]
        assert left == (folder / fields["left_file"]).read_bytes()
        assert right == (folder / fields["right_file"]).read_bytes()


def test_all_official_places_of_images(tmp_path: Path) -> None:
    expected = {}
    for pair, folder in {
        "train-1-0": "train/37", "train-2-0": "37", "dev-1-0": "dev", "test1-1-0": ".",
    }.items():  # fmt: skip
        left = write_image(tmp_path / folder / f"{pair}-img0.png", seed=len(expected))
        right = write_image(tmp_path / folder / f"{pair}-img1.png", seed=len(expected) + 10)
        expected[pair] = (left, right)
    rows = [row(f"{pair}-0", **({"directory": 37} if "train" in pair else {})) for pair in expected]
    found = run(tmp_path, [*rows, row("dev-1-0-1", label="false")])
    assert {pair: images for pair, (_, *images) in found.items()} == {pair: list(i) for pair, i in expected.items()}
    assert [example["label"] for example in found["dev-1-0"][0]["examples"]] == [True, False]


@pytest.mark.parametrize(
    ("label", "truth"), [("True", True), ("false", False), (True, True), (False, False), (None, None)]
)
def test_labels(tmp_path: Path, label: Any, truth: bool | None) -> None:
    for number in (0, 1):
        write_image(tmp_path / f"dev-1-0-img{number}.png", number)
    ((fields, _, _),) = run(tmp_path, [row("dev-1-0-0", label)]).values()
    assert fields["examples"] == [{"identifier": "dev-1-0-0", "sentence": "About dev-1-0-0", "label": truth}]


def test_every_kind_of_broken_row_is_listed(tmp_path: Path) -> None:
    for number in (0, 1):
        write_image(tmp_path / f"dev-1-0-img{number}.png", number)
    write_image(tmp_path / "dev-2-0-img0.png", 5)
    rows = [
        row("dev-1-0-0"),
        "not json",
        row("dev-1-0-0"),
        row("dev"),
        row("dev-1-0-1", label="maybe"),
        {**row("dev-1-0-2"), "sentence": " "},
        row("dev-2-0-0"),
        row("dev-1-0-3", left_file="dev-2-0-img0.png"),
        row("dev-1-0-4", left_file="absent.png"),
    ]
    assert list(run(tmp_path, rows)) == ["dev-1-0"]
    listed = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [(skip["source"], skip["reason"]) for skip in listed] == [
        ("rows.json:2", "bad_json"),
        ("rows.json:3", "duplicate_id"),
        ("rows.json:4", "bad_identifier"),
        ("dev-1-0-1", "bad_label"),
        ("dev-1-0-2", "empty_sentence"),
        ("dev-2-0-0", "image_missing"),
        ("dev-1-0-3", "image_mismatch"),
        ("dev-1-0-4", "image_missing"),
    ]
    assert "dev-2-0-img1.png" in listed[5]["detail"]


def test_one_broken_image_costs_the_pair(tmp_path: Path) -> None:
    for number in (0, 1):
        write_image(tmp_path / f"dev-1-0-img{number}.png", number)
        write_image(tmp_path / f"dev-2-0-img{number}.png", number)
    (tmp_path / "dev-1-0-img1.png").write_bytes(image_bytes()[:200])
    assert list(run(tmp_path, [row("dev-1-0-0"), row("dev-2-0-0")])) == ["dev-2-0"]


@pytest.mark.parametrize("value", [True, 5, [1], {"a": 1}, "\0", "\ud800"])
@pytest.mark.parametrize("field", ["identifier", "sentence", "label", "left_file", "right_file", "directory"])
def test_one_field_of_another_type_is_a_skip(tmp_path: Path, field: str, value: Any) -> None:
    for pair in ("dev-1-0", "dev-2-0"):
        for number in (0, 1):
            write_image(tmp_path / f"{pair}-img{number}.png", number)
    assert "dev-1-0" in run(tmp_path, [row("dev-1-0-0"), {**row("dev-2-0-0"), field: value}])
