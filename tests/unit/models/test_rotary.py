"""Rotary positions: complex numbers as the reference, and what they are for."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from mhmoe_vl.models.attention import Rotation
from mhmoe_vl.models.cost import encoder_cost
from tests.unit.models.builders import make_config, make_encoder, texts


def test_pairs_are_turned_as_complex_numbers() -> None:
    """RoFormer, equation 13: the pair as a complex number, times e^(i m theta)."""
    positions = torch.tensor([[0, 1, 5], [3, 0, 2]])
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    turned = Rotation.of_positions(positions, 6).turn(x)
    theta = torch.tensor([10_000 ** (-2 * pair / 6) for pair in range(3)], dtype=torch.float64)
    angle = positions[:, None, :, None] * theta
    expected = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    assert_close(turned, torch.cat([expected.real, expected.imag], dim=-1), atol=1e-6, rtol=1e-6)
    assert torch.equal(turned[0, :, 0], x[0, :, 0])


def test_scores_depend_on_distances_alone() -> None:
    q, k = (torch.randn(1, 1, 1, 8, dtype=torch.float64) for _ in range(2))

    def score(of_query: int, of_key: int) -> torch.Tensor:
        turned = [Rotation.of_positions(torch.tensor([[p]]), 8).turn(x) for p, x in ((of_query, q), (of_key, k))]
        return (turned[0] * turned[1]).sum()

    assert_close(score(9, 4), score(105, 100), atol=1e-5, rtol=1e-5)
    assert not torch.isclose(score(9, 4), score(9, 5))


def test_the_order_of_words_matters() -> None:
    """Without positions, bidirectional attention would not see an exchange of two other tokens."""
    encoder = make_encoder(modalities=("text",), positions="rotary")
    ids = texts(1, 5)
    exchanged = ids[:, [0, 2, 1, 3, 4]]
    first, second = (encoder(text_ids=x).text[0, 4] for x in (ids, exchanged))
    assert not torch.isclose(first, second).any()


def test_positions_cost_no_parameters() -> None:
    learned, rotary = (make_config(modalities=("text",), positions=kind) for kind in ("learned", "rotary"))
    for config in (learned, rotary):
        encoder = make_encoder(modalities=("text",), positions=config.positions)
        assert encoder_cost(config, num_text_tokens=5).num_params == sum(p.numel() for p in encoder.parameters())
    difference = (
        encoder_cost(learned, num_text_tokens=5).num_params - encoder_cost(rotary, num_text_tokens=5).num_params
    )
    assert difference == 12 * 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"'rotary' is for text alone: .*set modalities=\[text\]"),
        ({"modalities": ("text",), "num_heads": 16}, "so that it is even"),
    ],
)
def test_where_it_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(positions="rotary", **changes)


def test_packed_rows_hold_text_alone() -> None:
    encoder, ids = make_encoder(), texts(1, 4)
    with pytest.raises(ValueError, match="packed rows hold text alone"):
        encoder(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ids, text_positions=torch.zeros_like(ids))
