"""Pairs from COCO files, Karpathy splits and tables, real and broken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data_prep.pack_pairs import main
from mhmoe_vl.data.decode import decode_json
from mhmoe_vl.data.prepare.records import make_key
from mhmoe_vl.data.shards import ShardReader, find_shards, read_index
from tests.unit.data.files import write_images


def packed(folder: Path) -> dict[str, dict[str, Any]]:
    """Key -> JSON member, with the txt member as ``text``."""
    samples, reader = {}, ShardReader()
    for shard in find_shards(folder):
        index = read_index(shard)
        assert index.kind == "pair"
        for sample in index.samples:
            members = reader.read(index, sample)
            samples[sample.key] = {**decode_json(members["json"]), "text": members["txt"].decode()}
    return samples


def skips(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    return [(skip["source"], skip["reason"]) for skip in map(json.loads, lines)]


def run(folder: Path, *options: str) -> dict[str, dict[str, Any]]:
    out = folder / "out"
    assert main(["--images", str(folder), "--out", str(out), "--overwrite", "--max-skipped", "1", *options]) == 0
    return packed(out)


def coco(folder: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> str:
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return str(path)


def entry(number: int) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number:012d}.jpg"}


def test_karpathy_splits_of_real_photos(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "coco_cc/annotations/dataset_coco_mini_karpathy.json"
    options = ["--karpathy", str(source), "--images", str(shared_data / "coco_cc/images"), "--out", str(tmp_path / "x")]
    assert main([*options, "--split", "val+test"]) == 0
    expected = {
        f"{image['cocoid']:012d}": [" ".join(sentence["raw"].split()) for sentence in image["sentences"]]
        for image in json.loads(source.read_bytes())["images"]
        if image["split"] in ("val", "test")
    }
    found = packed(tmp_path / "x")
    assert {key: fields["captions"] for key, fields in found.items()} == expected
    assert all(fields["text"] == fields["captions"][0] for fields in found.values())


def test_the_official_coco_file_with_most_images_missing(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shared_data / "coco_annotations/captions_val2017.json"
    images = shared_data / "coco_cc/images/val2017"
    options = ["--coco", str(source), "--images", str(images), "--out", str(tmp_path / "x"), "--image-size", "64"]
    with pytest.raises(SystemExit, match="65"):
        main(options)
    assert "error: 97.8% of the source was unusable, more than --max-skipped 5.0%" in capsys.readouterr().err
    found = packed(tmp_path / "x")
    assert set(found) == {path.stem for path in images.glob("*.jpg")}
    assert len(skips(tmp_path / "x")) + len(found) == 5000


def test_captions_are_cleaned_and_problems_listed(tmp_path: Path) -> None:
    write_images(tmp_path, [1, 2, 3])
    annotations = [
        {"image_id": 1, "id": 10, "caption": " a\nman\u2028 "},
        {"image_id": 1, "id": 11, "caption": " \n"},
        {"image_id": 2, "id": 12, "caption": ""},
        {"image_id": 3, "id": 13, "caption": None},
        {"image_id": 3, "id": 14, "caption": "b"},
        {"image_id": 9, "id": 15, "caption": "nowhere"},
    ]
    images = [entry(1), entry(2), entry(3), entry(1), entry(4)]
    found = run(tmp_path, "--coco", coco(tmp_path, images, annotations))
    assert {key: (fields["image_id"], fields["captions"]) for key, fields in found.items()} == {
        "000000000001": (1, ["a man"]),
        "000000000003": (3, ["b"]),
    }
    assert skips(tmp_path / "out") == [
        ("captions.json: annotation 15", "annotation_without_image"),
        ("000000000001.jpg: caption", "empty_caption"),
        ("000000000002.jpg: caption", "empty_caption"),
        ("000000000002.jpg", "no_caption"),
        ("000000000003.jpg: caption", "bad_caption"),
        ("captions.json: image 1", "duplicate_id"),
        ("000000000004.jpg", "image_missing"),
    ]


def test_flickr_files_have_neither_folder_nor_coco_id(tmp_path: Path) -> None:
    write_images(tmp_path, [7])
    image = {"filename": f"{7:012d}.jpg", "imgid": 3, "split": "test", "sentences": [{"raw": "a"}, {"raw": "b"}]}
    source = tmp_path / "dataset_flickr30k.json"
    source.write_text(json.dumps({"images": [image], "dataset": "flickr30k"}))
    found = run(tmp_path, "--karpathy", str(source), "--split", "test")
    assert found["000000000003"]["captions"] == ["a", "b"]


CSV = b'file,comment\n000000000001.jpg,"a, b"\n000000000002.jpg,c\n000000000001.jpg,d\n000000000002.jpg,\xff\n,e\n'
JSONL = b'{"file": "000000000001.jpg", "comment": "a, b"}\n\nnonsense\n{"file": "000000000001.jpg", "comment": "d"}\n'


def test_a_csv_table(tmp_path: Path) -> None:
    write_images(tmp_path, [1, 2])
    (tmp_path / "t.csv").write_bytes(CSV)
    options = ["--table", str(tmp_path / "t.csv"), "--image-column", "file", "--caption-columns", "comment"]
    found = run(tmp_path, *options)
    assert {key: fields["captions"] for key, fields in found.items()} == {
        "000000000001": ["a, b", "d"],
        "000000000002": ["c"],
    }
    assert skips(tmp_path / "out") == [("t.csv:6", "no_image_path"), ("000000000002.jpg: caption", "not_utf8")]


def test_tables_with_tabs_and_json_lines(tmp_path: Path) -> None:
    write_images(tmp_path / "sub", [1])
    write_images(tmp_path, [1])
    (tmp_path / "t.tsv").write_text("image\ten\tde\nsub/000000000001.jpg\ta man\tein Mann\n")
    found = run(tmp_path, "--table", str(tmp_path / "t.tsv"), "--caption-columns", "en", "de")
    assert [fields["captions"] for fields in found.values()] == [["a man", "ein Mann"]]
    (tmp_path / "t.jsonl").write_bytes(JSONL)
    options = ["--table", str(tmp_path / "t.jsonl"), "--image-column", "file", "--caption-columns", "comment"]
    assert [fields["captions"] for fields in run(tmp_path, *options).values()] == [["a, b", "d"]]
    assert skips(tmp_path / "out") == [("t.jsonl:3", "bad_json")]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", ["--coco"], "not valid JSON"),
        (b"\xff\xfe{}", ["--coco"], "not UTF-8"),
        (b'{"images": []}', ["--coco"], "must have a list of objects 'annotations'"),
        (b'{"images": [{}], "annotations": []}', ["--coco"], "an entry has no 'id'"),
        (b'{"images": [], "annotations": []}', ["--coco"], "the source has no entries"),
        (b'{"images": [{"id": 5, "file_name": "x"}], "annotations": []}', ["--coco"], "1 of 1 .* image_missing"),
        (b'{"images": [{"split": "train"}]}', ["--split", "test", "--karpathy"], "no image in split 'test'"),
        (b'{"images": []}', ["--split", "tset", "--karpathy"], r"unknown split 'tset' \(did you mean 'test'\?\)"),
        (b"x", ["--table"], "must end in .csv, .tsv or .jsonl"),
        (b'{"images": [{"split": ["test"]}]}', ["--karpathy"], "'split' must be a string, not a list"),
        (
            b'{"images": [{"id": [5]}], "annotations": []}',
            ["--coco"],
            "'id' must be an integer or a string, not a list",
        ),
        (b'{"images": [], "annotations": [{"image_id": {}}]}', ["--coco"], "'image_id' must be .*, not an object"),
        (
            b'{"images": [{"id": 5, "file_name": null}], "annotations": []}',
            ["--coco"],
            r"source.json: 'file_name' must be a string, not null in {\"id\": 5, \"file_name\": null}",
        ),
        (
            b'{"images": [{"split": "test", "imgid": 1, "filename": "a.jpg", "filepath": null, "sentences": []}]}',
            ["--split", "test", "--karpathy"],
            "'filepath' must be a string, not null",
        ),
        (
            b'{"images": [{"split": "test", "imgid": 1, "filename": "", "filepath": "\\u0000", "sentences": []}]}',
            ["--split", "test", "--karpathy"],
            "1 of 1 entries were skipped as image_missing",
        ),
        (b'{"images": [{"id": 1e999}], "annotations": []}', ["--coco"], "not valid JSON: 1e999 is out of range"),
    ],
)
def test_files_of_another_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, options: list[str], message: str
) -> None:
    (tmp_path / "source.json").write_bytes(content)
    with pytest.raises(SystemExit, match="65"):
        main([*options, str(tmp_path / "source.json"), "--images", str(tmp_path), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_quotes_between_tabs_are_characters_like_any_other(tmp_path: Path) -> None:
    write_images(tmp_path, [1, 2, 3])
    rows = ['"a man', 'a 6" pipe', 'say "no"']
    lines = [f"{number:012d}.jpg\t{row}\n" for number, row in enumerate(rows, start=1)]
    (tmp_path / "t.tsv").write_text("image\tcaption\n" + "".join(lines))
    found = run(tmp_path, "--table", str(tmp_path / "t.tsv"))
    assert [fields["captions"] for fields in found.values()] == [[row] for row in rows]


@pytest.mark.parametrize("rows", ['{2},"a man\n{3},a dog\n', '{2},"a man\n{3},"a dog\n', '{2},a\n{3},"a "big" dog"\n'])
def test_a_quote_left_open_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str) -> None:
    write_images(tmp_path, [1, 2, 3])
    files = [f"{number:012d}.jpg" for number in range(4)]
    (tmp_path / "t.csv").write_text("image,caption\n{1},a cat\n".format(*files) + rows.format(*files))
    with pytest.raises(SystemExit, match="65"):
        main(["--table", str(tmp_path / "t.csv"), "--images", str(tmp_path), "--out", str(tmp_path / "out")])
    line = 3 if rows.startswith('{2},"') else 4
    assert f"cannot read the row that starts in line {line}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_with_another_number_of_fields(tmp_path: Path) -> None:
    write_images(tmp_path, [1, 2])
    rows = '000000000001.jpg,a man, and a dog\n\n000000000002.jpg\n000000000002.jpg,"two\nlines"\n000000000001.jpg,b\n'
    (tmp_path / "t.csv").write_text("image,caption\n" + rows)
    found = run(tmp_path, "--table", str(tmp_path / "t.csv"))
    assert {key: fields["captions"] for key, fields in found.items()} == {
        "000000000001": ["b"],
        "000000000002": ["two lines"],
    }
    assert skips(tmp_path / "out") == [("t.csv:2", "wrong_number_of_fields"), ("t.csv:4", "wrong_number_of_fields")]


def test_image_paths_of_a_table(tmp_path: Path) -> None:
    write_images(tmp_path, [1, 2])
    (tmp_path / f"{1:012d}.png").write_bytes((tmp_path / f"{2:012d}.jpg").read_bytes())
    one = f"{1:012d}"
    (tmp_path / "t.csv").write_text(f"image,caption\n{one}.jpg,a\n{one}.png,b\n.,c\n./{one}.jpg,d\n\0,e\n")
    found = run(tmp_path, "--table", str(tmp_path / "t.csv"))
    # Two images of one name get keys of their own, and two spellings of a path are one image.
    assert {fields["file"]: fields["captions"] for fields in found.values()} == {
        f"{one}.jpg": ["a", "d"],
        f"{one}.png": ["b"],
    }
    assert set(found) == {make_key(f"{one}.jpg"), make_key(f"{one}.png")}
    assert skips(tmp_path / "out") == [(".", "image_missing"), ("\0", "image_missing")]


def test_a_column_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("imag,caption\na.jpg,b\n")
    with pytest.raises(SystemExit, match="65"):
        main(["--table", str(tmp_path / "t.csv"), "--images", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "has no column 'image' (did you mean 'imag'?); columns: imag, caption" in capsys.readouterr().err


def test_a_holdout_is_a_second_data_set(tmp_path: Path) -> None:
    write_images(tmp_path, range(40))
    annotations = [{"image_id": i, "id": i, "caption": f"c{i}"} for i in range(40)]
    train = run(tmp_path, "--coco", coco(tmp_path, [entry(i) for i in range(40)], annotations), "--holdout", "0.2")
    val = packed(tmp_path / "out-val")
    assert val
    assert set(train) | set(val) == {f"{i:012d}" for i in range(40)}
    assert not set(train) & set(val)
