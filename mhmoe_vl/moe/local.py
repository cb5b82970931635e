"""Parameters that may be spread over ranks."""

from __future__ import annotations

from torch import Tensor


def local_part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: a slice of its first dimension where experts are spread over ranks, else all
    of it. Differentiable.

    Found by its method, because a DTensor's class lives in ``torch.distributed``, which this package does without.
    """
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
