"""Fitting the k-means visual tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from mhmoe_vl.data.decode import decode_image, image_name
from mhmoe_vl.data.image import ImageTransform
from mhmoe_vl.data.plan import permuted
from mhmoe_vl.data.prepare.processes import map_in_processes
from mhmoe_vl.data.prepare.progress import show_progress
from mhmoe_vl.data.shards import IndexedSample, ShardIndex, ShardReader, Skip, find_shards, read_index
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.models.embeddings import normalize_pixels
from mhmoe_vl.models.visual_codebook import VisualCodebook, to_patches

_IMAGES_PER_JOB = 16


@dataclass(frozen=True)
class FittedCodebook:
    """A codebook and how the images it was fitted to use it; perplexity K means perfectly even use."""

    codebook: VisualCodebook
    num_images: int
    num_patches: int
    num_used: int
    perplexity: float
    skipped: tuple[Skip, ...]


def fit_visual_codebook(
    shards: Sequence[str],
    *,
    num_codes: int,
    image_size: int,
    patch_size: int,
    max_images: int,
    seed: int,
    num_workers: int = 1,
) -> FittedCodebook:
    """K-means over all patches of up to ``max_images`` images drawn at random; deterministic for a seed.

    Images that cannot be decoded are skipped. In memory are the pixels of all patches, as float32, once.

    Args:
        num_workers: processes that decode images; the result is the same.

    Raises:
        ConfigError: sizes that do not fit together.
        DataError: no images, or fewer different patches than codes.
    """
    if image_size % patch_size:
        raise ConfigError(f"--patch-size {patch_size} must divide --image-size {image_size}")
    places = _draw_images(shards, max_images, seed)
    jobs = [_Job(tuple(places[i : i + _IMAGES_PER_JOB]), image_size) for i in range(0, len(places), _IMAGES_PER_JOB)]
    num_per_image = (image_size // patch_size) ** 2
    patches_NC = np.empty((len(places) * num_per_image, 3 * patch_size**2), np.float32)
    num_patches = 0
    skipped: list[Skip] = []
    loaded = show_progress(
        map_in_processes(_load_images, jobs, num_workers=num_workers),
        label="reading images",
        amount=lambda result: len(result[0]) + len(result[1]),
        total=len(places),
    )
    for images, problems in loaded:
        patches = to_patches(normalize_pixels(torch.from_numpy(images)), patch_size).flatten(0, 1)
        patches_NC[num_patches : num_patches + len(patches)] = patches.numpy()
        num_patches += len(patches)
        skipped += problems
    patches_NC = patches_NC[:num_patches]
    num_different = _count_different(patches_NC, num_codes)
    if num_different < num_codes:
        first = f"; {len(skipped)} images could not be read, first {': '.join(skipped[0])}" if skipped else ""
        raise DataError(
            f"--num-codes {num_codes}: the images have only {num_different} different patches; use fewer codes{first}"
        )
    sys.stderr.write(f"fitting {num_codes} codes to {num_patches} patches\n")
    kmeans = MiniBatchKMeans(
        num_codes,
        random_state=seed,
        batch_size=max(4096, 4 * num_codes),
        n_init=1,
        max_iter=30,
        compute_labels=False,
    )
    kmeans.fit(patches_NC)
    codebook = VisualCodebook(torch.from_numpy(kmeans.cluster_centers_).float(), patch_size)
    num_images = num_patches // num_per_image
    usage = _usage(codebook, torch.from_numpy(patches_NC))
    return FittedCodebook(codebook, num_images, num_patches, *usage, tuple(skipped))


@dataclass(frozen=True)
class _Place:
    """One image of one shard."""

    shard: Path
    sample: IndexedSample
    member: str


@dataclass(frozen=True)
class _Job:
    places: tuple[_Place, ...]
    image_size: int


def _draw_images(shards: Sequence[str], max_images: int, seed: int) -> list[_Place]:
    places = list(_list_images(shards))
    if not places:
        raise DataError(f"{', '.join(shards)}: no images in these shards")
    numbers = range(min(max_images, len(places)))
    return [places[permuted(number, len(places), f"codebook/{seed}")] for number in numbers]


def _list_images(shards: Sequence[str]) -> Iterator[_Place]:
    for path in find_shards(list(shards)):
        for sample in read_index(path).samples:
            name = image_name(sample.members)
            if name is not None:
                yield _Place(path, sample._replace(members={name: sample.members[name]}), name)


def _load_images(job: _Job) -> tuple[np.ndarray, list[Skip]]:
    """Those images of a job that can be read, uint8 ``[n, 3, size, size]``."""
    transform, reader = ImageTransform(job.image_size), ShardReader()
    images, problems = [], []
    for place in job.places:
        try:
            # The reader needs nothing but the path of the index.
            data = reader.read(ShardIndex(place.shard, "image", 0, "", ()), place.sample)[place.member]
            images.append(transform(decode_image(data), 0).numpy())
        except DataError as error:
            problems.append(Skip(f"{place.shard.name}: {place.sample.key}", "unreadable", str(error)))
    shape = (len(images), 3, job.image_size, job.image_size)
    return np.stack(images) if images else np.empty(shape, np.uint8), problems


def _count_different(patches_NC: np.ndarray, enough: int) -> int:
    """Number of different patches, counted up to ``enough``."""
    different: set[bytes] = set()
    for patch in patches_NC:
        if len(different) >= enough:
            break
        different.add(patch.tobytes())
    return len(different)


def _usage(codebook: VisualCodebook, patches_NC: Tensor) -> tuple[int, float]:
    counts = torch.bincount(codebook.nearest(patches_NC[None]).flatten(), minlength=codebook.num_codes)
    share = counts / counts.sum()
    return int((counts > 0).sum()), float(torch.special.entr(share.double()).sum().exp())
