"""Choices in the order of their experts.

On a CPU by counting (:mod:`~mhmoe_vl.moe.compiled`), in two passes over the choices; elsewhere, and where nothing is
compiled, torch sorts them.

Shape suffixes: A choices, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhmoe_vl.moe import compiled


def sort_choices(experts_A: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order, slots and counts, int64, of choices of experts 0 to E - 1; E marks those that nobody serves.

    Returns:
        ``order_A``, the numbers of the choices sorted by expert, among equals as they came, those of nobody at the end;
        ``slot_A``, where in ``order_A`` each choice stands; ``counts_E``.
    """
    if compiled.LOOPS is not None and experts_A.device.type == "cpu":
        return _sort(experts_A, num_experts)
    # Narrow integers sort much faster on CPU.
    dtype = torch.int16 if num_experts < 2**15 else torch.int64
    sorted_A, order_A = experts_A.to(dtype).sort(stable=True)
    # Not bincount, which waits for the device to learn its largest value.
    ends_E = torch.searchsorted(sorted_A, torch.arange(num_experts, device=order_A.device, dtype=dtype), right=True)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    slot_A = torch.empty_like(order_A)
    slot_A[order_A] = torch.arange(order_A.numel(), device=order_A.device)
    return order_A, slot_A, counts_E


@torch.library.custom_op("mhmoe_vl::sort_choices", mutates_args=(), device_types="cpu")
def _sort(experts_A: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    assert compiled.LOOPS is not None
    experts_A = experts_A.contiguous()
    order_A, slot_A = torch.empty_like(experts_A), torch.empty_like(experts_A)
    counts_E, ends_E = experts_A.new_empty(num_experts), experts_A.new_empty(num_experts + 1)
    tensors, sizes = [experts_A, order_A, slot_A, counts_E, ends_E], [experts_A.shape[0], num_experts]
    compiled.LOOPS("mhmoe_sort", [*tensors, *sizes], num_values=0)
    return order_A, slot_A, counts_E


@_sort.register_fake
def _(experts_A, num_experts):  # type: ignore[no-untyped-def]
    return torch.empty_like(experts_A), torch.empty_like(experts_A), experts_A.new_empty(num_experts)
