"""Causal language modeling on the encoder's blocks: every token from those before it in its own document.

Two of the three tasks of the MH-MoE papers (English and multilingual language modeling, arXiv 2404.15045, section 4.1).

Shape suffixes: R rows, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mhmoe_vl.config import Config
from mhmoe_vl.data.batch import Batch
from mhmoe_vl.data.masking import IGNORE
from mhmoe_vl.models.attention import KeyValues
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.encoder import EncoderOutput
from mhmoe_vl.models.heads import TokenHead
from mhmoe_vl.tasks.base import MicroBatch, Task, TaskOutput, masked_cross_entropy


class LanguageModelingConfig(Config):
    """Predict the next token. Documents are packed into rows of ``data.text_length`` tokens.

    Attributes:
        segment_bytes: a document of more UTF-8 bytes than this is several samples, which know nothing of each other;
            None is ``4 * data.text_length``, about a row of English. Nothing of a document is left out.
    """

    kind: Literal["language_modeling"] = "language_modeling"
    segment_bytes: Annotated[int, Field(ge=512)] | None = None

    def segment_size(self, text_length: int) -> int:
        """Bytes of a segment for rows of ``text_length`` tokens."""
        return max(512, 4 * text_length) if self.segment_bytes is None else self.segment_bytes


class LanguageModelingTask(Task):
    """Cross entropy of the next token, over all tokens of a step.

    Figures: ``lm`` (nats per token, end tokens included) and ``lm_accuracy``; ``lm_per_byte`` and ``lm_per_character``
    are the same sum of nats over the UTF-8 bytes and the characters of the text, which do not depend on the tokenizer.
    """

    def __init__(self, model: ModelConfig, config: LanguageModelingConfig) -> None:
        super().__init__(model)
        self.task_config = config
        tied = self.encoder.text_embedding.tokens.weight if model.tie_embeddings else None
        self.lm_head = TokenHead(model.dim, model.vocab_size, tied)

    def num_targets(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        targets = [batch.text_targets for batches in micro_batches for batch in batches.values()]
        return {"lm": sum(int((t != IGNORE).sum()) for t in targets if t is not None)}

    def encode(
        self,
        ids_RL: Tensor,
        *,
        valid_RL: Tensor | None = None,
        positions_RL: Tensor | None = None,
        seed_RL: Tensor | None = None,
        past: Sequence[KeyValues] | None = None,
        first_position: int = 0,
        with_cache: bool = False,
    ) -> EncoderOutput:
        """Hidden states, each of which has seen the tokens up to its own and predicts the next.

        Arguments are those of :class:`mhmoe_vl.models.encoder.MultiwayEncoder`.
        """
        # Without an image, the pattern of captioning is causal.
        return self.encoder(
            None,
            ids_RL,
            text_valid=valid_RL,
            text_positions=positions_RL,
            sample_seed=seed_RL,
            pattern="captioning",
            past=past,
            first_position=first_position,
            with_cache=with_cache,
        )

    def forward(self, batches: MicroBatch, totals: Mapping[str, float], num_micro_batches: int = 1) -> TaskOutput:
        """One pass for all sources. The figure ``tokens_per_step`` counts what is predicted."""
        rows = _joined(list(batches.values()))
        encoded = self.encode(rows.ids_RL, valid_RL=rows.valid_RL, positions_RL=rows.positions_RL, seed_RL=rows.seed_RL)
        loss, correct = masked_cross_entropy(self.lm_head, encoded.text, rows.targets_RL)
        count = (rows.targets_RL != IGNORE).sum()
        output = TaskOutput(loss=loss / max(1.0, totals["lm"]), shares={"tokens_per_step": count})
        output.record("lm", loss, count)
        output.record("lm_accuracy", correct, count)
        output.record("lm_per_byte", loss, rows.num_bytes)
        output.record("lm_per_character", loss, rows.num_characters)
        return self.add_auxiliary_losses(output, encoded.routings, num_micro_batches)


class _Rows(NamedTuple):
    """Fields of :class:`mhmoe_vl.data.batch.Batch`; without positions, rows are no packed ones."""

    ids_RL: Tensor
    valid_RL: Tensor | None
    targets_RL: Tensor
    positions_RL: Tensor | None
    seed_RL: Tensor | None
    num_bytes: Tensor
    num_characters: Tensor


def _joined(batches: Sequence[Batch]) -> _Rows:
    """The rows of all sources, padded to the longest."""
    length = max(batch.text_ids.shape[1] for batch in batches if batch.text_ids is not None)

    def joined(name: str, padding: int) -> Any:
        tensors = [getattr(batch, name) for batch in batches]
        if len(batches) == 1:
            return tensors[0]
        return torch.cat([F.pad(tensor, (0, length - tensor.shape[1]), value=padding) for tensor in tensors])

    return _Rows(
        joined("text_ids", 0),
        joined("text_valid", False),
        joined("text_targets", IGNORE),
        joined("text_positions", 0),
        joined("text_seed", 0),
        torch.cat([batch.num_bytes for batch in batches if batch.num_bytes is not None]).sum(),
        torch.cat([batch.num_characters for batch in batches if batch.num_characters is not None]).sum(),
    )
