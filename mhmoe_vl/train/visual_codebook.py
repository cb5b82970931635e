"""Fitting the k-means visual tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from mhmoe_vl.data.prepare.drawn_images import draw_images, load_images
from mhmoe_vl.data.shards import Skip
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.models.ema_codebook import perplexity
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
    places = draw_images(shards, max_images=max_images, key=f"codebook/{seed}")
    num_per_image = (image_size // patch_size) ** 2
    patches_NC = np.empty((len(places) * num_per_image, 3 * patch_size**2), np.float32)
    num_patches = 0
    skipped: list[Skip] = []
    for loaded in load_images(places, image_size=image_size, num_workers=num_workers):
        patches = to_patches(normalize_pixels(torch.from_numpy(loaded.images)), patch_size).flatten(0, 1)
        patches_NC[num_patches : num_patches + len(patches)] = patches.numpy()
        num_patches += len(patches)
        skipped += loaded.skipped
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
    return int((counts > 0).sum()), float(perplexity(counts))
