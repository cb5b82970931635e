"""Visual question answering as classification over the answer list, with soft targets (BEiT-3, VQAv2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhmoe_vl.config import Config
from mhmoe_vl.data.batch import Batch
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.feed_forward import LayerRouting
from mhmoe_vl.models.heads import VqaHead
from mhmoe_vl.tasks.base import MicroBatch, Task, TaskOutput, at_least_float32


class VqaConfig(Config):
    """Answer questions about images.

    Attributes:
        answers: ``answers.json`` as ``data_prep.pack_vqa`` writes it.
        blind: train and answer without the image, to measure what the questions alone give away.
    """

    kind: Literal["vqa"] = "vqa"
    answers: str
    blind: bool = False


class VqaTask(Task):
    """Binary cross entropy per answer, summed over answers."""

    def __init__(self, model: ModelConfig, config: VqaConfig, num_answers: int) -> None:
        super().__init__(model)
        self.task_config = config
        self.vqa_head = VqaHead(model.dim, num_answers)

    def head_parameters(self) -> list[nn.Parameter]:
        """The classifier without the pooler, which the released recipe gives the encoder's rate."""
        return list(self.vqa_head.classifier.parameters())

    def num_targets(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        return {"vqa": sum(len(batch) for batches in micro_batches for batch in batches.values())}

    def logits(self, batch: Batch) -> tuple[Tensor, list[LayerRouting]]:
        """Scores ``[B, A]`` of every answer, float32."""
        encoded = self.encoder(
            batch.image,
            batch.text_ids,
            text_valid=batch.text_valid,
            sample_seed=batch.seed,
            blind=self.task_config.blind,
        )
        return at_least_float32(self.vqa_head(encoded.vision[:, 0])), encoded.routings

    def forward(self, batches: MicroBatch, totals: Mapping[str, float], num_micro_batches: int = 1) -> TaskOutput:
        device = self.encoder.text_embedding.tokens.weight.device
        output = TaskOutput(loss=torch.zeros((), device=device))
        routings: list[LayerRouting] = []
        for batch in batches.values():
            logits_BA, of_batch = self.logits(batch)
            routings += of_batch
            scores_BA = batch.answer_scores
            assert scores_BA is not None
            loss = F.binary_cross_entropy_with_logits(logits_BA, scores_BA, reduction="sum")
            output.loss = output.loss + loss / max(1.0, totals["vqa"])
            right = scores_BA.gather(1, logits_BA.argmax(-1, keepdim=True)).sum()
            count = torch.tensor(len(batch), device=device)
            output.record("vqa", loss, count)
            output.record("vqa_accuracy", right, count)
        return self.add_auxiliary_losses(output, routings, num_micro_batches)
