"""Fitting the k-means visual tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from mhmoe_vl.data.decode import decode_image, image_name
from mhmoe_vl.data.image import ImageTransform
from mhmoe_vl.data.plan import permuted
from mhmoe_vl.data.shards import IndexedSample, ShardIndex, ShardReader, find_shards, read_index
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.models.embeddings import normalize_pixels
from mhmoe_vl.models.visual_codebook import VisualCodebook, to_patches


@dataclass(frozen=True)
class FittedCodebook:
    """A codebook and how the images it was fitted to use it; perplexity K means perfectly even use."""

    codebook: VisualCodebook
    num_images: int
    num_patches: int
    num_used: int
    perplexity: float


def fit_visual_codebook(
    shards: Sequence[str], *, num_codes: int, image_size: int, patch_size: int, max_images: int, seed: int
) -> FittedCodebook:
    """K-means over all patches of up to ``max_images`` images drawn at random; deterministic for a seed.

    Raises:
        ConfigError: sizes that do not fit together.
        DataError: no images, or fewer different patches than codes.
    """
    if image_size % patch_size:
        raise ConfigError(f"--patch-size {patch_size} must divide --image-size {image_size}")
    transform = ImageTransform(image_size)
    images = torch.stack([transform(picture, seed) for picture in _pictures(shards, max_images, seed)])
    patches = to_patches(normalize_pixels(images), patch_size).flatten(0, 1)
    num_different = len(torch.unique(patches, dim=0))
    if num_different < num_codes:
        raise DataError(
            f"--num-codes {num_codes}: the images have only {num_different} different patches; use fewer codes"
        )
    kmeans = MiniBatchKMeans(num_codes, random_state=seed, batch_size=max(4096, 4 * num_codes), n_init=1, max_iter=30)
    kmeans.fit(patches.numpy())
    codebook = VisualCodebook(torch.from_numpy(kmeans.cluster_centers_).float(), patch_size)
    return FittedCodebook(codebook, len(images), len(patches), *_usage(codebook, images))


def _usage(codebook: VisualCodebook, images: Tensor) -> tuple[int, float]:
    counts = torch.bincount(codebook.encode(images).flatten(), minlength=codebook.num_codes)
    share = counts / counts.sum()
    return int((counts > 0).sum()), float(torch.special.entr(share.double()).sum().exp())


def _pictures(shards: Sequence[str], max_images: int, seed: int) -> Iterator[Image.Image]:
    places: list[tuple[ShardIndex, IndexedSample]] = []
    for path in find_shards(list(shards)):
        index = read_index(path)
        places += [(index, sample) for sample in index.samples if image_name(sample.members) is not None]
    if not places:
        raise DataError(f"{', '.join(shards)}: no images in these shards")
    reader = ShardReader()
    for number in range(min(max_images, len(places))):
        index, sample = places[permuted(number, len(places), f"codebook/{seed}")]
        name = image_name(sample.members)
        assert name is not None
        only_image = sample._replace(members={name: sample.members[name]})
        yield decode_image(reader.read(index, only_image)[name])
