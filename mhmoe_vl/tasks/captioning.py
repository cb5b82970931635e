"""Captioning as masked sequence-to-sequence (BEiT-3): image tokens see the image, text tokens see the image and
the text before them, and hidden text tokens are predicted in their own place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mhmoe_vl.config import Config
from mhmoe_vl.distributed.collectives import gather_rows
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.feed_forward import LayerRouting
from mhmoe_vl.models.heads import TokenHead
from mhmoe_vl.tasks.base import MicroBatch, Task, TaskOutput, masked_predictions


class CaptioningConfig(Config):
    """Describe images.

    Attributes:
        mask_ratio: share of a caption's tokens that is hidden, the end token included; BEiT-3's recipes hide 0.7.
        label_smoothing: BEiT-3 uses 0.1.
        drop_worst_ratio: share of the hidden tokens of a micro-batch, those with the largest losses, that is not
            learned from; BEiT-3's recipe leaves out 0.2.
        drop_worst_after: in steps after this one, counted from 0; BEiT-3's recipe begins after 12,000.
        blind: train and describe without the image.
    """

    kind: Literal["captioning"] = "captioning"
    mask_ratio: Annotated[float, Field(gt=0, le=1)] = 0.7
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    drop_worst_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_worst_after: Annotated[int, Field(ge=0)] = 0
    blind: bool = False


class CaptioningTask(Task):
    """Cross entropy over the hidden tokens of a caption; its figures count those that are not learned from too."""

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
        smoothing = self.task_config.label_smoothing if self.training else 0.0
        losses = [output.loss.new_zeros(0)]
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
            logits_NV, targets_N = masked_predictions(self.mlm_head, encoded.text, batch.text_targets)
            losses.append(F.cross_entropy(logits_NV, targets_N, reduction="none", label_smoothing=smoothing))
            count = (batch.text_targets != -100).sum()
            output.record("captioning", losses[-1].sum(), count)
            output.record("captioning_accuracy", (logits_NV.argmax(-1) == targets_N).sum(), count)
        output.loss = output.loss + self._learned(torch.cat(losses)) / max(1.0, totals["captioning"])
        return self.add_auxiliary_losses(output, routings, num_micro_batches)

    def _learned(self, losses_N: Tensor) -> Tensor:
        """Sum of the losses of a micro-batch on this rank; without the worst, as if those had the mean of the others.

        The worst are found among the tokens of all ranks, so that the number of ranks does not matter.
        """
        ratio, after = self.task_config.drop_worst_ratio, self.task_config.drop_worst_after
        if not self.training or ratio == 0 or self.step <= after:
            return losses_N.sum()
        of_all_ranks = gather_rows(losses_N.detach())[0]
        num_tokens = len(of_all_ranks)
        if num_tokens == 0:
            return losses_N.sum()
        limit = of_all_ranks.kthvalue(max(1, int(num_tokens * (1 - ratio)))).values
        num_learned = (of_all_ranks <= limit).sum()
        return losses_N[losses_N <= limit].sum() * num_tokens / num_learned
