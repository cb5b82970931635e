"""Distinct experts by image patch.

Shape suffixes: B images, P patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mhmoe_vl.analysis.result import PatchDivergence, PatchPicture
from mhmoe_vl.data.batch import Batch


class PatchSums:
    """Running sums over images, and the first few of them with their patches.

    Args:
        num_pictures: images to keep.
    """

    def __init__(self, patch_size: int, num_pictures: int) -> None:
        self.patch_size, self.num_pictures = patch_size, num_pictures
        self.pictures: list[PatchPicture] = []
        self._num_images = 0
        self._class_token = 0.0
        self._grid: Tensor | None = None
        #: Of texture x and distinct experts y: n, sums of x, y, x^2, y^2, x y.
        self._moments = torch.zeros(6, dtype=torch.float64)

    def add(self, batch: Batch, distinct: Mapping[str, Tensor]) -> None:
        """Take up a batch.

        Args:
            distinct: int64 ``[B, 1 + P]`` on the CPU, class token first, of every sparse layer, by name.
        """
        assert batch.image is not None
        mean = torch.stack([of_layer.double() for of_layer in distinct.values()]).mean(0)
        self._num_images += mean.shape[0]
        self._class_token += float(mean[:, 0].sum())
        if mean.shape[1] == 1:
            return  # a blind run sees no patches
        image = batch.image.cpu()
        rows, columns = (side // self.patch_size for side in image.shape[2:])
        mean_BP = mean[:, 1:]
        grid = mean_BP.sum(0).unflatten(0, (rows, columns))
        self._grid = grid if self._grid is None else self._grid + grid
        x, y = texture(image, self.patch_size), mean_BP
        self._moments += torch.stack(
            [torch.tensor(float(x.numel())).double(), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
        )
        for index in range(min(mean.shape[0], self.num_pictures - len(self.pictures))):
            shown = mean_BP[index].unflatten(0, (rows, columns)).tolist()
            self.pictures.append(PatchPicture(batch.sample_ids[index], image[index].clone(), shown))

    def figures(self) -> PatchDivergence | None:
        """Of all images so far; None if no patches were seen."""
        if self._grid is None:
            return None
        grid = self._grid / self._num_images
        return PatchDivergence(
            num_images=self._num_images,
            grid=grid.tolist(),
            mean=float(grid.mean()),
            class_token=self._class_token / self._num_images,
            texture_correlation=_correlation(self._moments.tolist()),
        )


def texture(image_B3HW: Tensor, patch_size: int) -> Tensor:
    """Standard deviation of the gray values of each patch, float64 ``[B, P]``, row by row; of uint8, or of floats."""
    gray_BHW = image_B3HW.double().mean(1)
    patches = gray_BHW.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)
    return patches.flatten(3).std(-1, correction=0).flatten(1)


def _correlation(moments: list[float]) -> float | None:
    n, x, y, xx, yy, xy = moments
    var_x, var_y = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2
    if var_x <= 1e-9 * max(1.0, xx / n) or var_y <= 1e-9 * max(1.0, yy / n):
        return None
    return max(-1.0, min(1.0, (xy / n - x * y / n**2) / math.sqrt(var_x * var_y)))
