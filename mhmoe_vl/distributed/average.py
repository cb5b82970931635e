"""A moving average of the weights, kept beside them and laid out as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mhmoe_vl.distributed.parallel import reshard
from mhmoe_vl.distributed.weights import tensor_names


class WeightAverage:
    """Exponential moving average of the trained parameters, ``average <- decay * average + (1 - decay) * parameter``.

    It begins as a copy of the parameters. Every rank averages what it holds, shards of FSDP2 and spread experts too, so
    nothing is sent. Frozen parameters and buffers (selection bias, codebook) have no average: whoever uses it gets
    them as they are.

    Args:
        module: from :func:`~mhmoe_vl.distributed.parallel.parallelize`; its parameters are float32, and so is this.
        decay: in (0, 1); the average remembers about ``1 / (1 - decay)`` updates.

    Attributes:
        tensors: the averages under the names that checkpoints and exports have.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module = module
        self._average = get_ema_multi_avg_fn(decay)
        self._parameters = {names[0]: tensor for tensor, names in tensor_names(module).items() if tensor.requires_grad}
        self.tensors = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def update(self) -> None:
        """Take in the parameters as they are now. Once after every optimizer step that was not skipped."""
        averages, parameters = zip(*self._pairs(), strict=True)
        self._average(averages, parameters, 0)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the module has the averages for parameters; afterwards both are what they were, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # After a forward pass without a backward pass FSDP2 leaves its root gathered: a copy of what changes here.
        reshard(self._module)
        for average, parameter in self._pairs():
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """What this rank holds of each average and parameter."""
        return [(_local(average), _local(self._parameters[name])) for name, average in self.tensors.items()]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
