"""Two streams side by side, and modules that treat each in its own way."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mhmoe_vl.models.streams import Multiway, Streams


def streams(num_vision: int, num_text: int) -> Streams:
    return Streams(torch.randn(2, num_vision, 4), torch.randn(2, num_text, 4))


def test_joining_and_splitting() -> None:
    both = streams(3, 2)
    assert torch.equal(both.joined()[:, 3:], both.text)
    again = Streams.split(both.joined(), 3)
    assert torch.equal(again.vision, both.vision)
    assert torch.equal(again.text, both.text)


def test_addition_and_scaling_are_per_stream() -> None:
    a, b = streams(3, 2), streams(3, 2)
    assert torch.equal((a + b).text, a.text + b.text)
    scaled = a.scaled(torch.tensor([0.0, 2.0]))
    assert not scaled.vision[0].any()
    assert not scaled.text[0].any()
    assert torch.equal(scaled.vision[1], 2 * a.vision[1])
    with pytest.raises(TypeError):
        a + 1


def test_a_module_per_modality_or_one_for_both() -> None:
    both = streams(3, 2)
    apart = Multiway(lambda: nn.Linear(4, 5), ("vision", "text"))
    assert_close(apart(both).vision, apart.vision(both.vision))
    assert_close(apart(both).text, apart.text(both.text))
    shared = Multiway(lambda: nn.Linear(4, 5), ("vision", "text"), shared=True)
    assert [name for name, _ in shared.named_children()] == ["shared"]
    assert_close(shared(both).text, shared.shared(both.text))


def test_a_stream_without_a_branch_must_be_empty() -> None:
    text_only = Multiway(lambda: nn.Linear(4, 4), ("text",))
    assert text_only(streams(0, 2)).text.shape == (2, 2, 4)
    with pytest.raises(ValueError, match="this encoder has no vision branch, but got 3 vision tokens"):
        text_only(streams(3, 2))
