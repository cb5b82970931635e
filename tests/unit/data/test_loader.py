"""Batches by reference: the same whatever the number of workers and ranks, and despite broken samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mhmoe_vl.data.batch import Batch
from mhmoe_vl.data.image import AugmentConfig, ImageTransform
from mhmoe_vl.data.loader import MicroBatch, ShardDataset, Source, evaluation_loader, train_loader
from mhmoe_vl.data.plan import MixturePlan, SampleRef
from mhmoe_vl.data.samples import ImageSamples, PairSamples, PatchMasking, TextSamples, VqaSamples
from mhmoe_vl.errors import DataError
from tests.unit.data.builders import damage, json_bytes, pair_sample, word_tokenizer, words, write_shard
from tests.unit.data.files import image_bytes

TOKENIZER = word_tokenizer()
PAIRS = PairSamples(ImageTransform(16, AugmentConfig()), TOKENIZER, 12, 0.4, PatchMasking(4, 0.4))
TEXTS = TextSamples(TOKENIZER, 12, 0.3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 pairs in three shards, 7 texts and 4 images with 1, 3, 2 and 1 questions."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, numbers in enumerate((range(4), range(4, 8), range(8, 11))):
        samples = {f"p{number}": pair_sample(number, num_captions=5) for number in numbers}
        write_shard(folder / f"pairs/pairs-{shard:05d}.tar", "pair", samples)
    texts = {f"t{number}": {"txt": words(number, number + 30).encode()} for number in range(7)}
    write_shard(folder / "texts/texts-00000.tar", "text", texts)
    questions = {}
    for image, count in enumerate((1, 3, 2, 1)):
        asked = [{"question_id": 10 * image + n, "question": f"w{n}", "labels": {}} for n in range(count)]
        questions[f"q{image}"] = {"jpg": image_bytes(image), "json": json_bytes(questions=asked)}
    write_shard(folder / "vqa/vqa-00000.tar", "vqa", questions)
    return folder


def dataset_of(shards: Path, seed: int = 0) -> ShardDataset:
    sources = {"pair": Source("pair", [shards / "pairs"], PAIRS), "text": Source("text", [shards / "texts"], TEXTS)}
    return ShardDataset(sources, seed=seed, pad_id=TOKENIZER.pad_id)


def loaded(dataset: ShardDataset, *, steps: range = range(4), **changes: Any) -> list[MicroBatch]:
    plan = MixturePlan(num_items=dataset.num_items(), weights={"pair": 2, "text": 1}, batch_size=7, seed=3)
    options = {"num_micro_batches": 2, "rank": 0, "world_size": 1, "num_workers": 0, "pin_memory": False, **changes}
    return list(train_loader(dataset, plan, steps=steps, **options))


def rows(batches: Iterable[MicroBatch]) -> list[tuple[Any, ...]]:
    """Every sample of every source with all that it is made of, padding taken off."""
    found = []
    for micro_batch in batches:
        for source, batch in micro_batch.items():
            for row, sample_id in enumerate(batch.sample_ids):
                length = int(batch.text_valid[row].sum())  # type: ignore[index]
                image = () if batch.image is None else batch.image[row].flatten().tolist()
                mask = () if batch.image_mask is None else batch.image_mask[row].tolist()
                text = [part[row][:length].tolist() for part in (batch.text_ids, batch.text_targets)]  # type: ignore[index]
                found.append((source, sample_id, int(batch.seed[row]), tuple(image), tuple(mask), *map(tuple, text)))
    return found


def assert_same(left: Batch, right: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(shards: Path, num_workers: int) -> None:
    alone, with_workers = (loaded(dataset_of(shards), num_workers=n) for n in (0, num_workers))
    assert len(alone) == len(with_workers) == 8
    for left, right in zip(alone, with_workers, strict=True):
        assert left.keys() == right.keys() == {"pair", "text"}
        for source in left:
            assert_same(left[source], right[source])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_out_the_same_samples(shards: Path, world_size: int) -> None:
    """Also with more ranks than samples of a source in a micro-batch: some get none."""
    whole = loaded(dataset_of(shards))
    of_ranks = [loaded(dataset_of(shards), rank=rank, world_size=world_size) for rank in range(world_size)]
    for index, micro_batch in enumerate(whole):
        for source in micro_batch:
            parts = [{source: batches[index][source]} for batches in of_ranks]
            assert sorted(rows(parts)) == sorted(rows([{source: micro_batch[source]}]))
    assert any(len(batches[0]["text"]) == 0 for batches in of_ranks)


def test_loading_from_a_later_step_gives_what_the_whole_run_gives(shards: Path) -> None:
    whole = loaded(dataset_of(shards), steps=range(6))
    assert rows(loaded(dataset_of(shards), steps=range(4, 6))) == rows(whole[8:])
    assert loaded(dataset_of(shards), steps=range(6, 6)) == []


def test_another_epoch_is_another_view_of_the_sample(shards: Path) -> None:
    """Captions, crops, masks and windows are drawn anew, and seeds differ between runs."""
    dataset = dataset_of(shards)

    def view(source: str, epoch: int, of: ShardDataset = dataset) -> tuple[Any, ...]:
        return rows([{source: of.batch(source, [SampleRef(source, epoch, 2)])}])[0]

    assert view("pair", 0) == view("pair", 0)
    captions = set()
    for epoch in range(20):
        fed, targets = view("pair", epoch)[-2:]
        captions.add(fed[2] if targets[2] == -100 else targets[2])
    assert len(captions) == 5
    assert view("text", 0) != view("text", 1)
    assert view("pair", 0)[3] != view("pair", 1)[3]
    assert view("pair", 0)[2] != view("pair", 0, dataset_of(shards, seed=1))[2]


def test_items_are_found_across_shards_and_inside_samples(shards: Path) -> None:
    pairs = Source("pair", [shards / "pairs"], PAIRS)
    assert len(pairs) == 11
    assert [pairs.locate(item)[1].key for item in range(11)] == [f"p{item}" for item in range(11)]
    assert [pairs.locate(item)[0].path.name for item in (3, 4, 7, 8)] == [
        "pairs-00000.tar",
        "pairs-00001.tar",
        "pairs-00001.tar",
        "pairs-00002.tar",
    ]
    vqa = Source("vqa", [shards / "vqa"], VqaSamples(ImageTransform(16), TOKENIZER, 8, ["yes"]))
    dataset = ShardDataset({"vqa": vqa}, seed=0, pad_id=TOKENIZER.pad_id)
    batch = dataset.batch("vqa", [SampleRef("vqa", 0, item) for item in range(len(vqa))])
    assert batch.sample_ids == ("0", "10", "11", "12", "20", "21", "30")


def test_a_shard_of_another_kind_is_refused(shards: Path) -> None:
    with pytest.raises(DataError, match=r"texts-00000\.tar: is a shard of kind 'text', but source 'x' needs 'pair'"):
        Source("x", [shards / "texts"], PAIRS)


def text_shard(folder: Path, broken: Iterable[int], num_samples: int = 24) -> ShardDataset:
    samples = {f"t{number:02d}": {"txt": f"w{number:02d}x".encode()} for number in range(num_samples)}
    path = write_shard(folder / "x-00000.tar", "text", samples)
    for number in broken:
        damage(path, f"w{number:02d}x".encode())
    return ShardDataset({"text": Source("text", [path], TEXTS)}, seed=0, pad_id=TOKENIZER.pad_id)


def test_images_of_pairs_feed_masked_image_modeling(shards: Path) -> None:
    images = ImageSamples(ImageTransform(16, None), PatchMasking(4, 0.4))
    dataset = ShardDataset({"image": Source("image", [shards / "pairs"], images)}, seed=0, pad_id=TOKENIZER.pad_id)
    batch = dataset.batch("image", [SampleRef("image", 0, item) for item in range(11)])
    assert batch.image.shape == (11, 3, 16, 16)
    assert batch.text_ids is None


def test_a_broken_sample_is_replaced_by_its_next_good_neighbour_and_reported(tmp_path: Path) -> None:
    dataset = text_shard(tmp_path, broken=[4, 5, 23])
    batch = dataset.batch("text", [SampleRef("text", 0, item) for item in (3, 4, 5, 23)])
    assert batch.sample_ids == ("t03", "t06", "t06", "t00")
    assert len(batch.problems) == 4
    for problem, key in zip(batch.problems, ("t04", "t05", "t05", "t23"), strict=True):
        assert f"x-00000.tar: {key}.txt: checksum differs" in problem
    # What a neighbour stands in with is what it is itself: no rank and no worker sees another.
    alone = dataset.batch("text", [SampleRef("text", 0, 6)])
    assert batch.seed[1] == alone.seed[0]
    assert alone.problems == ()


def test_a_sample_that_cannot_be_built_is_named_with_its_shard(shards: Path) -> None:
    texts_of_pairs = TextSamples(TOKENIZER, 12, 0.3)
    texts_of_pairs.shard_kinds = ("pair",)
    dataset = ShardDataset({"x": Source("x", [shards / "pairs"], texts_of_pairs)}, seed=0, pad_id=0)
    with pytest.raises(
        DataError, match=r"^11 samples in a row .*pairs-00002\.tar: p10: the sample has no \.txt member"
    ):
        dataset.batch("x", [SampleRef("x", 0, 0)])


def test_an_empty_part_follows_a_good_sample_even_if_the_first_is_broken(tmp_path: Path) -> None:
    dataset = text_shard(tmp_path, broken=[0])
    batch = dataset.batch("text", [])
    assert len(batch) == 0
    assert batch.text_ids.shape == (0, 2)  # type: ignore[union-attr]
    assert batch.problems == ()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_many_broken_samples_in_a_row_are_one_line(tmp_path: Path, num_workers: int) -> None:
    dataset = text_shard(tmp_path, broken=range(4, 21))
    plan = MixturePlan(num_items=dataset.num_items(), weights={"text": 1}, batch_size=24, seed=0)
    with pytest.raises(DataError, match=r"^16 samples in a row are broken; the last: .*: checksum differs") as caught:
        list(
            train_loader(
                dataset,
                plan,
                steps=range(1),
                num_micro_batches=1,
                rank=0,
                world_size=1,
                num_workers=num_workers,
                pin_memory=False,
            )
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_items", [1, 7, 8, 9])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_item_once(tmp_path: Path, num_items: int, batch_size: int, world_size: int) -> None:
    dataset = text_shard(tmp_path, broken=[], num_samples=num_items)
    of_ranks = [
        [
            batch["text"]
            for batch in evaluation_loader(
                dataset, "text", batch_size=batch_size, rank=rank, world_size=world_size, num_workers=0
            )
        ]
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in of_ranks}) == 1
    assert all(len(batch) <= batch_size for batches in of_ranks for batch in batches)
    seen = sorted(sample_id for batches in of_ranks for batch in batches for sample_id in batch.sample_ids)
    assert seen == [f"t{number:02d}" for number in range(num_items)]
    assert len(of_ranks[0]) == -(-num_items // (batch_size * world_size))
