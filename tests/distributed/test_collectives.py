"""Collectives over several ranks, and as the identity in one process."""

from __future__ import annotations

import pytest
import torch

from mhmoe_vl.distributed.collectives import (
    all_reduce_max,
    all_reduce_sum,
    any_rank,
    barrier,
    broadcast_object,
    fail_together,
    gather_objects,
    share_of_rank,
)
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import DataError, OutputError, UserError
from tests.distributed.fork_harness import RankError, run_ranks


def test_reductions() -> None:
    def reduce(world: World) -> list[list[float]]:
        own = torch.tensor([1.0 + world.rank, -float(world.rank)], requires_grad=True)
        total, largest = all_reduce_sum(own), all_reduce_max(own)
        assert not total.requires_grad
        assert own.tolist() == [1.0 + world.rank, -float(world.rank)]
        barrier()
        return [total.tolist(), largest.tolist()]

    assert run_ranks(reduce, 3) == [[[6.0, -3.0], [3.0, 0.0]]] * 3


@pytest.mark.parametrize("raising", [[], [0], [1, 2]])
def test_any_rank(raising: list[int]) -> None:
    assert run_ranks(lambda world: any_rank(world.rank in raising), 3) == [bool(raising)] * 3


def test_objects_of_different_length_travel() -> None:
    def exchange(world: World) -> tuple[list[object], object]:
        own = [None, {"ä": [1.5, "x" * 300]}, ""][world.rank]
        return gather_objects(own), broadcast_object({"from": world.rank, "snow": "\u2603"})

    expected = ([None, {"ä": [1.5, "x" * 300]}, ""], {"from": 0, "snow": "\u2603"})
    assert run_ranks(exchange, 3) == [expected] * 3


def test_shares_cover_every_item_once() -> None:
    shares = run_ranks(lambda _: list(share_of_rank(range(7))), 3)
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_failure_on_one_rank_is_raised_on_all() -> None:
    own_errors = [None, DataError("row 7\nis empty"), OSError("disk full")]

    @fail_together(OutputError, "report.json")
    def write(error: Exception | None) -> None:
        if error is not None:
            raise error

    def body(world: World) -> str:
        with pytest.raises(OutputError) as caught:
            write(own_errors[world.rank])
        assert (caught.value.__cause__ is None) == (world.rank == 0)
        return str(caught.value)

    assert run_ranks(body, 3) == ["report.json: row 7 is empty; OSError: disk full"] * 3


@pytest.mark.parametrize(
    ("messages", "raised", "printed_by"),
    [
        # (own message or None) per rank; what each rank raises; which ranks must print.
        (["a", "a"], ["a", "a"], [0]),
        ([None, "b"], ["b", "b"], [0]),
        (["a", None], ["a", "a"], [0]),
        (["a", "b"], ["a", "b"], [0, 1]),
    ],
)
def test_a_shared_failure_has_one_kind_and_somebody_to_print_it(
    messages: list[str | None], raised: list[str], printed_by: list[int]
) -> None:
    @fail_together(UserError)
    def read(message: str | None) -> None:
        if message is not None:
            raise DataError(message)

    def body(world: World) -> tuple[str, int, bool]:
        with pytest.raises(UserError) as caught:
            read(messages[world.rank])
        return str(caught.value), caught.value.exit_code, world.rank == 0 or not caught.value.is_shared

    found = run_ranks(body, 2)
    assert [message for message, _, _ in found] == raised
    assert {code for _, code, _ in found} == {DataError.exit_code}
    assert [rank for rank, (_, _, prints) in enumerate(found) if prints] == printed_by


def test_one_process_needs_no_group() -> None:
    own = torch.tensor([1.0, 2.0])
    total = all_reduce_sum(own)
    assert total.tolist() == [1.0, 2.0]
    assert total is not own
    assert any_rank(True)
    assert not any_rank(False)
    # As over the wire: what holds in one process holds in several.
    assert gather_objects({"a": (1, 2)}) == [{"a": [1, 2]}]
    assert broadcast_object((1, 2)) == [1, 2]
    assert share_of_rank([1, 2]) == [1, 2]
    barrier()
    with fail_together(OutputError, "nothing"):
        pass
    with pytest.raises(TypeError):
        gather_objects(object())


def test_the_harness_reports_what_ranks_raise() -> None:
    def broken(world: World) -> None:
        if world.rank == 1:
            raise ValueError("wrong on rank one")

    with pytest.raises(RankError, match=r"(?s)rank 1: .*wrong on rank one"):
        run_ranks(broken, 2)
