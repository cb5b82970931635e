"""Likelihoods of texts, against one forward pass per token, and text that is generated step by step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_vl.evaluation.likelihood import CausalScorer, Likelihood, MaskedScorer, windows_of
from mhmoe_vl.tasks.language_modeling import LanguageModelingTask
from mhmoe_vl.tasks.pretrain import PretrainTask
from tests.unit.data.builders import word_tokenizer, words
from tests.unit.tasks.builders import make_task

TOKENIZER = word_tokenizer(25)  # 30 tokens, as the models have
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def causal(*, max_length: int = 12, batch_size: int = 3, **changes: Any) -> CausalScorer:
    task = make_task("language_modeling", **changes).eval()
    assert isinstance(task, LanguageModelingTask)
    return CausalScorer(task, TOKENIZER, max_length=max_length, batch_size=batch_size)


def masked(*, max_length: int = 12, batch_size: int = 3) -> MaskedScorer:
    task = make_task("pretrain", "dense").eval()
    assert isinstance(task, PretrainTask)
    return MaskedScorer(task, TOKENIZER, max_length=max_length, batch_size=batch_size)


@torch.no_grad()
def next_token(scorer: CausalScorer, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of what follows."""
    return scorer.task.lm_head(scorer.task.encode(torch.tensor([ids])).text[0, -1]).log_softmax(-1)


def test_windows_of_the_harness_s_own_example() -> None:
    """Ten tokens behind a start token (here -1), four at a time: `lm_eval.api.model.LM.loglikelihood_rolling`."""
    windows = [(w.ids[:-1], w.ids[w.first :]) for w in windows_of(0, [-1, *range(10)], 1, 4, 5)]
    assert windows == [([-1, 0, 1, 2], [0, 1, 2, 3]), ([3, 4, 5, 6], [4, 5, 6, 7]), ([5, 6, 7, 8], [8, 9])]


@given(st.integers(1, 40), st.integers(0, 39), st.integers(1, 10))
def test_windows_score_every_token_once(length: int, first: int, max_targets: int) -> None:
    ids = list(range(length))
    windows = list(windows_of(3, ids, first, max_targets, max_targets + 1))
    assert [i for w in windows for i in w.ids[w.first :]] == ids[first:]
    assert all(w.text == 3 and len(w.ids) <= max_targets + 1 for w in windows)
    assert all(b == a + 1 for w in windows for a, b in pairwise(w.ids))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_continuations_token_by_token(batch_size: int) -> None:
    scorer = causal(batch_size=batch_size)
    pairs = [("w1 w2 w3", " w4 w5"), ("w7", " w8"), ("w9 w9 ", "w9 w9 w9"), ("", "w3 w4")]
    for (context, continuation), found in zip(pairs, scorer.continuations(pairs), strict=True):
        ids = [BOS, *TOKENIZER.ordinary_tokens(context + continuation)]
        first = 1 + len(TOKENIZER.ordinary_tokens(context))
        steps = [next_token(scorer, ids[:place]) for place in range(first, len(ids))]
        expected = sum(float(step[i]) for step, i in zip(steps, ids[first:], strict=True))
        assert found.log_probability == pytest.approx(expected, rel=1e-5)
        assert found.is_greedy == all(int(step.argmax()) == i for step, i in zip(steps, ids[first:], strict=True))


def test_the_greedy_continuation_is_known_as_such() -> None:
    scorer = causal()
    made = scorer.generate("w1 w2", until=[], max_tokens=3)
    assert len(made.split()) == 3
    assert scorer.continuations([("w1 w2", " " + made)])[0].is_greedy
    other = words(24, 25) if not made.endswith("w24") else "w23"
    assert not scorer.continuations([("w1 w2", f" {made} {other} {other} {other}")])[0].is_greedy


def test_long_texts_in_windows() -> None:
    """16 tokens by a model of 6: the last window sees as many tokens as it can."""
    scorer = causal(max_length=6)
    text = words(0, 16)
    ids = [BOS, *TOKENIZER.ordinary_tokens(text)]
    expected = 0.0
    for end in range(1, 17):
        start = {0: 0, 1: 6, 2: 10}[(end - 1) // 6]
        expected += float(next_token(scorer, ids[start:end])[ids[end]])
    (found,) = scorer.texts([text])
    assert found.log_probability == pytest.approx(expected, rel=1e-5)


def test_of_a_long_context_the_last_part_counts() -> None:
    scorer = causal(max_length=6)
    long, short = scorer.continuations([(words(0, 20), " w3 w4"), (words(17, 20), " w3 w4")])
    ids = TOKENIZER.ordinary_tokens(words(15, 20) + " w3 w4")
    expected = sum(float(next_token(scorer, ids[:place])[ids[place]]) for place in (5, 6))
    assert long.log_probability == pytest.approx(expected, rel=1e-5)
    ids = [BOS, *TOKENIZER.ordinary_tokens(words(17, 20) + " w3 w4")]
    expected = sum(float(next_token(scorer, ids[:place])[ids[place]]) for place in (4, 5))
    assert short.log_probability == pytest.approx(expected, rel=1e-5)
    # Also a continuation that alone is too long.
    assert scorer.continuations([("w1", " " + words(4, 16))])[0].log_probability < 0


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_generation_is_the_best_token_each_time(positions: str) -> None:
    scorer = causal(positions=positions)
    ids = [BOS, *TOKENIZER.ordinary_tokens("w3 w1")]
    made: list[int] = []
    while len(made) < 6:
        scores = next_token(scorer, ids + made)
        scores[[TOKENIZER.pad_id, BOS, TOKENIZER.mask_id, TOKENIZER.unknown_id]] = -torch.inf
        if (best := int(scores.argmax())) == EOS:
            break
        made.append(best)
    assert made
    text = TOKENIZER.tokenizer.decode(made)
    assert scorer.generate("w3 w1", until=[], max_tokens=6) == text
    stop = text.split()[-1]
    assert scorer.generate("w3 w1", until=["nowhere", stop], max_tokens=6) == text[: text.find(stop)]
    assert len(scorer.generate(words(0, 20), until=[], max_tokens=50).split()) <= 11


@pytest.mark.parametrize("batch_size", [1, 4])
def test_pseudo_log_likelihood_token_by_token(batch_size: int) -> None:
    """Salazar et al., equation 1: each token hidden in turn, with everything else to be seen."""
    scorer = masked(batch_size=batch_size)
    pairs = [("w1 w2", " w3 w4 w5"), ("", "w6 w7")]
    for (context, continuation), found in zip(pairs, scorer.continuations(pairs), strict=True):
        ids = [BOS, *TOKENIZER.ordinary_tokens(context + continuation), EOS]
        first = 1 + len(TOKENIZER.ordinary_tokens(context))
        expected, best = 0.0, True
        for place in range(first, len(ids) - 1):
            hidden = [*ids[:place], TOKENIZER.mask_id, *ids[place + 1 :]]
            with torch.no_grad():
                scores = scorer.task.mlm_head(scorer.task.encoder(text_ids=torch.tensor([hidden])).text[0, place])
            expected += float(scores.log_softmax(-1)[ids[place]])
            best = best and int(scores.argmax()) == ids[place]
        assert found == Likelihood(pytest.approx(expected, rel=1e-5), best)


def test_masked_texts_in_windows() -> None:
    """Ten tokens by a model of 6, of which <s> and </s> take two: four, four, and two that see the two before."""
    scorer = masked(max_length=6)
    text = words(0, 10)
    parts = [scorer.continuations([("", words(0, 4)), ("", words(4, 8)), (words(6, 8), " " + words(8, 10))])]
    assert scorer.texts([text])[0].log_probability == pytest.approx(sum(s.log_probability for s in parts[0]), rel=1e-5)


def test_line_breaks_are_blanks_to_a_masked_encoder() -> None:
    scorer = masked()
    assert scorer.texts(["w1\nw2"]) == scorer.texts(["w1 w2"])
