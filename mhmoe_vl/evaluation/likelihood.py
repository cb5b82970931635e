"""How likely a model finds a text: a causal model token by token, a masked encoder by pseudo-log-likelihood.

Texts are scored as they are given, and need not fit into the model: windows of its length cover them, each token is
scored in exactly one, with as much context in front of it as the window has room for.

Shape suffixes: B windows, L tokens, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_vl.data.prepare.progress import show_progress
from mhmoe_vl.data.text import TextTokenizer
from mhmoe_vl.tasks.base import at_least_float32
from mhmoe_vl.tasks.language_modeling import LanguageModelingTask
from mhmoe_vl.tasks.pretrain import PretrainTask


class Likelihood(NamedTuple):
    """Sum of log-probabilities in nats, and whether each token scored was the most likely one in its place."""

    log_probability: float
    is_greedy: bool

    def __add__(self, other: object) -> Likelihood:
        if not isinstance(other, Likelihood):
            return NotImplemented
        return Likelihood(self.log_probability + other.log_probability, self.is_greedy and other.is_greedy)


class Window(NamedTuple):
    """Part of a text that is scored at once.

    Attributes:
        text: number of the text.
        ids: tokens of the window.
        first: the first of them that is scored here.
    """

    text: int
    ids: list[int]
    first: int


def windows_of(text: int, ids: list[int], first: int, max_targets: int, max_length: int) -> Iterator[Window]:
    """Windows over ``ids`` in which every token from ``first`` on is scored once.

    Args:
        max_targets: tokens scored in one window.
        max_length: tokens of a window.
    """
    while first < len(ids):
        end = min(len(ids), first + max_targets)
        start = max(0, end - max_length)
        yield Window(text, ids[start:end], first - start)
        first = end


class Scorer(ABC):
    """Scores texts with one model, in evaluation mode.

    Args:
        max_length: tokens that the model was trained on.
        batch_size: windows per forward pass.
    """

    def __init__(self, tokenizer: TextTokenizer, *, max_length: int, batch_size: int, device: torch.device) -> None:
        self.tokenizer, self.max_length, self.batch_size, self.device = tokenizer, max_length, batch_size, device

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each continuation after its context."""
        return self._score([self._ids_of(context, continuation) for context, continuation in pairs])

    def texts(self, texts: Sequence[str]) -> list[Likelihood]:
        """Of whole texts, without their end."""
        return self.continuations([("", text) for text in texts])

    def _ids_of(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of both, and the first of the continuation.

        White space between them belongs to the continuation, as a word's tokens include the blank before it. Where a
        token reaches over the border all the same, the continuation begins with it.
        """
        stripped = context.rstrip()
        whole = self.tokenizer.ordinary_tokens(context + continuation)
        first = len(self.tokenizer.ordinary_tokens(stripped)) if stripped else 0
        return whole, min(first, max(0, len(whole) - 1))

    def _score(self, texts: Sequence[tuple[list[int], int]]) -> list[Likelihood]:
        windows = [window for number, (ids, first) in enumerate(texts) for window in self._windows(number, ids, first)]
        # Long ones first: batches have little padding, and what does not fit into memory fails at once.
        windows.sort(key=lambda window: -len(window.ids))
        scores = [Likelihood(0.0, True)] * len(texts)
        batches = [windows[start : start + self.batch_size] for start in range(0, len(windows), self.batch_size)]
        for batch in show_progress(batches, label="scoring", amount=len, total=len(windows)):
            for window, score in zip(batch, self._score_windows(batch), strict=True):
                scores[window.text] = scores[window.text] + score
        return scores

    @abstractmethod
    def _windows(self, number: int, ids: list[int], first: int) -> Iterator[Window]:
        """The windows that a text is scored in, ready for the model."""

    @abstractmethod
    def _score_windows(self, windows: Sequence[Window]) -> list[Likelihood]:
        """One score for each window."""

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        length = max(map(len, rows))
        ids_BL = torch.full((len(rows), length), self.tokenizer.pad_id, dtype=torch.long)
        for row, ids in zip(ids_BL, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        lengths_B1 = torch.tensor([len(ids) for ids in rows])[:, None]
        return ids_BL.to(self.device), (torch.arange(length) < lengths_B1).to(self.device)


class CausalScorer(Scorer):
    """Log-likelihood by a causal model, whose texts begin with ``<s>``."""

    def __init__(
        self, task: LanguageModelingTask, tokenizer: TextTokenizer, *, max_length: int, batch_size: int
    ) -> None:
        device = task.lm_head.linear.weight.device
        super().__init__(tokenizer, max_length=max_length, batch_size=batch_size, device=device)
        self.task = task

    def _windows(self, number: int, ids: list[int], first: int) -> Iterator[Window]:
        # The last token of a window is predicted and not fed.
        return windows_of(number, [self.tokenizer.bos_id, *ids], first + 1, self.max_length, self.max_length + 1)

    @torch.no_grad()
    def _score_windows(self, windows: Sequence[Window]) -> list[Likelihood]:
        ids_BL, valid_BL = self._padded([window.ids[:-1] for window in windows])
        hidden_BLD = self.task.encode(ids_BL, valid_RL=valid_BL).text
        scores = []
        for window, hidden_LD in zip(windows, hidden_BLD, strict=True):
            logits_NV = at_least_float32(self.task.lm_head(hidden_LD[window.first - 1 : len(window.ids) - 1]))
            scores.append(_likelihood(logits_NV, window.ids[window.first :]))
        return scores

    @torch.no_grad()
    def generate(self, context: str, *, until: Sequence[str], max_tokens: int) -> str:
        """The most likely continuation, token by token, up to the first of ``until``, an end token, or ``max_tokens``.

        Of a context that leaves no room for ``max_tokens`` the last part is taken.
        """
        max_tokens = min(max_tokens, self.max_length - 1)
        room = self.max_length - max_tokens
        ids = [self.tokenizer.bos_id, *self.tokenizer.ordinary_tokens(context)][-room:]
        newest = torch.tensor([ids], device=self.device)
        encoded = self.task.encode(newest, with_cache=True)
        cache, position, made = encoded.cache, len(ids), []
        ordinary = torch.tensor([*self.tokenizer.ordinary_ids, self.tokenizer.eos_id], device=self.device)
        for _ in range(max_tokens):
            scores = at_least_float32(self.task.lm_head(encoded.text[0, -1:]))[0, ordinary]
            best = int(ordinary[scores.argmax()])
            if best == self.tokenizer.eos_id:
                break
            made.append(best)
            text = self.tokenizer.tokenizer.decode(made)
            ends = [place for stop in until if stop and (place := text.find(stop)) >= 0]
            if ends:
                return text[: min(ends)]
            newest = torch.tensor([[best]], device=self.device)
            encoded = self.task.encode(newest, past=cache, first_position=position, with_cache=True)
            cache = [old.extended(new) for old, new in zip(cache, encoded.cache, strict=True)]
            position += 1
        return self.tokenizer.tokenizer.decode(made)


class MaskedScorer(Scorer):
    """Pseudo-log-likelihood by a masked encoder (Salazar et al., 2020, arXiv 1910.14659): the sum over tokens of the
    log-probability of each, when it alone is hidden. One forward pass per scored token, and no probability of the text.
    """

    def __init__(self, task: PretrainTask, tokenizer: TextTokenizer, *, max_length: int, batch_size: int) -> None:
        device = task.mlm_head.linear.weight.device
        super().__init__(tokenizer, max_length=max_length, batch_size=batch_size, device=device)
        self.task = task

    def _ids_of(self, context: str, continuation: str) -> tuple[list[int], int]:
        # Pretraining reads texts on one line.
        return super()._ids_of(_on_one_line(context), _on_one_line(continuation))

    def _windows(self, number: int, ids: list[int], first: int) -> Iterator[Window]:
        room = self.max_length - 2
        for window in windows_of(number, ids, first, room, room):
            whole = [self.tokenizer.bos_id, *window.ids, self.tokenizer.eos_id]
            for hidden in range(window.first + 1, len(whole) - 1):
                yield Window(number, whole, hidden)

    @torch.no_grad()
    def _score_windows(self, windows: Sequence[Window]) -> list[Likelihood]:
        rows = [[*w.ids[: w.first], self.tokenizer.mask_id, *w.ids[w.first + 1 :]] for w in windows]
        ids_BL, valid_BL = self._padded(rows)
        hidden_BLD = self.task.encoder(None, ids_BL, text_valid=valid_BL).text
        places_B = torch.tensor([window.first for window in windows], device=self.device)
        logits_BV = at_least_float32(self.task.mlm_head(hidden_BLD[torch.arange(len(windows)), places_B]))
        return [_likelihood(logits_BV[row : row + 1], [w.ids[w.first]]) for row, w in enumerate(windows)]


def _likelihood(logits_NV: Tensor, targets: list[int]) -> Likelihood:
    targets_N = torch.tensor(targets, device=logits_NV.device)
    log_probability = logits_NV.log_softmax(-1).gather(-1, targets_N[:, None]).sum()
    return Likelihood(float(log_probability), bool((logits_NV.argmax(-1) == targets_N).all()))


def _on_one_line(text: str) -> str:
    return text.translate(str.maketrans("\n\r\t", "   "))
