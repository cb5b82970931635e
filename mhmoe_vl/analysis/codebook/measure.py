"""Encode images with a visual tokenizer, and gather how it uses its codes.

Sums, counts and a few patches of each code: memory does not grow with the number of images.

Shape suffixes: B images, R and Q rows and columns of patches, P = R Q patches, N patches of all images, K codes, C
values of a patch, S sample patches of a code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mhmoe_vl.analysis.codebook.health import CodebookHealth, CodeExamples, Reconstruction, signs_of_collapse
from mhmoe_vl.data.prepare.drawn_images import LoadedImages, draw_images, load_images
from mhmoe_vl.data.shards import Skip
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.models.ema_codebook import perplexity
from mhmoe_vl.models.embeddings import normalize_pixels
from mhmoe_vl.models.visual_codebook import to_patches
from mhmoe_vl.models.visual_tokenizer import AnyVisualTokenizer, VisualTokenizer, load_visual_tokenizer

#: Patches that are kept of each code.
_NUM_SAMPLES = 8


def measure_tokenizer(
    path: Path,
    shards: Sequence[str],
    *,
    image_size: int | None,
    max_images: int,
    seed: int = 0,
    num_codes_shown: int = 12,
    num_pictures: int = 8,
    num_workers: int = 1,
) -> CodebookHealth:
    """The tokenizer in the file ``path``, measured on up to ``max_images`` images of ``shards`` drawn at random.

    Args:
        image_size: every image becomes this square; None is the size that the tokenizer was trained on, or 224 pixels
            where it does not say.
        num_codes_shown: of the most frequent codes, and of the least frequent.
        num_pictures: images to keep with their codes.
        num_workers: processes that decode images.

    Raises:
        ConfigError: sizes that do not fit together.
        DataError: no tokenizer, no shards, or no image that can be read.
    """
    tokenizer = load_visual_tokenizer(path)
    if image_size is None:
        image_size = tokenizer.encoder.config.image_size if isinstance(tokenizer, VisualTokenizer) else 224
    if image_size % tokenizer.patch_size:
        raise ConfigError(f"--image-size {image_size} must be a multiple of the {tokenizer.patch_size} px of a patch")
    places = draw_images(shards, max_images=max_images, key=f"tokenizer health/{seed}")
    loaded = load_images(places, image_size=image_size, num_workers=num_workers)
    return measure(
        tokenizer,
        loaded,
        name=str(path),
        image_size=image_size,
        num_codes_shown=num_codes_shown,
        num_pictures=num_pictures,
    )


@torch.no_grad()
def measure(
    tokenizer: AnyVisualTokenizer,
    loaded: Iterator[LoadedImages],
    *,
    name: str,
    image_size: int,
    num_codes_shown: int,
    num_pictures: int,
) -> CodebookHealth:
    """As :func:`measure_tokenizer`, of images that are there already.

    Raises:
        DataError: there is no image.
    """
    use = _CodeUse(tokenizer.num_codes, tokenizer.patch_size)
    grid = (image_size // tokenizer.patch_size,) * 2
    pictures: list[Reconstruction] = []
    skipped: list[Skip] = []
    num_images = 0
    for some in loaded:
        skipped += some.skipped
        if not some.keys:
            continue
        image = torch.from_numpy(some.images)
        codes_BP = tokenizer.encode(image)
        decoded = tokenizer.decode(codes_BP, grid)
        use.add(image, codes_BP.unflatten(1, grid), decoded)
        num_images += len(image)
        for row in range(min(len(image), num_pictures - len(pictures))):
            codes_RQ = codes_BP[row].unflatten(0, grid)
            pictures.append(Reconstruction(some.keys[row], image[row], codes_RQ, to_bytes(decoded[row])))
    if not num_images:
        first = f", first {skipped[0].source}: {skipped[0].detail}" if skipped else ""
        raise DataError(f"none of {len(skipped)} images could be read{first}")
    counts_K = use.counts_K
    by_count = sorted(counts_K.nonzero().flatten().tolist(), key=lambda code: (-int(counts_K[code]), code))
    figures = {
        "num_codes": tokenizer.num_codes,
        "num_patches": int(counts_K.sum()),
        "num_used": len(by_count),
    }
    perplexity_of_use, largest_share = float(perplexity(counts_K)), int(counts_K.max()) / int(counts_K.sum())
    return CodebookHealth(
        tokenizer=name,
        patch_size=tokenizer.patch_size,
        image_size=image_size,
        num_images=num_images,
        **figures,
        perplexity=perplexity_of_use,
        largest_share=largest_share,
        same_as_left=use.num_same / use.num_pairs if use.num_pairs else None,
        same_by_chance=float((counts_K.double() / counts_K.sum()).square().sum()),
        error=use.error,
        baseline_error=use.baseline_error,
        warnings=signs_of_collapse(**figures, perplexity=perplexity_of_use, largest_share=largest_share),
        skipped=skipped,
        counts=counts_K.tolist(),
        most=use.examples(tokenizer, by_count[:num_codes_shown]),
        least=use.examples(tokenizer, by_count[num_codes_shown:][-num_codes_shown:][::-1]),
        pictures=pictures,
    )


def to_bytes(image: Tensor) -> Tensor:
    """Pixel values in [-1, 1] to uint8."""
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class _CodeUse:
    """Everything that is summed over images."""

    def __init__(self, num_codes: int, patch_size: int) -> None:
        self.patch_size = patch_size
        self.counts_K = torch.zeros(num_codes, dtype=torch.long)
        self.num_same = self.num_pairs = 0
        num_values = 3 * patch_size**2
        self._samples_KSC = torch.zeros(num_codes, _NUM_SAMPLES, num_values, dtype=torch.uint8)
        self._sum_C = torch.zeros(num_values, dtype=torch.float64)
        self._sum_of_squares = self._squared_error = 0.0

    def add(self, image: Tensor, codes_BRQ: Tensor, decoded: Tensor) -> None:
        """uint8 and decoded images ``[B, 3, H, W]`` with their codes."""
        pixels = normalize_pixels(image)
        patches_NC = to_patches(pixels, self.patch_size).flatten(0, 1).double()
        self._sum_C += patches_NC.sum(0)
        self._sum_of_squares += float(patches_NC.square().sum())
        self._squared_error += float((decoded - pixels).double().square().sum())
        self.num_same += int((codes_BRQ[..., 1:] == codes_BRQ[..., :-1]).sum())
        self.num_pairs += codes_BRQ[..., 1:].numel()
        self._keep_samples(to_patches(image, self.patch_size).flatten(0, 1), codes_BRQ.flatten())

    def _keep_samples(self, patches_NC: Tensor, codes_N: Tensor) -> None:
        """Count, and keep those patches that are among the first of their code."""
        order_N = codes_N.argsort(stable=True)
        codes_N, patches_NC = codes_N[order_N], patches_NC[order_N]
        num_new_K = torch.bincount(codes_N, minlength=len(self.counts_K))
        starts_K = num_new_K.cumsum(0) - num_new_K
        place_N = self.counts_K[codes_N] + torch.arange(len(codes_N)) - starts_K[codes_N]
        is_kept_N = place_N < _NUM_SAMPLES
        self._samples_KSC[codes_N[is_kept_N], place_N[is_kept_N]] = patches_NC[is_kept_N]
        self.counts_K += num_new_K

    @property
    def error(self) -> float:
        return self._squared_error / self._num_values

    @property
    def baseline_error(self) -> float:
        """Variance around the mean patch."""
        num_patches = int(self.counts_K.sum())
        return (self._sum_of_squares - float(self._sum_C.square().sum()) / num_patches) / self._num_values

    @property
    def _num_values(self) -> int:
        return int(self.counts_K.sum()) * len(self._sum_C)

    def examples(self, tokenizer: AnyVisualTokenizer, codes: Sequence[int]) -> list[CodeExamples]:
        if not codes:
            return []
        decoded = to_bytes(tokenizer.decode(torch.tensor(codes)[:, None], (1, 1)))
        shape = (3, self.patch_size, self.patch_size)
        counts = [int(self.counts_K[code]) for code in codes]
        return [
            CodeExamples(code, count, image, self._samples_KSC[code, :count].unflatten(1, shape))
            for code, count, image in zip(codes, counts, decoded, strict=True)
        ]
