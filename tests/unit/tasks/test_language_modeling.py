"""Causal language modeling: packing changes nothing, nothing leaks, and decoding step by step is the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from mhmoe_vl.data.batch import Batch, Example, collate
from mhmoe_vl.moe import KINDS
from mhmoe_vl.tasks.language_modeling import LanguageModelingTask
from tests.unit.models.builders import texts
from tests.unit.tasks.builders import gradients, make_task

LENGTHS = (5, 3, 12, 1, 4)


def make_lm(ffn: str = "dense", **changes: Any) -> LanguageModelingTask:
    task = make_task("language_modeling", ffn, **changes)
    assert isinstance(task, LanguageModelingTask)
    return task


def documents(row_length: int) -> list[Example]:
    """Five documents, the longest as long as the table of positions."""
    examples = []
    for number, length in enumerate(LENGTHS):
        ids = texts(1, length + 1, seed=number)[0].tolist()
        examples.append(
            Example(
                f"d{number}",
                100 + number,
                text_ids=ids[:-1],
                text_targets=ids[1:],
                row_length=row_length,
                num_bytes=2 * length,
                num_characters=length,
            )
        )
    return examples


def packed() -> Batch:
    """In rows of 12: [12], [5, 4, 3], [1]."""
    examples = documents(12)
    batch = collate(examples, examples[0], pad_id=0)
    assert (batch.text_positions == 0).sum(1).tolist() == [1, 3, 12]
    return batch


def results(task: LanguageModelingTask, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor], list[Any]]:
    totals = task.num_targets([{"x": batch} for batch in batches])
    task.zero_grad()
    outputs = [task({"x": batch}, totals) for batch in batches]
    loss = torch.stack([output.loss for output in outputs]).sum()
    loss.backward()
    return loss.detach(), gradients(task), outputs


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("ffn", KINDS)
def test_packed_documents_give_what_they_give_alone(ffn: str, positions: str) -> None:
    """Loss and every gradient, with stochastic depth; alone they have no mask, padding or packed positions."""
    task = make_lm(ffn, positions=positions, drop_path=0.4, moe={"balance_weight": 0.0}).train()
    alone = []
    for example in documents(12):
        batch = collate([example], example, pad_id=0)
        assert batch.text_valid.all()
        alone.append(replace(batch, text_positions=None, text_valid=None, text_seed=batch.seed))
    found, expected = results(task, [packed()]), results(task, alone)
    # Router logits, and so the gates, are float32.
    exact = {"atol": 1e-5, "rtol": 1e-5}
    assert_close(found[0], expected[0], **exact)
    for name, grad in expected[1].items():
        assert_close(found[1][name], grad, **exact, msg=lambda text, name=name: f"{name}: {text}")
    for figure in ("lm", "lm_accuracy", "lm_per_byte", "lm_per_character"):
        for part in ("sums", "counts"):
            total = sum(getattr(output, part)[figure] for output in expected[2])
            assert_close(getattr(found[2][0], part)[figure], total, check_dtype=False, **exact)


@pytest.mark.parametrize("ffn", ["dense", "mhmoe"])
def test_the_balance_loss_counts_tokens_however_they_are_packed(ffn: str) -> None:
    task = make_lm(ffn, moe={"balance_weight": 0.5})
    tight, loose = (collate(documents(length), documents(length)[0], pad_id=0) for length in (12, 25))
    assert tight.text_ids.shape != loose.text_ids.shape
    outputs = [task({"x": batch}, {"lm": 25.0}) for batch in (tight, loose)]
    assert_close(outputs[0].loss, outputs[1].loss, atol=1e-5, rtol=1e-5)
    for name, load_E in outputs[0].load_E.items():
        assert torch.equal(load_E, outputs[1].load_E[name])


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_nothing_leaks(positions: str) -> None:
    """Whatever token is changed, the hidden states of other documents and of tokens before it stay bit for bit."""
    task = make_lm(positions=positions)
    batch = packed()
    row = slice(1, 2)
    ids, positions_RL, valid = batch.text_ids[row], batch.text_positions[row], batch.text_valid[row]
    starts = [place for place in range(12) if positions_RL[0, place] == 0]
    assert starts == [0, 5, 9]

    def encoded(ids_RL: Tensor) -> Tensor:
        return task.encode(ids_RL, valid_RL=valid, positions_RL=positions_RL).text[0]

    before = encoded(ids)
    for place in range(12):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 30
        changed = (encoded(other) != before).any(-1).tolist()
        end = next((start for start in [*starts[1:], 12] if start > place), 12)
        assert changed == [place <= token < end for token in range(12)], place


def test_the_next_token_is_predicted() -> None:
    """By hand, from the logits of each document alone."""
    task = make_lm()
    total, right = torch.zeros(()), 0
    for example in documents(12):
        logits = task.lm_head(task.encode(torch.tensor([example.text_ids])).text[0])
        targets = torch.tensor(example.text_targets)
        total = total + F.cross_entropy(logits, targets, reduction="sum")
        right += int((logits.argmax(-1) == targets).sum())
    batch = packed()
    assert task.num_targets([{"x": batch}, {"y": batch}]) == {"lm": 50}
    output = task({"x": batch}, {"lm": 50.0})
    assert_close(output.loss, total / 50, check_dtype=False)
    assert (output.counts["lm"], output.counts["lm_per_byte"], output.counts["lm_per_character"]) == (25, 50, 25)
    assert output.sums["lm_accuracy"] == right
    assert_close(output.sums["lm_per_byte"], output.sums["lm"])


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("ffn", ["dense", "mhmoe"])
def test_step_by_step(ffn: str, positions: str) -> None:
    """With keys and values kept, two tokens and then one at a time, as generation does."""
    task = make_lm(ffn, positions=positions).eval()
    ids = texts(2, 7)
    whole = task.encode(ids).text
    cache, parts = None, []
    for start, end in ((0, 2), *((place, place + 1) for place in range(2, 7))):
        encoded = task.encode(ids[:, start:end], past=cache, first_position=start, with_cache=True)
        cache = encoded.cache if cache is None else [a.extended(b) for a, b in zip(cache, encoded.cache, strict=True)]
        parts.append(encoded.text)
    assert_close(torch.cat(parts, dim=1), whole, atol=1e-6, rtol=1e-5)


def test_tied_and_untied_heads() -> None:
    tied, untied = make_lm(tie_embeddings=True), make_lm()
    assert tied.lm_head.linear.weight is tied.encoder.text_embedding.tokens.weight
    assert untied.lm_head.linear.weight is not untied.encoder.text_embedding.tokens.weight


def test_rotary_has_no_table_of_positions() -> None:
    names = [{name for name, _ in make_lm(positions=kind).named_parameters()} for kind in ("learned", "rotary")]
    assert names[0] - names[1] == {"encoder.text_embedding.positions"}
    assert names[1] < names[0]


def test_sources_are_encoded_together() -> None:
    """Rows of 12 tokens and rows of 5: what each gives alone adds up, and blocks run once."""
    task = make_lm("smoe", moe={"balance_weight": 0.0})
    long, short = packed(), collate(documents(5)[:2], documents(5)[0], pad_id=0)
    assert long.text_ids.shape[1] != short.text_ids.shape[1]
    totals = task.num_targets([{"a": long, "b": short}])
    assert totals == {"lm": 25 + 8}
    calls = []
    task.encoder.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    both = task({"a": long, "b": short}, totals)
    assert len(calls) == 1
    apart = [task({"x": batch}, totals) for batch in (long, short)]
    assert_close(both.loss, apart[0].loss + apart[1].loss, atol=1e-6, rtol=1e-6)
    for figure, total in both.sums.items():
        assert_close(total, sum(output.sums[figure] for output in apart), check_dtype=False, atol=1e-5, rtol=1e-5)
        assert both.counts[figure] == sum(output.counts[figure] for output in apart)
    assert both.shares["tokens_per_step"] == 33
