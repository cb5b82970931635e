"""Codes that were made before training, as a source of training data gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from mhmoe_vl.data.coded_views import MEMBER, PROGRAM, CodesOrigin, ImageView, parse_codes, parse_view_of
from mhmoe_vl.data.shards import ShardIndex, ShardReader
from mhmoe_vl.errors import ConfigError, DataError

_DIFFERENCES = {
    "tokenizer": "codes of the visual tokenizer with SHA-256 {:.12}..., but task.visual_codebook has {:.12}...",
    "image_size": "codes of images of {} px, but model.image_size is {}",
    "crop_scale": "codes of views drawn with crop_scale {}, but this run draws with {} (data.augment.crop_scale; "
    "validation takes whole images)",
    "flip": "codes of views drawn with flip {}, but this run draws with {} (data.augment.flip; validation takes whole "
    "images)",
}


class StoredCodes:
    """Codes of the samples of a source, all of one origin.

    Args:
        origin: what the run needs.
        num_patches: of an image.
        num_codes: of the tokenizer.
    """

    def __init__(self, origin: CodesOrigin, *, num_patches: int, num_codes: int) -> None:
        self.origin, self.num_patches, self.num_codes = origin, num_patches, num_codes

    def of(self, members: Mapping[str, bytes], epoch: int) -> tuple[ImageView, Tensor]:
        """The view of an epoch, and its codes, int64 ``[P]``.

        Raises:
            DataError: there are none, or others than the run needs.
        """
        if MEMBER not in members:
            raise DataError(f"the sample has no .{MEMBER} member; make the shards again with {PROGRAM}")
        origin, coded = parse_view_of(members[MEMBER], epoch)
        if origin != self.origin:
            raise DataError(f"{MEMBER}: {self._difference(origin)}")
        if len(coded.codes) != self.num_patches or max(coded.codes) >= self.num_codes:
            raise DataError(
                f"{MEMBER}: has {len(coded.codes)} codes up to {max(coded.codes)}, but the model has "
                f"{self.num_patches} patches and {self.num_codes} visual codes"
            )
        return coded.view, torch.tensor(coded.codes, dtype=torch.long)

    def check(self, key: str, shard: ShardIndex) -> None:
        """Look at the first sample of a shard, before training begins.

        Args:
            key: of the source in the configuration.

        Raises:
            ConfigError: its codes were made with another tokenizer, size or kind of crop, or there are none.
            DataError: it cannot be read.
        """
        sample = shard.samples[0]
        if MEMBER not in sample.members:
            raise ConfigError(
                f"{key}.codes: {shard.path} has no codes (.{MEMBER}); make shards that do with {PROGRAM}, or leave "
                "codes out of the configuration"
            )
        only_codes = sample._replace(members={MEMBER: sample.members[MEMBER]})
        try:
            origin, _ = parse_codes(ShardReader().read(shard, only_codes)[MEMBER])
        except DataError as error:
            raise DataError(f"{shard.path}: {sample.key}: {error}") from None
        if origin != self.origin:
            raise ConfigError(
                f"{key}.codes: {shard.path} has {self._difference(origin)}; make the shards again with {PROGRAM}, or "
                "mend the configuration"
            )

    def _difference(self, found: CodesOrigin) -> str:
        wanted = asdict(self.origin)
        name, value = next((name, value) for name, value in asdict(found).items() if value != wanted[name])
        return _DIFFERENCES[name].format(value, wanted[name])
