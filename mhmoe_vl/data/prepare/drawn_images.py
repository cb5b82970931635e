"""Images drawn from shards at random, decoded and resized to a square, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mhmoe_vl.data.decode import decode_image, image_name
from mhmoe_vl.data.image import ImageTransform
from mhmoe_vl.data.plan import permuted
from mhmoe_vl.data.prepare.processes import map_in_processes
from mhmoe_vl.data.prepare.progress import show_progress
from mhmoe_vl.data.shards import IndexedSample, ShardIndex, ShardReader, Skip, find_shards, read_index
from mhmoe_vl.errors import DataError

_IMAGES_PER_JOB = 16


@dataclass(frozen=True)
class ImagePlace:
    """One image of one shard."""

    shard: Path
    sample: IndexedSample
    member: str


@dataclass(frozen=True)
class LoadedImages:
    """Those of a few images that can be read: their keys, and uint8 ``[n, 3, size, size]``; and the others."""

    keys: tuple[str, ...]
    images: np.ndarray
    skipped: tuple[Skip, ...]


@dataclass(frozen=True)
class _Job:
    places: tuple[ImagePlace, ...]
    image_size: int


def draw_images(shards: Sequence[str], *, max_images: int, key: str) -> list[ImagePlace]:
    """Up to ``max_images`` of the images in ``shards``, in a random order that ``key`` names.

    Raises:
        DataError: no such shards, or no images in them.
    """
    places = list(_list_images(shards))
    if not places:
        raise DataError(f"{', '.join(shards)}: no images in these shards")
    return [places[permuted(number, len(places), key)] for number in range(min(max_images, len(places)))]


def load_images(places: Sequence[ImagePlace], *, image_size: int, num_workers: int = 1) -> Iterator[LoadedImages]:
    """Decode images in their order, showing progress; what cannot be decoded is told.

    Args:
        image_size: every image becomes this square, as it does for evaluation.
        num_workers: processes; the result is the same.
    """
    starts = range(0, len(places), _IMAGES_PER_JOB)
    jobs = [_Job(tuple(places[start : start + _IMAGES_PER_JOB]), image_size) for start in starts]
    return show_progress(
        map_in_processes(_load, jobs, num_workers=num_workers),
        label="reading images",
        amount=lambda loaded: len(loaded.keys) + len(loaded.skipped),
        total=len(places),
    )


def _list_images(shards: Sequence[str]) -> Iterator[ImagePlace]:
    for path in find_shards(list(shards)):
        for sample in read_index(path).samples:
            name = image_name(sample.members)
            if name is not None:
                yield ImagePlace(path, sample._replace(members={name: sample.members[name]}), name)


def _load(job: _Job) -> LoadedImages:
    transform, reader = ImageTransform(job.image_size), ShardReader()
    keys, images, skipped = [], [], []
    for place in job.places:
        try:
            # The reader needs nothing but the path of the index.
            data = reader.read(ShardIndex(place.shard, "image", 0, "", ()), place.sample)[place.member]
            images.append(transform(decode_image(data), 0).numpy())
            keys.append(place.sample.key)
        except DataError as error:
            skipped.append(Skip(f"{place.shard.name}: {place.sample.key}", "unreadable", str(error)))
    shape = (len(images), 3, job.image_size, job.image_size)
    return LoadedImages(tuple(keys), np.stack(images) if images else np.empty(shape, np.uint8), tuple(skipped))
