"""Image-text retrieval: images and texts are encoded each on its own and meet in a contrastive loss (the ITC
fine-tuning of BEiT-3, arXiv 2208.10442, section 3.1; the loss is CLIP's, arXiv 2103.00020, figure 3).

Shape suffixes: B pairs of this rank, N pairs of all ranks, L text tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mhmoe_vl.config import Config
from mhmoe_vl.data.plan import stable_hash
from mhmoe_vl.distributed.collectives import gather_rows
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.feed_forward import LayerRouting
from mhmoe_vl.models.heads import EmbeddingHead
from mhmoe_vl.tasks.base import MicroBatch, Task, TaskOutput


class RetrievalConfig(Config):
    """Find the caption of an image, and the image of a caption.

    Attributes:
        temperature: of the softmax over cosine similarities at the start; it is learnt from there (CLIP and BEiT-3).
    """

    kind: Literal["retrieval"] = "retrieval"
    temperature: Annotated[float, Field(gt=0)] = 0.07


class RetrievalTask(Task):
    """Which of the other pairs' captions is the image's own, and the other way round.

    In training an image is compared with the captions of the whole micro-batch, those of other ranks included, so the
    result depends on ``num_micro_batches`` but not on the number of ranks. Held-out pairs are compared with those of
    their own batch of ``data.validation_batch_size`` alone, which is the same for any number of ranks; recall over a
    whole split is :mod:`mhmoe_vl.evaluation.retrieval_recall`'s.

    Figures: ``retrieval`` (nats per choice), ``retrieval_accuracy`` (of the choices of both directions) and
    ``retrieval_temperature``.
    """

    def __init__(self, model: ModelConfig, config: RetrievalConfig) -> None:
        super().__init__(model)
        self.task_config = config
        self.vision_head = EmbeddingHead(model.dim)
        self.text_head = EmbeddingHead(model.dim)
        # FSDP2 refuses scalars.
        self.logit_scale = nn.Parameter(torch.full((1,), -math.log(config.temperature)))

    def num_targets(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        return {"retrieval": sum(len(batch) for batches in micro_batches for batch in batches.values())}

    def embed_images(self, image: Tensor, *, seed: Tensor | None = None) -> tuple[Tensor, list[LayerRouting]]:
        """``[B, D]`` of length 1."""
        encoded = self.encoder(image, sample_seed=seed)
        return self.vision_head(encoded.vision[:, 0]), encoded.routings

    def embed_texts(
        self, text_ids: Tensor, text_valid: Tensor | None, *, seed: Tensor | None = None
    ) -> tuple[Tensor, list[LayerRouting]]:
        """``[B, D]`` of length 1."""
        encoded = self.encoder(None, text_ids, text_valid=text_valid, sample_seed=seed)
        return self.text_head(encoded.text[:, 0]), encoded.routings

    def forward(self, batches: MicroBatch, totals: Mapping[str, float], num_micro_batches: int = 1) -> TaskOutput:
        """The pairs of all sources are compared with each other."""
        pairs: list[Tensor] = []
        image_ids: list[int] = []
        routings: list[LayerRouting] = []
        for source, batch in batches.items():
            assert batch.image is not None
            assert batch.text_ids is not None
            images_BD, of_images = self.embed_images(batch.image, seed=batch.seed)
            texts_BD, of_texts = self.embed_texts(batch.text_ids, batch.text_valid, seed=batch.seed)
            pairs.append(torch.stack([images_BD, texts_BD], dim=1))
            image_ids += [stable_hash(f"{source}/{name}") for name in batch.sample_ids]
            routings += of_images + of_texts
        pairs_B2D = torch.cat(pairs)
        ids_B = torch.tensor(image_ids, dtype=torch.long, device=pairs_B2D.device)
        pairs_N2D, ids_N, first = pairs_B2D, ids_B, 0
        if self.training:
            pairs_N2D, first = gather_rows(pairs_B2D)
            ids_N, _ = gather_rows(ids_B)
        loss, num_right = contrastive_loss(
            pairs_B2D, pairs_N2D, self.logit_scale.exp(), ids_B=ids_B, ids_N=ids_N, first=first
        )
        output = TaskOutput(loss=loss / (2 * max(1.0, totals["retrieval"])))
        num_choices = torch.tensor(2 * len(ids_B), device=pairs_B2D.device)
        output.record("retrieval", loss, num_choices)
        output.record("retrieval_accuracy", num_right, num_choices)
        output.record("retrieval_temperature", num_choices * (-self.logit_scale[0]).exp(), num_choices)
        return self.add_auxiliary_losses(output, routings, num_micro_batches)


def contrastive_loss(
    pairs_B2D: Tensor, pairs_N2D: Tensor, scale: Tensor, *, ids_B: Tensor, ids_N: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of this rank's images choosing among all texts and of its texts choosing among all images,
    ``2 B`` choices, and how many of them were right.

    An image that occurs twice, as small data sets and the border of two epochs have it, is not its own negative.

    Args:
        pairs_B2D: image and text of this rank's pairs, of length 1 each.
        pairs_N2D: those of all ranks; ``pairs_B2D`` are the rows from ``first`` on.
        scale: inverse temperature, ``[1]``.
        ids_B, ids_N: int64, which image a pair is of.
    """
    own_B = torch.arange(len(ids_B), device=ids_B.device) + first
    is_other_BN = own_B[:, None] != torch.arange(len(ids_N), device=ids_N.device)
    excluded_BN = is_other_BN & (ids_B[:, None] == ids_N)
    loss, num_right = pairs_B2D.new_zeros(()), pairs_B2D.new_zeros(())
    for own, other in ((0, 1), (1, 0)):
        # In 16 bits, cosines near 1 could not be told apart, and a low temperature makes the most of it.
        with torch.autocast(pairs_B2D.device.type, enabled=False):
            logits_BN = scale * (pairs_B2D[:, own] @ pairs_N2D[:, other].T)
        logits_BN = logits_BN.masked_fill(excluded_BN, -torch.inf)
        loss = loss + F.cross_entropy(logits_BN, own_B, reduction="sum")
        # Without pairs there is nothing to take the largest of.
        num_right = num_right + ((logits_BN.argmax(-1) == own_B).sum() if len(ids_N) else 0)
    return loss, num_right
