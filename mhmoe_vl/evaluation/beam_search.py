"""Caption decoding: beam search over masked prediction, with the image encoded once.

Captioning models predict a hidden token in its own place (BEiT-3), so a step feeds the newest token and a mask
behind it. Image tokens never look at text: their keys and values are computed once per image and reused at every step,
as are those of the tokens already written.

Shape suffixes: B images, K beams, V vocabulary, R = B * K rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mhmoe_vl.data.text import TextTokenizer
from mhmoe_vl.models.attention import KeyValues
from mhmoe_vl.tasks.captioning import CaptioningTask


@dataclass(frozen=True)
class BeamSettings:
    """How to search; the defaults are BEiT-3's.

    Attributes:
        num_beams: hypotheses kept per image; 1 is greedy decoding (but behind an end token it goes on with the next
            best token while a longer caption could still score better).
        max_length: tokens of a caption, the end token included.
        length_penalty: a hypothesis of n tokens scores ``sum(log p) / n ** length_penalty``.
    """

    num_beams: int = 3
    max_length: int = 32
    length_penalty: float = 0.6


@dataclass
class _Hypothesis:
    score: float
    ids: list[int]


@torch.no_grad()
def beam_search(
    task: CaptioningTask, image: Tensor, tokenizer: TextTokenizer, settings: BeamSettings
) -> list[list[int]]:
    """Best caption of every image, as token ids without ``<s>`` and ``</s>``.

    Args:
        task: in evaluation mode.
        image: uint8 ``[B, 3, H, W]``.
    """
    num_images, num_beams = image.shape[0], settings.num_beams
    if num_images == 0:
        return []
    allowed_V = torch.full((task.config.vocab_size,), float("-inf"), device=image.device)
    allowed_V[[*tokenizer.ordinary_ids, tokenizer.eos_id]] = 0.0
    decoder = _Decoder(task, image, tokenizer, num_beams)
    # Only the first beam is real at the start; the others would be copies of it.
    score_BK = torch.full((num_images, num_beams), float("-inf"), device=image.device)
    score_BK[:, 0] = 0.0
    written: list[list[list[int]]] = [[[] for _ in range(num_beams)] for _ in range(num_images)]
    finished: list[list[_Hypothesis]] = [[] for _ in range(num_images)]
    token_R = torch.full((num_images * num_beams,), tokenizer.bos_id, device=image.device)
    for length in range(1, settings.max_length + 1):
        log_probs_RV = (decoder.step(token_R) + allowed_V).log_softmax(-1)
        total_BN = (score_BK[..., None] + log_probs_RV.unflatten(0, (num_images, num_beams))).flatten(1)
        # Twice as many candidates as beams: even if half of them end here, the beams stay full.
        num_candidates = min(2 * num_beams, total_BN.shape[1])
        best_score_BN, best_BN = total_BN.topk(num_candidates, dim=1)
        parents, tokens, scores = [], [], []
        for b, (candidate_scores, candidates) in enumerate(zip(best_score_BN.tolist(), best_BN.tolist(), strict=True)):
            beams: list[tuple[float, int, int]] = []
            for score, candidate in zip(candidate_scores, candidates, strict=True):
                parent, token = divmod(candidate, log_probs_RV.shape[1])
                if score == float("-inf") or len(beams) == num_beams:
                    break  # candidates are sorted: what follows is worse than every beam
                if token == tokenizer.eos_id or length == settings.max_length:
                    ids = written[b][parent] + ([] if token == tokenizer.eos_id else [token])
                    finished[b].append(_Hypothesis(score / length**settings.length_penalty, ids))
                else:
                    beams.append((score, parent, token))
            beams += [(float("-inf"), 0, tokenizer.eos_id)] * (num_beams - len(beams))
            written[b] = [[*written[b][parent], token] for _, parent, token in beams]
            scores.append([score for score, _, _ in beams])
            parents += [b * num_beams + parent for _, parent, _ in beams]
            tokens += [token for _, _, token in beams]
        score_BK = torch.tensor(scores, device=image.device)
        if all(_is_decided(f, s, settings) for f, s in zip(finished, scores, strict=True)):
            break
        decoder.keep(torch.tensor(parents, device=image.device))
        token_R = torch.tensor(tokens, device=image.device)
    return [max(hypotheses, key=lambda h: h.score).ids for hypotheses in finished]


def _is_decided(finished: list[_Hypothesis], beam_scores: list[float], settings: BeamSettings) -> bool:
    """No unfinished beam can still win: log-probabilities only fall, and the longest caption is penalised least."""
    if not finished:
        return False
    best_possible = max(beam_scores) / settings.max_length**settings.length_penalty
    return max(hypothesis.score for hypothesis in finished) >= best_possible


class _Decoder:
    """Keys and values of the image and of the tokens written so far, one row per beam."""

    def __init__(self, task: CaptioningTask, image: Tensor, tokenizer: TextTokenizer, num_beams: int) -> None:
        self.task, self.tokenizer = task, tokenizer
        encoded = task.encoder(image, blind=task.task_config.blind, with_cache=True, is_pair=True)
        rows = torch.arange(image.shape[0], device=image.device).repeat_interleave(num_beams)
        self.cache = [layer.index_select(rows) for layer in encoded.cache]
        self.num_written = 0

    def step(self, token_R: Tensor) -> Tensor:
        """Append a token to every row and return the logits ``[R, V]`` of the one after it."""
        ids_R2 = torch.stack([token_R, torch.full_like(token_R, self.tokenizer.mask_id)], dim=1)
        encoded = self.task.encoder(
            text_ids=ids_R2,
            pattern="captioning",
            past=self.cache,
            first_position=self.num_written,
            with_cache=True,
            is_pair=True,
        )
        # Of the two positions only the token's is kept; the mask was a question.
        newest = [KeyValues(layer.keys[:, :, :1], layer.values[:, :, :1]) for layer in encoded.cache]
        self.cache = [layer.extended(new) for layer, new in zip(self.cache, newest, strict=True)]
        self.num_written += 1
        return self.task.mlm_head(encoded.text[:, 1]).float()

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows, in this order."""
        self.cache = [layer.index_select(rows) for layer in self.cache]
