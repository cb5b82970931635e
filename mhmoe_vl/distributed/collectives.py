"""Collectives that are the identity in a world of one, so that callers need no branch.

Unless it says otherwise, a function here is collective: every rank calls it, in the same order. Objects travel as JSON,
never as pickles: tuples come back as lists and keys as strings, in a world of one as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_vl.errors import UserError

ItemT = TypeVar("ItemT")


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks of ``tensor`` (same shape and dtype everywhere), as a new tensor without gradient."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The element-wise maximum over ranks, as a new tensor without gradient."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def any_rank(flag: bool) -> bool:
    """True on every rank if ``flag`` is true on at least one."""
    return bool(all_reduce_max(torch.tensor(int(flag))).item())


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all ranks, in rank order, and the number of this rank's first one among them.

    Differentiable: what the losses of all ranks make of a row adds up to the gradient on the rank that it came from.
    The backward pass is collective too, so every rank must come to it, also one without rows.

    Args:
        rows: ``[N, ...]``; N may differ between ranks and may be 0.
    """
    if not dist.is_initialized():
        return rows, 0
    # Ordered by rank, since an entry that is not this rank's own is 0.
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    sizes[dist.get_rank()] = rows.shape[0]
    of_ranks = all_reduce_sum(sizes).tolist()
    return _GatherRows.apply(rows, of_ranks), sum(of_ranks[: dist.get_rank()])


def gather_objects(value: Any) -> list[Any]:
    """The JSON-able ``value`` of every rank, in rank order, on every rank."""
    payload = _encode(value)
    if not dist.is_initialized():
        return [_decode(payload)]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([payload.numel()]))
    # Gloo refuses tensors of different lengths, so all are padded to the longest.
    padded = payload.new_zeros(int(max(sizes)))
    padded[: payload.numel()] = payload
    payloads = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(payloads, padded)
    return [_decode(received[: int(size)]) for received, size in zip(payloads, sizes, strict=True)]


def broadcast_object(value: Any) -> Any:
    """The JSON-able ``value`` of rank 0; what other ranks pass is ignored."""
    if not dist.is_initialized():
        return _decode(_encode(value))
    payload = _encode(value if dist.get_rank() == 0 else None)
    size = torch.tensor([payload.numel()])
    dist.broadcast(size, src=0)
    if dist.get_rank() != 0:
        payload = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(payload, src=0)
    return _decode(payload)


def barrier() -> None:
    """Return once every rank has arrived."""
    if dist.is_initialized():
        dist.barrier()


def share_of_rank(items: Sequence[ItemT]) -> Sequence[ItemT]:
    """This rank's items when all ranks deal them out in turn. Not collective."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


@contextmanager
def fail_together(error_type: type[UserError], what: str | None = None) -> Iterator[None]:
    """Run the body on every rank; if it raises on any of them, raise ``error_type`` on all.

    Without this the ranks that did not fail would wait in their next collective until it times out. The body may
    hold a collective only if that fails on all ranks alike.

    Args:
        what: begins the message. Without it, the ranks that failed raise their own error as it is, and the others one
            of the first one's kind, for its exit code.
    """
    problem = None
    cause: Exception | None = None
    try:
        yield
    except Exception as error:
        cause = error
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        problem = [" ".join(reason.split()), type(error).__name__]
    reported = gather_objects(problem)
    problems = [of_rank for of_rank in reported if of_rank is not None]
    if not problems:
        return
    if what is None and cause is not None:
        if isinstance(cause, UserError):
            # Rank 0 prints its own error, or else everybody's.
            cause.is_shared = reported[0] in (None, problem)
        raise cause
    if what is None:
        kinds = {kind.__name__: kind for kind in UserError.__subclasses__()}
        error_type = kinds.get(problems[0][1], error_type)
    prefix = "" if what is None else f"{what}: "
    shared = error_type(prefix + "; ".join(dict.fromkeys(message for message, _ in problems)))
    shared.is_shared = True
    raise shared from cause


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    result = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(result, op=operation)
    return result


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # Gloo refuses tensors of different lengths, so all are padded to the longest.
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded)
        return torch.cat([of_rank[:size] for of_rank, size in zip(received, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Gloo has no reduce-scatter: every rank adds up all rows and keeps its own.
        return all_reduce_sum(grad.contiguous()).split(ctx.sizes)[dist.get_rank()], None


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value), "utf-8"), dtype=torch.uint8)


def _decode(payload: Tensor) -> Any:
    return json.loads(bytes(payload.tolist()))
