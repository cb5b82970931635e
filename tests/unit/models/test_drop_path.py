"""Stochastic depth: an independent SplitMix64, rates, and what depends on what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mhmoe_vl.models.drop_path import keep_factors, uniform_hash
from tests.unit.models.builders import images, make_encoder, texts

MASK = 2**64 - 1


def splitmix64(seed: int, stream: int) -> int:
    """Output number ``stream`` of Vigna's generator started at ``seed``, with Python's unbounded integers."""
    z = (seed + stream * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_published_first_outputs() -> None:
    """Seed 1234567, as in the test vectors that circulate with the generator."""
    assert [splitmix64(1234567, n) for n in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), st.integers(1, 6))
def test_the_hash_is_splitmix64(seeds: list[int], num_streams: int) -> None:
    expected = [[(splitmix64(seed & MASK, n) >> 40) / 2**24 for seed in seeds] for n in range(1, num_streams + 1)]
    found = uniform_hash(torch.tensor(seeds), num_streams)
    assert found.dtype == torch.float32
    assert found.tolist() == expected


def test_rates_are_linear_and_means_are_one() -> None:
    num_samples, num_branches = 20_000, 5
    factors = keep_factors(torch.arange(num_samples), num_branches, 0.4)
    for branch, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.4)):
        kept = factors[branch][factors[branch] != 0]
        assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
        deviation = (rate * (1 - rate) / num_samples) ** 0.5
        assert len(kept) / num_samples == pytest.approx(1 - rate, abs=5 * deviation)
    # Branches are dropped independently of each other.
    both = ((factors[3] == 0) & (factors[4] == 0)).float().mean().item()
    assert both == pytest.approx(0.12, abs=0.012)


def test_a_decision_depends_on_the_sample_alone() -> None:
    seeds = torch.tensor([5, -9, 2**62, 7])
    together = keep_factors(seeds, 8, 0.5)
    for column, seed in enumerate(seeds):
        assert torch.equal(keep_factors(seed[None], 8, 0.5)[:, 0], together[:, column])
    assert keep_factors(seeds[:0], 8, 0.5).shape == (8, 0)


def test_the_encoder_drops_branches_in_training_only() -> None:
    encoder = make_encoder("mhmoe", drop_path=0.5)
    plain = make_encoder("mhmoe")
    image, ids, seeds = images(6), texts(6, 4), torch.arange(6)
    expected = plain(image, ids).text
    assert torch.equal(encoder(image, ids).text, expected)  # without seeds
    assert torch.equal(encoder.eval()(image, ids, sample_seed=seeds).text, expected)
    dropped = encoder.train()(image, ids, sample_seed=seeds)
    assert not torch.equal(dropped.text, expected)
    order = torch.tensor([4, 1, 3])
    again = encoder(image[order], ids[order], sample_seed=seeds[order])
    assert_close(again.text, dropped.text[order])
    assert_close(again.vision, dropped.vision[order])


def test_a_dropped_branch_leaves_the_residual() -> None:
    """With the last feed-forward dropped for a sample, its weights have no effect on that sample."""
    encoder = make_encoder(drop_path=0.5)
    image, ids, seeds = images(8), texts(8, 4), torch.arange(8)
    factors = keep_factors(seeds, 4, 0.5)
    before = encoder(image, ids, sample_seed=seeds).text
    with torch.no_grad():
        encoder.blocks[1].ffn.pools["text"].w2.weight.mul_(2.0)
    unchanged = torch.isclose(encoder(image, ids, sample_seed=seeds).text, before).all(-1).all(-1)
    assert unchanged.tolist() == (factors[3] == 0).tolist()
    assert 0 < unchanged.sum() < 8
