"""What the encoder of a run costs on what the run's task feeds it."""

from __future__ import annotations

from mhmoe_vl.models.cost import EncoderCost, encoder_cost
from mhmoe_vl.train.config import RunConfig


def encoder_cost_of(config: RunConfig) -> EncoderCost:
    """Of an image and a full-length text together; retrieval encodes each on its own, classification and visual
    tokenizers images alone."""
    kind = config.task.kind
    return encoder_cost(
        config.model,
        num_text_tokens=0 if kind in ("classification", "visual_tokenizer") else config.data.text_length,
        is_pair=kind != "retrieval",
    )
