"""Codes that were made before training are the targets that training would have made itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep import tokenize_images
from mhmoe_vl.config import validate_config
from mhmoe_vl.data.batch import Batch
from mhmoe_vl.data.coded_views import MEMBER, parse_codes
from mhmoe_vl.data.decode import decode_image, image_member
from mhmoe_vl.data.image import ImageTransform
from mhmoe_vl.data.loader import MicroBatch, ShardDataset, train_loader
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.visual_codebook import VisualCodebook
from mhmoe_vl.tasks.pretrain import PretrainTask
from mhmoe_vl.train import run
from mhmoe_vl.train.build import build_dataset, build_plan, build_task
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.metrics import read_metrics
from tests.integration.runs import ALONE, figures, final_weights, pretraining

NUM_VIEWS = 3


@pytest.fixture(scope="module")
def coded(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images-views`` and ``pairs-views`` with three crops of each image; ``images-whole`` and so on with itself."""
    folder = tmp_path_factory.mktemp("coded")
    common = ["--tokenizer", str(shards / "codebook.safetensors"), "--image-size", "32"]
    for name, views in product(("images", "pairs"), ("views", "whole")):
        options = ["--views", str(NUM_VIEWS), "--crop-scale", "0.5"] if views == "views" else []
        out = ["--shards", str(shards / f"{name}-train"), "--out", str(folder / f"{name}-{views}")]
        assert tokenize_images.main([*common, *options, *out]) == 0
    return folder


def config_of(shards: Path, coded: Path, out: Path, views: str, **changes: Any) -> dict[str, Any]:
    tree = pretraining(shards, out, **changes)
    for name, folder in (("image", "images"), ("pair", "pairs")):
        tree["data"]["train"][name] |= {"shards": str(coded / f"{folder}-{views}"), "codes": True}
    if views == "whole":
        tree["data"]["augment"] = {"crop_scale": None, "flip": False}
    return tree


def dataset_of(tree: dict[str, Any]) -> ShardDataset:
    config = validate_config(RunConfig, tree)
    return build_dataset(config, config.data.train, training=True)


def loaded(config: RunConfig, dataset: ShardDataset, steps: range, num_workers: int = 0) -> Iterator[MicroBatch]:
    return train_loader(
        dataset,
        build_plan(config, dataset),
        steps=steps,
        num_micro_batches=1,
        rank=0,
        world_size=1,
        num_workers=num_workers,
        pin_memory=False,
    )


def assert_same(left: Batch, right: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name


def test_stored_codes_are_those_of_the_batch(shards: Path, coded: Path, tmp_path: Path) -> None:
    """Over more epochs than there are views, whatever the workers, and from a later step on; the loss is equal too."""
    config = validate_config(RunConfig, config_of(shards, coded, tmp_path, "views"))
    codebook = VisualCodebook.load(shards / "codebook.safetensors")
    dataset = build_dataset(config, config.data.train, training=True)
    num_steps = 12 * (NUM_VIEWS + 1)  # two of 24 images a step
    steps = list(loaded(config, dataset, range(num_steps)))
    seen: dict[str, list[bytes]] = {}
    for micro_batch in steps:
        for source in ("image", "pair"):
            batch = micro_batch[source]
            assert batch.image_codes is not None
            assert torch.equal(batch.image_codes, codebook.encode(batch.image))  # type: ignore[arg-type]
            for sample_id, image in zip(batch.sample_ids, batch.image, strict=True):  # type: ignore[arg-type]
                seen.setdefault(f"{source} {sample_id}", []).append(image.numpy().tobytes())
        assert micro_batch["text"].image_codes is None
    assert len(seen) == 48
    for views in seen.values():
        # Epoch 3 looks at what epoch 0 has looked at, and at nothing that others have.
        assert len(views) == NUM_VIEWS + 1
        assert views[0] == views[NUM_VIEWS]
    assert sum(len(set(views)) == NUM_VIEWS for views in seen.values()) > 40  # two crops may be the same by chance

    later = range(20, 26)
    for num_workers in (0, 2):
        again = build_dataset(config, config.data.train, training=True)
        for expected, found in zip(steps[20:26], loaded(config, again, later, num_workers), strict=True):
            for source, batch in found.items():
                assert_same(batch, expected[source])

    task = build_task(config)
    assert isinstance(task, PretrainTask)
    for micro_batch in steps[:2]:
        totals = task.num_targets([micro_batch])
        online = {name: replace(batch, image_codes=None) for name, batch in micro_batch.items()}
        assert torch.equal(task(micro_batch, totals).loss, task(online, totals).loss)
        other = {
            name: batch if batch.image_codes is None else replace(batch, image_codes=(batch.image_codes + 1) % 16)
            for name, batch in micro_batch.items()
        }
        assert not torch.equal(task(other, totals).loss, task(online, totals).loss)


def test_views_are_those_that_were_stored(shards: Path, coded: Path, tmp_path: Path) -> None:
    config = validate_config(RunConfig, config_of(shards, coded, tmp_path, "views"))
    dataset = build_dataset(config, config.data.train, training=True)
    source = dataset.indexed("image")
    for item, epoch in product(range(5), range(4)):
        shard, sample, _ = source.locate(item)
        members = dataset.reader.read(shard, sample)
        view = parse_codes(members[MEMBER])[1][epoch % NUM_VIEWS].view
        expected = ImageTransform(32)(decode_image(image_member(members)), 0, view)
        example = source.builder(members, 0, key="x", seed=epoch + 7, epoch=epoch)
        assert torch.equal(example.image, expected)  # type: ignore[arg-type]


def test_a_run_with_stored_codes_is_the_run_without_them(shards: Path, coded: Path, tmp_path: Path) -> None:
    """Whole images: every figure of every step, held-out ones too, and the weights at the end."""
    held_out = {"image": {"kind": "image", "shards": str(shards / "images-train")}}
    for name in ("stored", "online"):
        tree = config_of(shards, coded, tmp_path / name, "whole", validate_every=2)
        tree["data"]["validation"] = {key: dict(source) for key, source in held_out.items()}
        if name == "stored":
            tree["data"]["validation"]["image"] |= {"shards": str(coded / "images-whole"), "codes": True}
        else:
            tree["data"]["train"] = pretraining(shards, tmp_path)["data"]["train"]
        run.train(validate_config(RunConfig, tree), ALONE)
    assert figures(tmp_path / "stored") == figures(tmp_path / "online")
    assert len(figures(tmp_path / "stored")) == 4
    assert read_metrics(tmp_path / "stored", "validation") == read_metrics(tmp_path / "online", "validation")
    assert final_weights(tmp_path / "stored") == final_weights(tmp_path / "online")


@pytest.mark.parametrize(
    ("views", "change", "message"),
    [
        (
            "views",
            {"crop_scale": 0.3, "flip": True},
            r"data\.train\.image\.codes: .* crop_scale 0\.5, .* draws with 0\.3",
        ),
        ("views", {"crop_scale": 0.5, "flip": False}, r"drawn with flip True, but this run draws with False"),
        ("whole", {"crop_scale": 0.5, "flip": True}, r"drawn with crop_scale None, but this run draws with 0\.5"),
        (
            "views",
            {"crop_scale": 0.5, "color_jitter": 0.4},
            r"data\.train\.image\.codes: .*; leave out data\.augment\.color_jitter$",
        ),
        (
            "views",
            {"crop_scale": 0.5, "rand_augment": True, "random_erasing": 0.25},
            r"leave out data\.augment\.rand_augment and data\.augment\.random_erasing$",
        ),
    ],
)
def test_views_that_training_would_not_draw_are_refused(
    shards: Path, coded: Path, tmp_path: Path, views: str, change: dict[str, Any], message: str
) -> None:
    tree = config_of(shards, coded, tmp_path, views)
    tree["data"]["augment"] = change
    with pytest.raises(ConfigError, match=message):
        dataset_of(tree)


def test_codes_of_another_tokenizer_are_refused(shards: Path, coded: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    codebook = VisualCodebook.load(shards / "codebook.safetensors")
    other.write_bytes(VisualCodebook(codebook.codes_KC.flip(0), codebook.patch_size).serialized())
    tree = config_of(shards, coded, tmp_path / "run", "views")
    tree["task"]["visual_codebook"] = str(other)
    with pytest.raises(ConfigError, match=r"images-views.*tar has codes of the visual tokenizer with SHA-256 .* has "):
        run.train(validate_config(RunConfig, tree), ALONE)


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("text", {}, r"data\.train\.text\.codes: only pretraining on images and pairs predicts visual codes"),
        ("image", {"shards": "https://host/x.tar"}, r"data\.train\.image\.codes: a stream has no epochs"),
        ("image", {"shards": "images-train"}, r"data\.train\.image\.codes: .* has no codes \(\.visual_codes\.json\)"),
    ],
)
def test_codes_where_there_are_none_are_refused(
    shards: Path, coded: Path, tmp_path: Path, source: str, change: dict[str, str], message: str
) -> None:
    tree = config_of(shards, coded, tmp_path, "views")
    tree["data"]["train"][source] |= {"codes": True, **change}
    if change.get("shards") == "images-train":
        tree["data"]["train"][source]["shards"] = str(shards / "images-train")
    with pytest.raises(ConfigError, match=message):
        dataset_of(tree)


def test_the_middle_of_held_out_images_has_no_codes(shards: Path, coded: Path, tmp_path: Path) -> None:
    """Stored ones are of whole images."""
    tree = config_of(shards, coded, tmp_path, "views")
    tree["data"] |= {
        "center_crop": True,
        "validation": {"image": {"kind": "image", "shards": str(coded / "images-whole"), "codes": True}},
    }
    with pytest.raises(ConfigError, match=r"data\.validation\.image\.codes: .* data\.center_crop cuts the middle out"):
        dataset_of(tree)
    del tree["data"]["validation"]["image"]["codes"]
    dataset_of(tree)
