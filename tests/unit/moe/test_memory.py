"""Recycled memory: nothing that somebody holds is handed out again, and what nobody needs goes back to the system."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhmoe_vl.moe.memory import SMALLEST, RecycledMemory

NUM = SMALLEST // 4  # float32 values in the smallest piece that is recycled


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    memory = RecycledMemory()
    first = memory.empty(NUM, 2, dtype=torch.float32)
    address = first.data_ptr()
    view = first[5:7].t()
    del first
    other = memory.empty(NUM, 2, dtype=torch.float32)
    assert other.data_ptr() != address, "a view still held it"
    del view
    again = memory.empty(2 * NUM, dtype=torch.float32)
    assert again.data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_are_ordinary(dtype: torch.dtype) -> None:
    x = RecycledMemory().empty(3, NUM, dtype=dtype)
    assert (x.shape, x.dtype, x.device.type, x.is_contiguous()) == ((3, NUM), dtype, "cpu", True)
    assert x.data_ptr() % 64 == 0
    x.fill_(2)
    assert torch.equal(x.clone(), torch.full((3, NUM), 2, dtype=dtype))


def test_small_tensors_come_from_torch() -> None:
    memory = RecycledMemory()
    memory.empty(NUM - 1, dtype=torch.float32)
    memory.empty(0, 5, dtype=torch.float32)
    assert memory.num_idle_bytes == 0


def test_no_more_is_kept_than_is_in_use_when_another_size_is_asked_for() -> None:
    memory = RecycledMemory()
    held = [memory.empty(NUM, dtype=torch.float32) for _ in range(5)]
    held.clear()
    assert memory.num_idle_bytes == 5 * SMALLEST
    held.append(memory.empty(2 * NUM, dtype=torch.float32))
    assert memory.num_idle_bytes == 2 * SMALLEST
    held.append(memory.empty(NUM, dtype=torch.float32))
    assert memory.num_idle_bytes == SMALLEST


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 5)), max_size=40))
def test_live_tensors_never_share_memory(steps: list[tuple[int, int]]) -> None:
    """Any order of taking and dropping: every tensor keeps what was written into it."""
    memory = RecycledMemory()
    live: list[tuple[Tensor, int]] = []
    for number, (size, drop) in enumerate(steps):
        tensor = memory.empty(size * NUM, dtype=torch.float32)
        tensor[[0, -1]] = float(number)
        live.append((tensor, number))
        if drop < len(live):
            live.pop(drop)
        assert all(bool((t[[0, -1]] == n).all()) for t, n in live)


def test_threads_that_take_and_drop() -> None:
    memory = RecycledMemory()
    problems: list[int] = []

    def work(name: int) -> None:
        for _ in range(200):
            tensor = memory.empty(NUM, dtype=torch.float32)
            tensor[:64] = name
            if not bool((tensor[:64] == name).all()):
                problems.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_tensors_in_cycles_return_when_they_are_collected() -> None:
    memory = RecycledMemory()
    cycle: list[object] = [memory.empty(NUM, dtype=torch.float32)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert memory.num_idle_bytes == SMALLEST
