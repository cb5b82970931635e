"""What visual tokenizers are distilled from: networks by name, and features that need no weights.

Shape suffixes: B images, P patches, F features, H height, W width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhmoe_vl.errors import ConfigError, suggest
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.embeddings import normalize_pixels
from mhmoe_vl.models.encoder import MultiwayEncoder
from mhmoe_vl.models.initialization import random_numbers_of
from mhmoe_vl.models.visual_codebook import to_patches

#: Teachers without weights.
PLAIN_TEACHERS = ("hog", "pixels", "random")
#: Teachers by the name of a model behind a colon.
LIBRARIES = ("timm", "open_clip")


class Teacher(nn.Module, ABC):
    """Features of every patch of an image.

    Attributes:
        num_features: F.
    """

    num_features: int

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Features ``[B, P, F]``, float, row by row, of a uint8 ``[B, 3, H, W]``. Only their direction counts."""


class PixelTeacher(Teacher):
    """The pixels of a patch, in [-1, 1], and a constant that keeps the direction of a gray patch from being noise."""

    _CONSTANT = 0.1

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size, self.num_features = patch_size, 3 * patch_size**2 + 1

    def forward(self, image: Tensor) -> Tensor:
        pixels_BPF = to_patches(normalize_pixels(image), self.patch_size)
        constant = self._CONSTANT * math.sqrt(pixels_BPF.shape[-1])
        return torch.cat([pixels_BPF, pixels_BPF.new_full((*pixels_BPF.shape[:2], 1), constant)], dim=-1)


class HogTeacher(Teacher):
    """Histograms of oriented gradients (Dalal and Triggs, CVPR 2005), as MaskFeat predicts them (arXiv 2112.09133,
    section 3.2): 9 unsigned orientations in cells of 8 pixels, for each colour.

    A patch without an edge has no direction, and half of many images is such. To every patch belongs one more value, as
    large as the votes of a change by one gray level per pixel, which edges drown.
    """

    NUM_ORIENTATIONS = 9
    CELL_SIZE = 8
    FLATNESS = 1.0

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        # A patch that is no multiple of 8 pixels is one cell.
        self.cell_size = self.CELL_SIZE if patch_size % self.CELL_SIZE == 0 else patch_size
        self.num_features = (patch_size // self.cell_size) ** 2 * 3 * self.NUM_ORIENTATIONS + 1

    def forward(self, image: Tensor) -> Tensor:
        size, num = image.shape[-2:], self.NUM_ORIENTATIONS
        x = F.pad(image.float(), (1, 1, 1, 1), mode="replicate")
        # Per pixel, from neighbours two pixels apart.
        dx, dy = (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]) / 2, (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]) / 2
        # Which of 9 sectors of half a turn; the other half is the same again.
        sector = (torch.atan2(dy, dx) / math.pi * num).floor().long().remainder(num)
        votes = torch.zeros(*x.shape[:2], num, *size, device=x.device)
        votes.scatter_(2, sector[:, :, None], torch.hypot(dx, dy)[:, :, None])
        side = self.patch_size // self.cell_size
        cells = F.avg_pool2d(votes.flatten(1, 2), self.cell_size).unfold(2, side, side).unfold(3, side, side)
        histograms_BPF = cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        flatness_BP1 = histograms_BPF.new_full((*histograms_BPF.shape[:2], 1), self.FLATNESS)
        return torch.cat([histograms_BPF, flatness_BP1], dim=-1)


class RandomTeacher(Teacher):
    """A small vision transformer with random weights, always the same: a control without any knowledge."""

    _DIM = 192

    def __init__(self, image_size: int, patch_size: int) -> None:
        super().__init__()
        self.num_features = self._DIM
        model = ModelConfig(
            dim=self._DIM,
            depth=4,
            num_heads=3,
            ffn_dim=4 * self._DIM,
            image_size=image_size,
            patch_size=patch_size,
            modalities=("vision",),
            ffn="dense",
        )
        with random_numbers_of(0, "random teacher"):
            self.encoder = MultiwayEncoder(model)

    def forward(self, image: Tensor) -> Tensor:
        return self.encoder(image).vision[:, 1:]


def build_teacher(name: str, weights: str | None, *, image_size: int, patch_size: int) -> Teacher:
    """The teacher of a name, on the CPU. The global generator is left as it was.

    Args:
        name: ``hog``, ``pixels``, ``random``, ``timm:<model>`` or ``open_clip:<model>``.
        weights: of a network; see :class:`mhmoe_vl.tasks.visual_tokenizer.VisualTokenizerConfig`.
        image_size, patch_size: of the tokenizer, whose patches the features are of.

    Raises:
        ConfigError: an unknown name, weights for a teacher that has none, or a network without a grid of patches.
        DataError: weights that cannot be had, naming a remedy.
    """
    library, _, model = name.partition(":")
    # Also where a task is looked at on the meta device.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        if library in LIBRARIES and model:
            # They take seconds to import.
            from mhmoe_vl.models import network_teachers

            torch.default_generator.manual_seed(0)
            build = network_teachers.timm_teacher if library == "timm" else network_teachers.open_clip_teacher
            return build(model, weights, grid=image_size // patch_size)
        if name in PLAIN_TEACHERS and weights is not None:
            raise ConfigError(f"task.teacher_weights: teacher '{name}' has none; leave '{weights}' out")
        if name == "hog":
            return HogTeacher(patch_size)
        if name == "pixels":
            return PixelTeacher(patch_size)
        if name == "random":
            return RandomTeacher(image_size, patch_size)
    raise ConfigError(
        f"task.teacher: '{name}' is no teacher{suggest(name, list(PLAIN_TEACHERS))}; there are "
        f"{', '.join(PLAIN_TEACHERS)}, timm:<model> and open_clip:<model>"
    )
