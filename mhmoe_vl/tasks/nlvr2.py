"""Is a sentence true of a pair of images? Two passes, one per image, and a classifier over both (BEiT-3, NLVR2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mhmoe_vl.config import Config
from mhmoe_vl.data.batch import Batch
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.feed_forward import LayerRouting
from mhmoe_vl.models.heads import Nlvr2Head
from mhmoe_vl.tasks.base import MicroBatch, Task, TaskOutput, at_least_float32


class Nlvr2Config(Config):
    """Judge statements about pairs of images.

    Attributes:
        input_norm: the head begins with a norm, as that of the released BEiT-3 checkpoints.
        blind: train and judge without the images.
    """

    kind: Literal["nlvr2"] = "nlvr2"
    input_norm: bool = False
    blind: bool = False


class Nlvr2Task(Task):
    """Class token and first text token of each pass, classified as false or true."""

    def __init__(self, model: ModelConfig, config: Nlvr2Config) -> None:
        super().__init__(model)
        self.task_config = config
        self.nlvr2_head = Nlvr2Head(model.dim, input_norm=config.input_norm)

    def num_targets(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        labels = [batch.label for batches in micro_batches for batch in batches.values()]
        return {"nlvr2": sum(int((label != -1).sum()) for label in labels if label is not None)}

    def logits(self, batch: Batch) -> tuple[Tensor, list[LayerRouting]]:
        """Scores ``[B, 2]`` of false and true, float32. Both images go through the encoder as one batch."""
        assert batch.image is not None
        assert batch.right_image is not None
        assert batch.text_ids is not None
        assert batch.text_valid is not None
        encoded = self.encoder(
            torch.cat([batch.image, batch.right_image]),
            torch.cat([batch.text_ids, batch.text_ids]),
            text_valid=torch.cat([batch.text_valid, batch.text_valid]),
            sample_seed=torch.cat([batch.seed, batch.seed]),
            blind=self.task_config.blind,
        )
        left_and_right = torch.stack([encoded.vision[:, 0], encoded.text[:, 0]], dim=1).chunk(2)
        return at_least_float32(self.nlvr2_head(*left_and_right)), encoded.routings

    def forward(self, batches: MicroBatch, totals: Mapping[str, float], num_micro_batches: int = 1) -> TaskOutput:
        device = self.encoder.text_embedding.tokens.weight.device
        output = TaskOutput(loss=torch.zeros((), device=device))
        routings: list[LayerRouting] = []
        for batch in batches.values():
            logits_B2, of_batch = self.logits(batch)
            routings += of_batch
            assert batch.label is not None
            loss = F.cross_entropy(logits_B2, batch.label, reduction="sum", ignore_index=-1)
            output.loss = output.loss + loss / max(1.0, totals["nlvr2"])
            count = (batch.label != -1).sum()
            output.record("nlvr2", loss, count)
            output.record("nlvr2_accuracy", (logits_B2.argmax(-1) == batch.label).sum(), count)
        return self.add_auxiliary_losses(output, routings, num_micro_batches)
