"""The member of a shard that holds codes, and what a source takes from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mhmoe_vl.data.coded_views import (
    MEMBER,
    WHOLE,
    CodedView,
    CodesOrigin,
    ImageView,
    dump_codes,
    parse_codes,
    parse_view_of,
)
from mhmoe_vl.data.shards import read_index
from mhmoe_vl.data.stored_codes import StoredCodes
from mhmoe_vl.errors import ConfigError, DataError
from tests.unit.data.builders import pair_sample, write_shard

ORIGIN = CodesOrigin("ab" * 32, 8, 0.2, True)
VIEWS = [
    CodedView(ImageView((1, 2, 3, 4), True), (0, 1, 2, 3)),
    CodedView(WHOLE, (9, 9, 9, 9)),
    CodedView(ImageView((0, 0, 24, 16), False), (5, 6, 7, 8)),
]
STORED = StoredCodes(ORIGIN, num_patches=4, num_codes=10)


def test_what_is_written_is_read() -> None:
    data = dump_codes(ORIGIN, VIEWS)
    assert parse_codes(data) == (ORIGIN, VIEWS)
    assert json.loads(data)["views"][0] == {"box": [1, 2, 3, 4], "flip": True, "codes": [0, 1, 2, 3]}


def test_epochs_take_views_in_turn() -> None:
    members = {MEMBER: dump_codes(ORIGIN, VIEWS)}
    for epoch in range(7):
        view, codes = STORED.of(members, epoch)
        assert (view, tuple(codes.tolist())) == (VIEWS[epoch % 3].view, VIEWS[epoch % 3].codes)
        assert parse_view_of(members[MEMBER], epoch) == (ORIGIN, VIEWS[epoch % 3])


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    fields = json.loads(dump_codes(ORIGIN, VIEWS))
    change(fields)
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        changed(lambda fields: fields.pop("views")),
        changed(lambda fields: fields.update(views=[])),
        changed(lambda fields: fields.update(format="other/1")),
        changed(lambda fields: fields.update(tokenizer=None)),
        changed(lambda fields: fields["views"][0].update(codes=[])),
        changed(lambda fields: fields["views"][0].update(codes=[0, 1, 2, -3])),
        changed(lambda fields: fields["views"][0].update(codes=[0, 1, 2, 3.0])),
        changed(lambda fields: fields["views"][0].update(box=[1, 2, 3])),
        changed(lambda fields: fields["views"][0].update(box=[1, 2, 0, 4])),
        changed(lambda fields: fields["views"][0].update(flip=1)),
        changed(lambda fields: fields["views"][1].update(codes=[1, 2, 3])),
    ],
)
def test_anything_else_is_one_line(data: bytes) -> None:
    with pytest.raises(DataError, match=MEMBER) as caught:
        parse_codes(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, r"the sample has no \.visual_codes\.json member; make the shards again with python -m data_prep"),
        (
            {MEMBER: dump_codes(replace(ORIGIN, image_size=16), VIEWS)},
            "codes of images of 16 px, but model.image_size is 8",
        ),
        (
            {MEMBER: dump_codes(ORIGIN, [CodedView(WHOLE, (1, 2, 3))])},
            "has 3 codes up to 3, but the model has 4 patches",
        ),
        (
            {MEMBER: dump_codes(ORIGIN, [CodedView(WHOLE, (1, 2, 3, 10))])},
            "has 4 codes up to 10, .* and 10 visual codes",
        ),
    ],
)
def test_codes_that_do_not_fit_are_no_targets(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        STORED.of(members, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "cd" * 32}, r"SHA-256 cdcdcdcdcdcd\.\.\., but task.visual_codebook has abababababab\.\.\."),
        ({"crop_scale": None}, "views drawn with crop_scale None, but this run draws with 0.2"),
        ({"flip": False}, "views drawn with flip False, but this run draws with True"),
    ],
)
def test_shards_of_another_origin_are_refused_before_training(tmp_path: Path, change: Any, message: str) -> None:
    samples = {f"p{number}": pair_sample(number) for number in range(2)}
    for members in samples.values():
        members[MEMBER] = dump_codes(ORIGIN, VIEWS)
    good = read_index(write_shard(tmp_path / "good.tar", "pair", samples))
    assert set(good.samples[0].members) == {"jpg", "json", MEMBER}
    STORED.check("data.train.x", good)
    for members in samples.values():
        members[MEMBER] = dump_codes(replace(ORIGIN, **change), VIEWS)
    other = read_index(write_shard(tmp_path / "other.tar", "pair", samples))
    with pytest.raises(ConfigError, match=rf"data\.train\.x\.codes: .*other\.tar has codes of .*{message}"):
        STORED.check("data.train.x", other)
    plain = read_index(write_shard(tmp_path / "plain.tar", "pair", {"p": pair_sample(0)}))
    with pytest.raises(ConfigError, match=r"plain\.tar has no codes .* leave codes out"):
        STORED.check("data.train.x", plain)


def test_an_image_without_its_file_is_incomplete_whatever_its_codes(tmp_path: Path) -> None:
    samples = {"a": pair_sample(0), "b": {MEMBER: b"{}", "json": b"{}"}}
    index = read_index(write_shard(tmp_path / "x.tar", "pair", samples))
    assert [skip.reason for skip in index.skipped] == ["incomplete"]
