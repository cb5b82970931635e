"""Mixed images and shares of labels: by hand, against timm, and whoever else is in the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from timm.data.mixup import rand_bbox
from torch import Tensor

from mhmoe_vl.data.batch import Batch, Example
from mhmoe_vl.data.image import AugmentConfig, ImageTransform
from mhmoe_vl.data.loader import ShardDataset, Source, evaluation_loader, train_loader
from mhmoe_vl.data.mixing import Mixing, blend, cut
from mhmoe_vl.data.plan import MixturePlan, SampleRef
from mhmoe_vl.data.samples import ClassSamples
from tests.unit.data.builders import json_bytes, write_shard
from tests.unit.data.files import image_bytes

CLASSES = [f"c{number}" for number in range(9)]


def flat(value: int, height: int = 24, width: int = 32) -> Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def test_blends_by_hand() -> None:
    assert (blend(flat(100), flat(200), 0.75) == 125).all()
    assert (blend(flat(255), flat(0), 0.499) == 127).all()
    assert torch.equal(blend(flat(3), flat(9), 1.0), flat(3))


def test_cuts_by_hand() -> None:
    """Of 6 x 8, a quarter: half of each side, around the middle."""
    image, other = flat(1, 6, 8), flat(2, 6, 8)
    mixed, share = cut(image, other, 0.75, (0.5, 0.5))
    expected = flat(1, 6, 8)
    expected[:, 2:5, 2:6] = 2
    assert torch.equal(mixed, expected)
    assert share == 0.75
    # Around a corner, a quarter of all is left of the rectangle.
    mixed, share = cut(image, other, 0.0, (0.0, 0.0))
    assert (mixed[:, :3, :4] == 2).all()
    assert share == 0.75
    assert (mixed == 1).sum() == 3 * 36
    assert torch.equal(image, flat(1, 6, 8))


@pytest.mark.parametrize("seed", range(20))
def test_rectangles_are_those_of_timm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    share, (height, width), places = rng.random(), rng.integers(5, 40, 2), rng.random(2)
    centers = [int(size * place) for size, place in zip((height, width), places, strict=True)]
    with mock.patch("timm.data.mixup.np.random.randint", side_effect=centers):
        top, bottom, left, right = rand_bbox((1, 3, height, width), share)
    mixed, _ = cut(flat(0, height, width), flat(1, height, width), share, (places[0], places[1]))
    expected = flat(0, height, width)
    expected[:, top:bottom, left:right] = 1
    assert torch.equal(mixed, expected)


def example(value: int, label: int) -> Example:
    return Example(str(label), label, image=flat(value), label=label)


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}], ids=str)
def test_a_label_s_share_is_that_of_its_image(options: dict[str, float]) -> None:
    """0 and 200: the mean pixel says how much of the partner is there."""
    mixing, rng = Mixing(**options), np.random.default_rng(0)
    found = [mixing(example(0, 3), example(200, 5), rng) for _ in range(600)]
    shares = []
    num_blended = 0
    for mixed in found:
        assert (mixed.label, mixed.other_label) == (3, 5)
        assert mixed.image is not None
        assert mixed.label_share is not None
        assert mixed.image.float().mean() == pytest.approx(200 * (1 - float(mixed.label_share)), abs=0.5)
        shares.append(float(mixed.label_share))
        num_blended += int(len(mixed.image.unique()) == 1 and 0 < int(mixed.image[0, 0, 0]) < 200)
    if "cutmix" not in options:
        assert num_blended > 580
        # Beta(0.8, 0.8) has mean 1/2 and variance 1 / (4 * 2.6).
        assert np.mean(shares) == pytest.approx(0.5, abs=0.04)
        assert np.var(shares) == pytest.approx(1 / 10.4, rel=0.15)
    elif "mixup" in options:
        assert num_blended == pytest.approx(300, abs=50)
    else:
        assert num_blended == 0
        assert min(shares) < 0.2 < 0.9 < max(shares)


def test_nothing_to_mix_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="mixup or cutmix"):
        Mixing()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    samples = {f"s{n}": {"jpg": image_bytes(n), "json": json_bytes(**{"class": f"c{n}"})} for n in range(9)}
    write_shard(folder / "classes-00000.tar", "class", samples)
    return folder


def dataset_of(shards: Path, mixing: Mixing | None, seed: int = 0) -> ShardDataset:
    builder = ClassSamples(ImageTransform(16, AugmentConfig()), CLASSES)
    return ShardDataset({"x": Source("x", [shards], builder, mixing)}, seed=seed, pad_id=0)


def loaded(dataset: ShardDataset, **changes: Any) -> list[Batch]:
    plan = MixturePlan(num_items=dataset.num_items(), weights={"x": 1}, batch_size=6, seed=3)
    options: dict[str, Any] = {
        "num_micro_batches": 1, "rank": 0, "world_size": 1, "num_workers": 0, "pin_memory": False, **changes,
    }  # fmt: skip
    return [batches["x"] for batches in train_loader(dataset, plan, steps=range(6), **options)]


def samples_of(batches: list[Batch]) -> dict[tuple[str, int], tuple[Any, ...]]:
    found = {}
    for batch in batches:
        assert batch.image is not None
        columns = (batch.label, batch.other_label, batch.label_share)
        for row, sample_id in enumerate(batch.sample_ids):
            values = tuple(None if column is None else column[row].item() for column in columns)
            found[sample_id, int(batch.seed[row])] = (batch.image[row].flatten().tolist(), *values)
    return found


def test_whoever_shares_the_batch(shards: Path) -> None:
    dataset = dataset_of(shards, Mixing(0.8, 1.0))
    whole = samples_of(loaded(dataset))
    assert len(whole) == 36
    parts = [batch for rank in range(3) for batch in loaded(dataset, num_micro_batches=2, rank=rank, world_size=3)]
    assert samples_of(parts) == whole
    # Partners and shares are drawn anew in every epoch, and with every seed.
    of_first = {values[1:] for (name, _), values in whole.items() if name == "s0"}
    assert len(of_first) == sum(name == "s0" for name, _ in whole) > 1
    assert {values[2] for values in whole.values()} == set(range(9))
    others = samples_of(loaded(dataset_of(shards, Mixing(0.8, 1.0), seed=1)))
    assert sorted(values[3] for values in others.values()) != sorted(values[3] for values in whole.values())


def test_a_partner_is_seen_in_another_view(tmp_path: Path) -> None:
    """Of a single image, which is its own partner."""
    members = {"jpg": image_bytes(1), "json": json_bytes(**{"class": "c1"})}
    write_shard(tmp_path / "one-00000.tar", "class", {"s": members})
    mixed, plain = (dataset_of(tmp_path, mixing).batch("x", [SampleRef("x", 0, 0)]) for mixing in (Mixing(1.0), None))
    assert mixed.image is not None
    assert plain.image is not None
    assert not torch.equal(mixed.image, plain.image)


def test_who_is_not_mixed_has_one_label(shards: Path) -> None:
    dataset = dataset_of(shards, None)
    (batch, *_) = loaded(dataset)
    assert batch.other_label is batch.label_share is None
    (held_out,) = evaluation_loader(dataset, "x", batch_size=9, rank=0, world_size=1, num_workers=0)
    assert held_out["x"].label_share is None


def test_a_rank_without_samples_has_the_same_fields(shards: Path) -> None:
    batch = dataset_of(shards, Mixing(mixup=1.0)).batch("x", [])
    assert batch.other_label is not None
    assert batch.label_share is not None
    assert (batch.other_label.shape, batch.other_label.dtype) == ((0,), torch.int64)
    assert (batch.label_share.shape, batch.label_share.dtype) == ((0,), torch.float32)
