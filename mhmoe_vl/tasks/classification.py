"""Image classification: the mean of the patch tokens to the classes of a list (BEiT-3's ImageNet fine-tuning), with
the encoder trained along or frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mhmoe_vl.config import Config
from mhmoe_vl.data.batch import Batch
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.feed_forward import LayerRouting
from mhmoe_vl.models.heads import ClassificationHead
from mhmoe_vl.tasks.base import MicroBatch, Task, TaskOutput, at_least_float32


class ClassificationConfig(Config):
    """Name the class of an image.

    Attributes:
        classes: ``classes.json`` as ``data_prep.pack_classes`` writes it.
        label_smoothing: in training; BEiT-3 uses 0.1.
        mixup: of the images of training, the parameter of Beta by which two are blended, 0 for none; BEiT-3 uses 0.8.
        cutmix: the same of rectangles that are put into them; BEiT-3 uses 1.0.
        linear_probe: train the head alone, on what the encoder makes of the images as it is.
    """

    kind: Literal["classification"] = "classification"
    classes: str
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    linear_probe: bool = False


class ClassificationTask(Task):
    """Cross entropy over the classes.

    Figures: ``classification`` (nats per image) and ``classification_accuracy``. Of a mixed image, both labels count by
    their shares in the loss, and the one with more of it is right.
    """

    def __init__(self, model: ModelConfig, config: ClassificationConfig, num_classes: int) -> None:
        super().__init__(model)
        self.task_config = config
        self.classification_head = ClassificationHead(model.dim, num_classes)
        self.encoder.requires_grad_(not config.linear_probe)

    def num_targets(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        return {"classification": sum(len(batch) for batches in micro_batches for batch in batches.values())}

    def logits(self, batch: Batch) -> tuple[Tensor, list[LayerRouting]]:
        """Scores ``[B, C]`` of every class, float32."""
        is_frozen = self.task_config.linear_probe
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
            # What is not trained drops no branches either.
            encoded = self.encoder(batch.image, sample_seed=None if is_frozen else batch.seed)
        mean_patch_BD = encoded.vision[:, 1:].mean(1)
        return at_least_float32(self.classification_head(mean_patch_BD)), encoded.routings

    def forward(self, batches: MicroBatch, totals: Mapping[str, float], num_micro_batches: int = 1) -> TaskOutput:
        device = self.classification_head.linear.weight.device
        output = TaskOutput(loss=torch.zeros((), device=device))
        routings: list[LayerRouting] = []
        for batch in batches.values():
            logits_BC, of_batch = self.logits(batch)
            routings += of_batch
            smoothing = self.task_config.label_smoothing if self.training else 0.0
            loss, label_B = _loss(logits_BC, batch, smoothing)
            output.loss = output.loss + loss / max(1.0, totals["classification"])
            count = torch.tensor(len(batch), device=device)
            output.record("classification", loss, count)
            output.record("classification_accuracy", (logits_BC.argmax(-1) == label_B).sum(), count)
        # The experts of a frozen encoder stay as unbalanced as they are.
        if self.task_config.linear_probe:
            return output
        return self.add_auxiliary_losses(output, routings, num_micro_batches)

    def update_selection_bias(self, load_E: Mapping[str, Tensor]) -> None:
        if not self.task_config.linear_probe:
            super().update_selection_bias(load_E)


def _loss(logits_BC: Tensor, batch: Batch, smoothing: float) -> tuple[Tensor, Tensor]:
    """Sum over the images, and their main labels."""
    assert batch.label is not None

    def entropy_B(label_B: Tensor) -> Tensor:
        return F.cross_entropy(logits_BC, label_B, reduction="none", label_smoothing=smoothing)

    if batch.label_share is None:
        return entropy_B(batch.label).sum(), batch.label
    assert batch.other_label is not None
    share_B = batch.label_share
    loss_B = share_B * entropy_B(batch.label) + (1 - share_B) * entropy_B(batch.other_label)
    return loss_B.sum(), torch.where(share_B >= 0.5, batch.label, batch.other_label)
