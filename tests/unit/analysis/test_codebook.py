"""The health of a visual tokenizer: hand-worked images, and the command on a tokenizer that has collapsed."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mhmoe_vl.analysis.codebook.__main__ import main
from mhmoe_vl.analysis.codebook.health import CodebookHealth, signs_of_collapse
from mhmoe_vl.analysis.codebook.measure import measure
from mhmoe_vl.data.prepare.drawn_images import LoadedImages
from mhmoe_vl.data.prepare.scan import scan_shard
from mhmoe_vl.data.shards import Skip, write_index
from mhmoe_vl.errors import DataError
from mhmoe_vl.models.visual_codebook import VisualCodebook
from mhmoe_vl.report.codebook import view_codebook
from tests.unit.data.files import encoded, write_tar
from tests.unit.models.builders import make_visual_tokenizer

PATCH = 2
#: Codes of one gray value each; what a patch of that gray, or nearly that gray, gets.
GRAYS = (-1.0, 0.0, 1.0, 0.5)
#: Three images of 2 x 3 patches would not be square, so of 2 x 2: bytes of each patch.
IMAGES = ([[0, 0], [0, 255]], [[0, 4], [255, 255]], [[0, 255], [128, 128]])
#: By hand: the nearest code of each patch.
CODES = ([[0, 0], [0, 2]], [[0, 0], [2, 2]], [[0, 2], [1, 1]])


def tokenizer() -> VisualCodebook:
    return VisualCodebook(torch.tensor(GRAYS)[:, None].expand(-1, 3 * PATCH**2).clone(), PATCH)


def pixels(image: list[list[int]]) -> np.ndarray:
    gray = np.array(image, np.uint8).repeat(PATCH, 0).repeat(PATCH, 1)
    return np.stack([gray] * 3)


def batches(*sizes: int) -> Iterator[LoadedImages]:
    """The images in batches of these sizes; each batch has left one image out."""
    start = 0
    for size in sizes:
        keys = tuple(f"i{number}" for number in range(start, start + size))
        images = [pixels(image) for image in IMAGES[start : start + size]]
        stacked = np.stack(images) if images else np.empty((0, 3, 4, 4), np.uint8)
        yield LoadedImages(keys, stacked, (Skip("x", "unreadable", "why"),))
        start += size


def measured(*sizes: int, num_codes_shown: int = 4) -> CodebookHealth:
    return measure(
        tokenizer(), batches(*sizes), name="x", image_size=4, num_codes_shown=num_codes_shown, num_pictures=2
    )


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (0, 2, 1)])
def test_figures_by_hand_whatever_the_batches(sizes: tuple[int, ...]) -> None:
    health = measured(*sizes)
    assert (health.num_images, health.num_patches, health.num_codes, health.num_used, health.num_dead) == (
        3,
        12,
        4,
        3,
        1,
    )
    assert health.counts == [6, 2, 4, 0]
    shares = [6 / 12, 2 / 12, 4 / 12]
    assert math.isclose(health.perplexity, math.exp(-sum(share * math.log(share) for share in shares)))
    assert health.largest_share == 0.5
    # Of six pairs of neighbours, those of the upper left, of both rows of the second, and of the lower right agree.
    assert health.same_as_left == 4 / 6
    assert math.isclose(health.same_by_chance, sum(share**2 for share in shares))
    assert len(health.skipped) == len(sizes)
    values = [value / 127.5 - 1 for image in IMAGES for row in image for value in row]
    nearest = [GRAYS[code] for image in CODES for row in image for code in row]
    error = sum((value - code) ** 2 for value, code in zip(values, nearest, strict=True)) / 12
    mean = sum(values) / 12
    assert math.isclose(health.error, error, rel_tol=1e-5)
    assert math.isclose(health.baseline_error, sum((value - mean) ** 2 for value in values) / 12, rel_tol=1e-5)


def test_codes_are_shown_with_their_own_patches() -> None:
    health = measured(1, 2)
    assert [(code.code, code.count) for code in health.most] == [(0, 6), (2, 4), (1, 2)]
    assert health.least == []
    for code, grays in zip(health.most, ([0, 0, 0, 0, 4, 0], [255] * 4, [128] * 2), strict=True):
        assert code.patches.shape == (len(grays), 3, PATCH, PATCH)
        assert code.patches.flatten(1).unique(dim=1).flatten().tolist() == grays
        assert code.decoded.unique().tolist() == [{0: 0, 2: 255, 1: 128}[code.code]]
    few = measured(3, num_codes_shown=2)
    assert [code.code for code in few.most] == [0, 2]
    assert [code.code for code in few.least] == [1]
    assert [picture.key for picture in health.pictures] == ["i0", "i1"]
    assert [picture.codes.tolist() for picture in health.pictures] == list(CODES[:2])
    assert torch.equal(health.pictures[0].decoded, torch.from_numpy(pixels(IMAGES[0])))


def test_no_more_than_eight_patches_are_kept_of_a_code() -> None:
    stacked = np.stack([pixels([[step, 0], [0, 0]]) for step in range(1, 13)])
    loaded = iter([LoadedImages(tuple("abcdefghijkl"), stacked, ())])
    health = measure(tokenizer(), loaded, name="x", image_size=4, num_codes_shown=1, num_pictures=0)
    assert health.most[0].count == 48
    assert [patch[0, 0, 0].item() for patch in health.most[0].patches] == [1, 0, 0, 0, 2, 0, 0, 0]


def test_without_an_image_there_is_nothing_to_measure() -> None:
    with pytest.raises(DataError, match="none of 1 images could be read, first x: why"):
        measured(0)


@pytest.mark.parametrize(
    ("num_used", "perplexity", "largest_share", "num_patches", "signs"),
    [
        (50, 10.0, 0.5, 1000, []),
        (49, 10.0, 0.5, 1000, ["only 49 of 100 codes are used, 49.0%, less than 50%"]),
        (50, 9.9, 0.5, 1000, ["perplexity 9.9 is 9.9% of 100 codes, less than 10%"]),
        (50, 10.0, 0.51, 1000, ["one code takes 51.0% of all patches, more than 50%"]),
        # Too few patches to say that codes are dead.
        (49, 9.9, 0.5, 999, []),
        (1, 1.0, 1.0, 999, ["one code takes 100.0% of all patches, more than 50%"]),
    ],
)
def test_collapse_has_stated_thresholds(
    num_used: int, perplexity: float, largest_share: float, num_patches: int, signs: list[str]
) -> None:
    found = signs_of_collapse(
        num_codes=100, num_patches=num_patches, num_used=num_used, perplexity=perplexity, largest_share=largest_share
    )
    assert found == signs


def write_images_shard(folder: Path, *, num_images: int) -> Path:
    """Images of 8 px, all nearly black but for one white patch, and a broken one."""
    members = []
    for number in range(num_images):
        image = np.full((8, 8, 3), number % 5, np.uint8)
        image[:2, :2] = 255
        members.append((f"k{number:03d}.png", encoded(Image.fromarray(image), "PNG")))
    members.append(("broken.png", members[0][1][:20]))
    write_index(replace(scan_shard(write_tar(folder / "x.tar", members)), kind="image"))
    return folder


def test_a_trained_tokenizer_says_what_size_its_images_are(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.safetensors"
    trained = make_visual_tokenizer()
    file.write_bytes(trained.serialized())
    assert (
        main(
            [
                "--tokenizer",
                str(file),
                "--shards",
                str(write_images_shard(tmp_path / "shards", num_images=3)),
                "--out",
                str(tmp_path / "page.html"),
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / "page.json").read_text())
    assert found["image_size"] == trained.encoder.config.image_size != 224
    assert found["num_codes"] == trained.num_codes


def test_the_command_warns_of_a_collapse_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_images_shard(tmp_path / "shards", num_images=12)
    file = tmp_path / "tokenizer.safetensors"
    file.write_bytes(tokenizer().serialized())
    records = [
        {"kind": kind, "step": step, "cosine": 0.1 * step, "codes_perplexity": 3.0 + step, "codes_revived": 4 - step}
        for kind in ("train", "validation")
        for step in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["--tokenizer", str(file), "--shards", str(shards), "--image-size", "8"]
    assert main([*options, "--out", str(tmp_path / "page.html")]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(tmp_path / "page.json"), str(tmp_path / "page.html")]
    warning = "one code takes 93.8% of all patches, more than 50%"
    assert f"warning: {file}: {warning}" in err.splitlines()
    found = json.loads((tmp_path / "page.json").read_text())
    assert found["warnings"] == [warning]
    assert (found["counts"], found["num_used"], found["num_images"]) == ([180, 0, 12, 0], 2, 12)
    assert found["thresholds"]["max_share"] == 0.5
    assert [skip["source"] for skip in found["skipped"]] == ["x.tar: broken"]
    page = (tmp_path / "page.html").read_text()
    assert f"the codebook has collapsed: {warning}" in html.unescape(page)
    for shown in ("Cosine similarity with the teacher", "Perplexity of the codes", "Codes revived", "x.tar: broken"):
        assert shown in page
    assert "Codes used<" not in page  # the records do not tell
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)', page))
    assert page.count('alt="its codes"') == 8

    assert main([*options, "--out", str(tmp_path / "again.html"), "--workers", "2"]) == 0
    assert (tmp_path / "again.json").read_text() == (tmp_path / "page.json").read_text()

    assert main([*options, "--out", str(tmp_path / "few.html"), "--max-images", "5"]) == 0
    assert json.loads((tmp_path / "few.json").read_text())["num_images"] in (4, 5)  # one may be the broken one


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--out", "page.txt"], 64, "--out page.txt: must end in .html"),
        (["--image-size", "7"], 64, "--image-size 7 must be a multiple of the 2 px of a patch"),
        (["--shards", "absent"], 65, "no shards at absent"),
        (["--tokenizer", "absent"], 65, "absent: no such visual tokenizer"),
    ],
)
def test_bad_requests_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], code: int, message: str
) -> None:
    shards = write_images_shard(tmp_path / "shards", num_images=1)
    file = tmp_path / "tokenizer.safetensors"
    file.write_bytes(tokenizer().serialized())
    options = [
        "--tokenizer",
        str(file),
        "--shards",
        str(shards),
        "--image-size",
        "8",
        "--out",
        str(tmp_path / "p.html"),
    ]
    with pytest.raises(SystemExit, match=str(code)):
        main([*options, *change])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_curves_are_drawn_of_thousands_of_codes_and_of_one() -> None:
    """Only ranks that exist, and the uniform line to the last code."""
    for counts in ([1] * 3000 + [0] * 5192, [7]):
        health = replace(measured(3), num_codes=len(counts), counts=counts, num_patches=sum(counts))
        view = view_codebook(health)
        assert view.frequencies.count("<path") < 400
        assert view.panels == []
