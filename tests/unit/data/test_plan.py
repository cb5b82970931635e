"""The order of training data: permutations, shares of sources, and their division over micro-batches and ranks."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_vl.data.plan import MixturePlan, SampleRef, part, permuted, stable_hash
from mhmoe_vl.errors import ConfigError


@st.composite
def plans(draw: st.DrawFn) -> MixturePlan:
    """Plans of one to five sources in which every source gets at least one sample per step."""
    names = [f"source{i}" for i in range(draw(st.integers(1, 5)))]
    weights = {name: draw(st.integers(1, 20)) / 4 for name in names}
    smallest = int(sum(weights.values()) / min(weights.values())) + 1
    return MixturePlan(
        num_items={name: draw(st.integers(1, 60)) for name in names},
        weights=weights,
        batch_size=draw(st.integers(smallest, smallest + 40)),
        seed=draw(st.integers(0, 5)),
    )


def refs_of(plan: MixturePlan, step: int, *, num_micro_batches: int = 1, world_size: int = 1) -> list[SampleRef]:
    return [
        ref
        for index in range(num_micro_batches)
        for rank in range(world_size)
        for refs in plan.micro_batch(
            step, index=index, num_micro_batches=num_micro_batches, rank=rank, world_size=world_size
        ).values()
        for ref in refs
    ]


@given(size=st.integers(1, 600), key=st.text(max_size=8), num_rounds=st.integers(1, 6))
def test_a_permutation_is_a_bijection(size: int, key: str, num_rounds: int) -> None:
    assert sorted(permuted(i, size, key, num_rounds=num_rounds) for i in range(size)) == list(range(size))


def test_a_permutation_of_a_huge_set_needs_no_memory_and_spreads_out() -> None:
    size = 3_000_000_000
    images = [permuted(i, size, "k") for i in range(2000)]
    assert len(set(images)) == 2000
    # Means of ten bins of uniform draws: 200 +- 5 standard deviations.
    bins = Counter(image * 10 // size for image in images)
    assert all(133 < bins[b] < 267 for b in range(10))
    # Neighbours do not stay neighbours.
    assert sum(abs(a - b) < size // 1000 for a, b in pairwise(images)) < 20


def test_a_permutation_does_not_prefer_any_place() -> None:
    """Where item 0 of 7 lands over many keys: 700 +- 5 standard deviations each."""
    places = Counter(permuted(0, 7, f"seed{i}") for i in range(4900))
    assert all(577 < places[place] < 823 for place in range(7))


@given(plan=plans(), step=st.integers(0, 10**6))
def test_consumption_is_exact_and_within_one_of_the_share(plan: MixturePlan, step: int) -> None:
    consumed = plan.num_consumed(step)
    assert sum(consumed.values()) == step * plan.batch_size
    total = sum(Fraction(weight) for weight in plan.weights.values())
    for source, weight in plan.weights.items():
        assert abs(consumed[source] - step * plan.batch_size * Fraction(weight) / total) < 1


@given(plan=plans(), step=st.integers(0, 10**5))
def test_every_step_is_full_and_takes_nothing_back(plan: MixturePlan, step: int) -> None:
    numbers, following = plan.numbers(step), plan.numbers(step + 1)
    assert sum(map(len, numbers.values())) == plan.batch_size
    for source in plan.weights:
        assert numbers[source].start == plan.num_consumed(step)[source]
        assert following[source].start == numbers[source].stop


def test_a_source_too_light_for_every_step_is_refused() -> None:
    """Rounding weights 23:22:7 at one sample per step gives 1, 1, 1 after three steps and 2, 2, 0 after four."""
    weights = {"a": 23, "b": 22, "c": 7}
    with pytest.raises(ConfigError, match=r"data\.train\.a\.weight: 23 is 44\.23% .* one of the 1 samples of a step"):
        MixturePlan(num_items=dict.fromkeys(weights, 10), weights=weights, batch_size=1, seed=0)
    with pytest.raises(ConfigError, match=r"data\.train\.c\.weight"):
        MixturePlan(num_items=dict.fromkeys(weights, 10), weights=weights, batch_size=7, seed=0)
    MixturePlan(num_items=dict.fromkeys(weights, 10), weights=weights, batch_size=8, seed=0)
    # Exactly one per step in decimals, although 0.1 + 0.7 + 0.2 is not 1 in binary.
    weights = {"a": 0.1, "b": 0.7, "c": 0.2}
    plan = MixturePlan(num_items=dict.fromkeys(weights, 10), weights=weights, batch_size=10, seed=0)
    assert plan.num_consumed(3) == {"a": 3, "b": 21, "c": 6}


@settings(max_examples=40)
@given(
    plan=plans(),
    num_micro_batches=st.integers(1, 4),
    world_size=st.sampled_from([1, 2, 3, 4, 8]),
    num_steps=st.integers(1, 8),
)
def test_every_item_once_per_epoch(plan: MixturePlan, num_micro_batches: int, world_size: int, num_steps: int) -> None:
    seen = Counter(
        ref
        for step in range(num_steps)
        for ref in refs_of(plan, step, num_micro_batches=num_micro_batches, world_size=world_size)
    )
    assert set(seen.values()) == {1}
    for source, consumed in plan.num_consumed(num_steps).items():
        size = plan.num_items[source]
        for epoch in range(consumed // size):
            of_epoch = {ref.item for ref in seen if ref.source == source and ref.epoch == epoch}
            assert of_epoch == set(range(size))
        assert sum(ref.source == source for ref in seen) == consumed


@given(
    plan=plans(),
    step=st.integers(0, 1000),
    num_micro_batches=st.integers(1, 4),
    world_size=st.sampled_from([1, 2, 3, 4, 8]),
)
def test_ranks_share_out_the_same_global_micro_batches(
    plan: MixturePlan, step: int, num_micro_batches: int, world_size: int
) -> None:
    for index in range(num_micro_batches):
        whole = plan.micro_batch(step, index=index, num_micro_batches=num_micro_batches)
        parts = [
            plan.micro_batch(step, index=index, num_micro_batches=num_micro_batches, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for source, refs in whole.items():
            assert sorted(ref for of_rank in parts for ref in of_rank[source]) == sorted(refs)
            sizes = [len(of_rank[source]) for of_rank in parts]
            assert max(sizes) - min(sizes) <= 1
        totals = [sum(map(len, of_rank.values())) for of_rank in parts]
        assert max(totals) - min(totals) <= 1


@pytest.mark.parametrize(("world_size", "num_micro_batches"), [(1024, 1), (768, 2), (1536, 1)])
def test_few_samples_of_each_source_give_work_to_many_ranks(world_size: int, num_micro_batches: int) -> None:
    """512 samples of each of three sources, as configs/pretrain/base.yaml has them, and no rank without any."""
    sources = dict.fromkeys(("image", "text", "pair"))
    plan = MixturePlan(sources, dict.fromkeys(sources, 1.0), batch_size=1536, seed=0)
    for index in range(num_micro_batches):
        totals = [
            sum(
                map(
                    len,
                    plan.micro_batch(
                        0, index=index, num_micro_batches=num_micro_batches, rank=rank, world_size=world_size
                    ).values(),
                )
            )
            for rank in range(world_size)
        ]
        num_samples = 1536 // num_micro_batches
        assert sum(totals) == num_samples
        assert min(totals) == num_samples // world_size
        assert max(totals) == -(-num_samples // world_size)


@given(start=st.integers(0, 50), length=st.integers(0, 50), num_parts=st.integers(1, 9))
def test_parts_tile_a_range(start: int, length: int, num_parts: int) -> None:
    items = range(start, start + length)
    parts = [part(items, index, num_parts) for index in range(num_parts)]
    assert [item for piece in parts for item in piece] == list(items)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_order_depends_on_seed_epoch_and_source() -> None:
    sizes = {"a": 50, "b": 50}

    def items(seed: int, steps: range, source: str) -> list[int]:
        plan = MixturePlan(num_items=sizes, weights={"a": 1, "b": 1}, batch_size=20, seed=seed)
        return [ref.item for step in steps for ref in plan.micro_batch(step)[source]]

    first, second = range(5), range(5, 10)
    orders = [items(0, first, "a"), items(1, first, "a"), items(0, second, "a"), items(0, first, "b")]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert items(0, first, "a") == orders[0]


def test_a_batch_larger_than_its_source_spans_epochs() -> None:
    plan = MixturePlan(num_items={"a": 3}, weights={"a": 1}, batch_size=8, seed=0)
    refs = plan.micro_batch(0)["a"]
    assert [ref.epoch for ref in refs] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(ref.item for ref in refs[:3]) == sorted(ref.item for ref in refs[3:6]) == [0, 1, 2]
    assert [ref.epoch for ref in plan.micro_batch(1)["a"]] == [2, 3, 3, 3, 4, 4, 4, 5]


def test_the_order_never_changes_silently() -> None:
    """Frozen values: a change here breaks every run that resumes, and must be a decision."""
    plan = MixturePlan(num_items={"image": 10, "pair": 5, "text": 1000}, weights=GOLDEN_WEIGHTS, batch_size=7, seed=42)
    assert {step: plan.num_consumed(step) for step in (1, 2, 1000)} == GOLDEN_CONSUMED
    assert {name: [(r.epoch, r.item) for r in refs] for name, refs in plan.micro_batch(3).items()} == GOLDEN_STEP
    assert stable_hash("mhmoe_vl") == GOLDEN_HASH


GOLDEN_WEIGHTS = {"image": 1.0, "pair": 2.0, "text": 1.5}
GOLDEN_CONSUMED = {
    1: {"image": 2, "pair": 3, "text": 2},
    2: {"image": 3, "pair": 6, "text": 5},
    1000: {"image": 1556, "pair": 3111, "text": 2333},
}
GOLDEN_STEP = {"image": [(0, 3)], "pair": [(1, 3), (2, 4), (2, 2), (2, 0)], "text": [(0, 458), (0, 539)]}
GOLDEN_HASH = 8608656580573926529
