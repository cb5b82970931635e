"""Captioning as masked sequence-to-sequence (BEiT-3): image tokens see the image, text tokens see the image and
the text before them, and hidden text tokens are predicted in their own place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from mhmoe_vl.config import Config
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.feed_forward import LayerRouting
from mhmoe_vl.models.heads import TokenHead
from mhmoe_vl.tasks.base import MicroBatch, Task, TaskOutput, masked_cross_entropy


class CaptioningConfig(Config):
    """Describe images.

    Attributes:
        mask_ratio: share of a caption's tokens that is hidden, the end token included; BEiT-3's recipes hide 0.7.
        label_smoothing: BEiT-3 uses 0.1.
        blind: train and describe without the image.
    """

    kind: Literal["captioning"] = "captioning"
    mask_ratio: Annotated[float, Field(gt=0, le=1)] = 0.7
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    blind: bool = False


class CaptioningTask(Task):
    """Cross entropy over the hidden tokens of a caption."""

    def __init__(self, model: ModelConfig, config: CaptioningConfig) -> None:
        super().__init__(model)
        self.task_config = config
        tied = self.encoder.text_embedding.tokens.weight if model.tie_embeddings else None
        # Named as in pretraining, so that its weights carry over.
        self.mlm_head = TokenHead(model.dim, model.vocab_size, tied)

    def num_targets(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        targets = [batch.text_targets for batches in micro_batches for batch in batches.values()]
        return {"captioning": sum(int((t != -100).sum()) for t in targets if t is not None)}

    def forward(self, batches: MicroBatch, totals: Mapping[str, float], num_micro_batches: int = 1) -> TaskOutput:
        device = self.mlm_head.linear.weight.device
        output = TaskOutput(loss=torch.zeros((), device=device))
        routings: list[LayerRouting] = []
        for batch in batches.values():
            assert batch.text_targets is not None
            encoded = self.encoder(
                batch.image,
                batch.text_ids,
                text_valid=batch.text_valid,
                sample_seed=batch.seed,
                pattern="captioning",
                blind=self.task_config.blind,
            )
            routings += encoded.routings
            loss, correct = masked_cross_entropy(
                self.mlm_head,
                encoded.text,
                batch.text_targets,
                label_smoothing=self.task_config.label_smoothing if self.training else 0.0,
            )
            output.loss = output.loss + loss / max(1.0, totals["captioning"])
            count = (batch.text_targets != -100).sum()
            output.record("captioning", loss, count)
            output.record("captioning_accuracy", correct, count)
        return self.add_auxiliary_losses(output, routings, num_micro_batches)
