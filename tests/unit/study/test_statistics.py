"""Statistics on numbers whose truth is known, by hand or by simulation."""

from __future__ import annotations

import math
import random

import pytest

from mhmoe_vl.study.statistics import (
    holm,
    noise_floor,
    paired_difference,
    residual_scatter,
    rounded,
    summarize,
    verdict,
)


def test_a_hand_worked_pair() -> None:
    """Differences 1, 2, 3: mean 2, standard deviation 1; Student's 97.5 % quantile at 2 degrees is 4.3027."""
    difference = paired_difference({0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 1: 20.0, 2: 30.0, 9: 5.0})
    assert difference is not None
    assert difference.n == 3
    assert difference.mean == pytest.approx(2.0)
    assert difference.standard_error == pytest.approx(1 / math.sqrt(3))
    assert difference.margin == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    # t = 3.4641 at 2 degrees: p = 1 - t / sqrt(t^2 + 2).
    assert difference.p == pytest.approx(1 - 3.4641016 / math.sqrt(14), rel=1e-6)
    assert difference.interval == pytest.approx((-0.484138, 4.484138), rel=1e-4)


def test_pairs_take_out_what_a_seed_does_to_both() -> None:
    of_seed = {0: 1.0, 1: 5.0, 2: -3.0}
    difference = paired_difference({s: v + 0.5 + 0.01 * s for s, v in of_seed.items()}, of_seed)
    assert difference is not None
    assert difference.p is not None
    assert difference.p < 1e-3
    unpaired = noise_floor([list(of_seed.values())] * 2)
    assert unpaired is not None
    assert unpaired.detectable > difference.mean


def test_few_seeds() -> None:
    assert paired_difference({0: 1.0}, {1: 2.0}) is None
    alone = paired_difference({0: 1.0}, {0: 2.0})
    assert alone is not None
    assert (alone.n, alone.mean, alone.margin, alone.p) == (1, -1.0, None, None)
    assert "one seed says nothing" in verdict("a", "b", alone, None, unit="nats", confidence=0.95)
    assert noise_floor([[1.0], [2.0]]) is None
    assert summarize([3.0]).standard_error is None


def test_identical_arms() -> None:
    same = paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert same is not None
    assert same.is_identical
    assert same.p == 1.0
    assert verdict("a", "b", same, 1.0, unit="nats", confidence=0.95) == "a and b: identical at 2 seeds"


def test_holm_by_hand() -> None:
    """Smallest times 4, then times 3, 2, 1, never falling: 0.01 -> 0.04, 0.02 -> 0.06, 0.03 -> 0.06, 0.5 -> 0.5."""
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_noise_floor_by_hand() -> None:
    """Variances 2 and 8 with one degree each: pooled 5. Student's quantile at 2 degrees, two means of 2 seeds."""
    noise = noise_floor([[0.0, 2.0], [10.0, 14.0], [7.0]])
    assert noise is not None
    assert noise.sd == pytest.approx(math.sqrt(5))
    assert noise.degrees == 2
    assert noise.detectable == pytest.approx(4.302653 * math.sqrt(5), rel=1e-5)


def test_residual_scatter_by_hand() -> None:
    """Arms 0 0 / 1 1 / 2 5 over two seeds: means 0, 1, 3.5 and 1, 2; residuals +-0.5, +-0.5, -+1 at two degrees."""
    scatter = residual_scatter([{0: 0.0, 1: 0.0}, {0: 1.0, 1: 1.0}, {0: 2.0, 1: 5.0, 9: 100.0}])
    assert scatter is not None
    assert scatter.degrees == 2
    assert scatter.sd == pytest.approx(math.sqrt((4 * 0.25 + 2 * 1.0) / 2))
    assert residual_scatter([{0: 1.0, 1: 2.0}]) is None
    assert residual_scatter([{0: 1.0}, {0: 2.0}]) is None
    assert residual_scatter([]) is None


def test_pooling_two_arms_changes_nothing() -> None:
    arm, reference = {0: 1.0, 1: 1.3, 2: 0.9}, {0: 2.0, 1: 2.1, 2: 1.95}
    own = paired_difference(arm, reference)
    pooled = paired_difference(arm, reference, scatter=residual_scatter([arm, reference]))
    assert own is not None
    assert pooled is not None
    for field in ("n", "mean", "standard_error", "margin", "p"):
        assert getattr(pooled, field) == pytest.approx(getattr(own, field))
    same = paired_difference(arm, arm, scatter=residual_scatter([arm, reference, arm]))
    assert same is not None
    assert same.is_identical
    assert same.p == 1.0


def test_pooled_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Nine arms, three seeds, 16 degrees of freedom: 95 % +- 1 % (three standard errors of the simulation), and
    narrower than three pairs alone."""
    draws = random.Random(1)
    num_studies, num_covered, wider = 4000, 0, 0
    for _ in range(num_studies):
        of_seed = [draws.gauss(0, 5) for _ in range(3)]
        arms = [{s: number + base + draws.gauss(0, 1) for s, base in enumerate(of_seed)} for number in range(9)]
        pooled = paired_difference(arms[1], arms[0], scatter=residual_scatter(arms))
        own = paired_difference(arms[1], arms[0])
        assert pooled is not None
        assert own is not None
        assert pooled.interval is not None
        num_covered += pooled.interval[0] <= 1 <= pooled.interval[1]
        wider += (pooled.margin or 0) > (own.margin or 0)
    assert num_covered / num_studies == pytest.approx(0.95, abs=0.0104)
    assert wider / num_studies < 0.3


def test_verdicts_in_words() -> None:
    lower = paired_difference({0: 1.0, 1: 1.1, 2: 0.9}, {0: 2.0, 1: 2.08, 2: 1.92})
    assert lower is not None
    text = verdict("mhmoe", "smoe", lower, 0.01, unit="nats", confidence=0.95)
    assert text == "mhmoe lower than smoe by 1.000 ± 0.050 nats"
    # The same interval does not count where the correction for several comparisons takes it away.
    text = verdict("mhmoe", "smoe", lower, 0.06, unit="nats", confidence=0.95)
    assert text == "mhmoe and smoe: no difference at 3 seeds (-1.000 ± 0.050 nats)"


@pytest.mark.parametrize(
    ("value", "margin", "text"), [(0.05234, 0.0131, "0.052"), (12.3, 2.6, "12.3"), (123.4, 26, "123")]
)
def test_rounding_follows_the_margin(value: float, margin: float, text: str) -> None:
    assert rounded(value, margin) == text


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_the_interval_covers_the_truth_as_often_as_it_says(num_seeds: int) -> None:
    """4,000 studies with a known difference: 95 % +- 1 % (three standard errors of the simulation)."""
    draws = random.Random(num_seeds)
    truth, num_studies, num_covered = 0.3, 4000, 0
    for _ in range(num_studies):
        of_seed = [draws.gauss(0, 5) for _ in range(num_seeds)]
        arm = {s: base + truth + draws.gauss(0, 1) for s, base in enumerate(of_seed)}
        reference = {s: base + draws.gauss(0, 1) for s, base in enumerate(of_seed)}
        difference = paired_difference(arm, reference)
        assert difference is not None
        assert difference.interval is not None
        num_covered += difference.interval[0] <= truth <= difference.interval[1]
    assert num_covered / num_studies == pytest.approx(0.95, abs=0.0104)


def test_studies_without_any_difference_find_one_as_seldom_as_they_say() -> None:
    """Six comparisons per study, three seeds: uncorrected, about a fifth of all studies would find a difference."""
    draws = random.Random(0)
    num_studies, num_wrong, num_wrong_uncorrected = 2000, 0, 0
    for _ in range(num_studies):
        reference = {seed: draws.gauss(0, 1) for seed in range(3)}
        p_values = []
        for _ in range(6):
            difference = paired_difference({seed: draws.gauss(0, 1) for seed in range(3)}, reference)
            assert difference is not None
            assert difference.p is not None
            p_values.append(difference.p)
        num_wrong += min(holm(p_values)) < 0.05
        num_wrong_uncorrected += min(p_values) < 0.05
    assert num_wrong / num_studies <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / num_studies)
    assert num_wrong_uncorrected / num_studies > 0.12
