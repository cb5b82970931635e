"""A tiny captioner with strong opinions, a tokenizer of a few words, and its scores without any cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from mhmoe_vl.data.text import SPECIAL_TOKENS, TextTokenizer
from mhmoe_vl.tasks.captioning import CaptioningTask
from tests.unit.tasks.builders import make_task

WORDS = ("a", "cat", "red", "dog")


def make_tokenizer(words: tuple[str, ...] = WORDS) -> TextTokenizer:
    """Special tokens are ids 0 to 4, words follow."""
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return TextTokenizer(tokenizer)


def make_captioner(
    ffn: str = "mhmoe", *, sharpness: float = 1.0, end_bias: float = 0.0, **changes: Any
) -> CaptioningTask:
    """Vocabulary of 12, three more than the tokenizer knows.

    Args:
        sharpness: factor on the logits.
        end_bias: added to the logit of ``</s>``.
    """
    task = make_task("captioning", ffn, vocab_size=12, **changes).eval()
    assert isinstance(task, CaptioningTask)
    with torch.no_grad():
        for parameter in task.mlm_head.parameters():
            parameter.mul_(sharpness)
        task.mlm_head.linear.bias[make_tokenizer().eos_id] += end_bias
    return task


class Scores:
    """Log-probabilities of the next token after a prefix, for one image: one full pass per prefix."""

    def __init__(self, task: CaptioningTask, image: Tensor, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.choices = [*tokenizer.ordinary_ids, tokenizer.eos_id]

        @cache
        def after(prefix: tuple[int, ...]) -> dict[int, float]:
            ids = torch.tensor([[tokenizer.bos_id, *prefix, tokenizer.mask_id]])
            with torch.no_grad():
                hidden = task.encoder(image[None], ids, pattern="captioning", blind=task.task_config.blind).text[:, -1]
                log_probs = task.mlm_head(hidden).float()[0, self.choices].log_softmax(-1)
            return dict(zip(self.choices, log_probs.tolist(), strict=True))

        self.after = after
