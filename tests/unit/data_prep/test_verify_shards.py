"""Verification finds every kind of damage, and indexes shards that were written elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import pack_images
from data_prep.verify_shards import main
from mhmoe_vl.data.prepare.scan import scan_shard
from mhmoe_vl.data.shards import index_path, read_index, write_index
from tests.unit.data.files import image_bytes, pair_members, write_images, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of three images."""
    write_images(tmp_path / "images", range(6))
    out = tmp_path / "x"
    options = ["--images", str(tmp_path / "images"), "--out", str(out), "--samples-per-shard", "3"]
    assert pack_images.main(options) == 0
    return out


def flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[read_index(shard).samples[1].members["jpg"].offset + 100] ^= 8
    shard.write_bytes(content)


def change_index(shard: Path) -> None:
    fields = json.loads(index_path(shard).read_bytes())
    fields["samples"][0]["members"]["jpg"][0] += 512
    index_path(shard).write_text(json.dumps(fields))


def exchange(shard: Path) -> None:
    """Another shard, sound in itself, with its index."""
    write_index(scan_shard(write_tar(shard, [("other.jpg", image_bytes(9))]), kind="image"))


def mix_kinds(shard: Path) -> None:
    write_index(scan_shard(write_tar(shard, pair_members("other"))))
    (shard.parent / "manifest.json").unlink()


def test_sound_shards(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--decode", str(shards), "--workers", "2"]) == 0
    assert "2 shards of image: 6 usable samples with 6 items" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "checksum"),
        (change_index, "index_mismatch"),
        (lambda shard: index_path(shard).unlink(), "no_index"),
        (lambda shard: index_path(shard).write_bytes(b"{}"), "bad_index"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:3000]), "broken_shard"),
        (lambda shard: shutil.copy(shard, shard.with_name("x-00009.tar")), "duplicate_key"),
        (lambda shard: shutil.copy(shard, shard.with_name("x-00009.tar")), "not_in_manifest"),
        (lambda shard: shard.unlink(), "absent"),
        (exchange, "manifest_mismatch"),
        (mix_kinds, "mixed_kinds"),
    ],
)
def test_damage_is_found(
    shards: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], reason: str
) -> None:
    damage(shards / "x-00001.tar")
    with pytest.raises(SystemExit, match="65"):
        main([str(shards)])
    captured = capsys.readouterr()
    assert reason in captured.out
    assert "x-00001.tar" in captured.out
    assert captured.err.startswith("error: ")


def test_one_damaged_shard_does_not_hide_the_others(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = sorted(shards.glob("*.tar"))
    first.unlink()
    content = bytearray(second.read_bytes())
    content[124:136] = b"\xff" * 12
    second.write_bytes(content)
    shutil.copy(shards / "x-00000.idx.json", shards / "x-00002.idx.json")
    write_index(scan_shard(write_tar(shards / "x-00002.tar", [("z.jpg", image_bytes())])))
    with pytest.raises(SystemExit, match="65"):
        main([str(shards)])
    captured = capsys.readouterr()
    assert "2 shards of image: 1 usable samples" in captured.out
    assert all(reason in captured.out for reason in ("absent", "broken_shard", "not_in_manifest"))
    assert "3 problems in 3 files" in captured.err


def test_the_other_files_of_a_data_set_are_compared_with_its_manifest(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "skipped.jsonl").write_text("{}")
    with pytest.raises(SystemExit, match="65"):
        main([str(shards)])
    assert "skipped.jsonl: other sha256 than in" in " ".join(capsys.readouterr().out.split())
    (shards / "skipped.jsonl").unlink()
    (shards / "manifest.json").write_text("[]")
    with pytest.raises(SystemExit, match="65"):
        main([str(shards)])
    assert "bad_manifest" in capsys.readouterr().out


def test_two_data_sets_may_share_keys(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "y")
    assert main([str(shards), str(tmp_path / "y")]) == 0


def test_images_are_decoded_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [*pair_members("a"), ("b.jpg", image_bytes()[:300]), ("b.txt", b"text")]
    write_index(scan_shard(write_tar(tmp_path / "x.tar", members)))
    assert main([str(tmp_path)]) == 0
    with pytest.raises(SystemExit, match="65"):
        main(["--decode", str(tmp_path)])
    assert "broken_image" in capsys.readouterr().out


def test_img2dataset_shards_get_an_index(shared_data: Path, tmp_path: Path) -> None:
    shard = Path(shutil.copy(shared_data / "format_samples/img2dataset_shard/00000.tar", tmp_path))
    with pytest.raises(SystemExit, match="65"):
        main([str(tmp_path)])
    assert main(["--write-index", "--decode", str(tmp_path)]) == 0
    assert read_index(shard) == scan_shard(shard)
    assert main([str(tmp_path)]) == 0


def test_an_index_leaves_unusable_samples_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = write_tar(tmp_path / "x.tar", [*pair_members("a"), ("b.jpg", image_bytes()), *pair_members("c")])
    with pytest.raises(SystemExit, match="65"):
        main(["--write-index", str(tmp_path)])
    assert "incomplete" in capsys.readouterr().out
    assert [sample.key for sample in read_index(shard).samples] == ["a", "c"]
