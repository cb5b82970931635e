"""Masked data modeling on images, texts and image-text pairs (BEiT-3, arXiv 2208.10442, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from mhmoe_vl.config import Config
from mhmoe_vl.data.batch import Batch
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.frozen import Frozen
from mhmoe_vl.models.heads import TokenHead
from mhmoe_vl.models.visual_tokenizer import AnyVisualTokenizer
from mhmoe_vl.tasks.base import MicroBatch, Task, TaskOutput, masked_cross_entropy

#: Objectives: masked image modeling, masked language modeling, and both on pairs.
OBJECTIVES = ("mim", "mlm", "pair_mim", "pair_mlm")

Weight = Annotated[float, Field(ge=0)]


class PretrainConfig(Config):
    """Masked data modeling.

    Attributes:
        visual_codebook: file of the visual tokenizer that gives the targets of masked patches: of k-means patches, or a
            trained one.
        weights: of the objectives; BEiT-3 does not state its own, 1 each is our default.
    """

    kind: Literal["pretrain"] = "pretrain"
    visual_codebook: str
    mim_weight: Weight = 1.0
    mlm_weight: Weight = 1.0
    pair_mim_weight: Weight = 1.0
    pair_mlm_weight: Weight = 1.0


class PretrainTask(Task):
    """Predict the visual code of hidden patches and the identity of hidden tokens.

    Args:
        codebook: visual tokenizer; must have ``model.num_visual_codes`` codes and the model's patches.
    """

    def __init__(self, model: ModelConfig, config: PretrainConfig, codebook: AnyVisualTokenizer) -> None:
        super().__init__(model)
        self.task_config = config
        self._codebook = Frozen(codebook)
        tied = self.encoder.text_embedding.tokens.weight if model.tie_embeddings else None
        self.mim_head = TokenHead(model.dim, model.num_visual_codes)
        self.mlm_head = TokenHead(model.dim, model.vocab_size, tied)

    @property
    def codebook(self) -> AnyVisualTokenizer:
        """The visual tokenizer, where the task is; no part of it."""
        return self._codebook.on(next(self.encoder.parameters()).device)

    def num_targets(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        totals = dict.fromkeys(OBJECTIVES, 0)
        for batches in micro_batches:
            for batch in batches.values():
                for objective, count in _targets_of(batch).items():
                    totals[objective] += count
        return totals

    def forward(self, batches: MicroBatch, totals: Mapping[str, float], num_micro_batches: int = 1) -> TaskOutput:
        device = self.mlm_head.linear.weight.device
        output = TaskOutput(loss=torch.zeros((), device=device))
        routings = []
        for batch in batches.values():
            encoded = self.encoder(
                batch.image,
                batch.text_ids,
                text_valid=batch.text_valid,
                image_mask=batch.image_mask,
                sample_seed=batch.seed,
            )
            routings += encoded.routings
            prefix = "pair_" if batch.image is not None and batch.text_ids is not None else ""
            if batch.image is not None and batch.image_mask is not None:
                codes = self.codebook.encode(batch.image) if batch.image_codes is None else batch.image_codes
                codes = codes.masked_fill(~batch.image_mask, -100)
                loss, correct = masked_cross_entropy(self.mim_head, encoded.vision[:, 1:], codes)
                self._add(output, f"{prefix}mim", loss, correct, (codes != -100).sum(), totals)
            if batch.text_targets is not None:
                loss, correct = masked_cross_entropy(self.mlm_head, encoded.text, batch.text_targets)
                self._add(output, f"{prefix}mlm", loss, correct, (batch.text_targets != -100).sum(), totals)
        return self.add_auxiliary_losses(output, routings, num_micro_batches)

    def _add(
        self,
        output: TaskOutput,
        objective: str,
        loss: torch.Tensor,
        correct: torch.Tensor,
        count: torch.Tensor,
        totals: Mapping[str, float],
    ) -> None:
        weight = getattr(self.task_config, f"{objective}_weight")
        output.loss = output.loss + weight * loss / max(1.0, totals[objective])
        output.record(objective, loss, count)
        output.record(f"{objective}_accuracy", correct, count)


def _targets_of(batch: Batch) -> dict[str, int]:
    prefix = "pair_" if batch.image is not None and batch.text_ids is not None else ""
    counts = {}
    if batch.image_mask is not None:
        counts[f"{prefix}mim"] = int(batch.image_mask.sum())
    if batch.text_targets is not None:
        counts[f"{prefix}mlm"] = int((batch.text_targets != -100).sum())
    return counts
