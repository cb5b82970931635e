"""Data parallelism with summed gradients: replicated (DDP) or sharded (FSDP2) parameters.

The loss of a rank is a sum over its samples divided by a count over *all* ranks and micro-batches, so gradients add up
over ranks; nothing is averaged. The wrapped module is called once per backward, but may call its parts several times
in that forward (image batch, text batch, pairs).

Every rank must run every part in every micro-batch, with zero rows if it has none. DDP would survive a skipped part;
FSDP2 would pair the reduction of one part with that of another and compute wrong gradients without an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mhmoe_vl.distributed.collectives import all_reduce_sum
from mhmoe_vl.distributed.expert_parallel import require_divisor, spread_experts
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import ConfigError

Strategy = Literal["none", "ddp", "fsdp"]


def parallelize(
    module: nn.Module,
    *,
    strategy: Strategy,
    world: World,
    shard_units: Sequence[nn.Module] = (),
    expert_parallel: int = 1,
) -> nn.Module:
    """Move ``module`` to the device of this rank and make its gradients sums over all ranks.

    All ranks start from the parameters and buffers of rank 0. Without a process group the module is only moved. Build
    the optimizer from the result: FSDP2 replaces the parameters.

    Args:
        module: is wrapped by ``ddp`` and changed in place by ``fsdp``; :func:`unwrap` finds it again in both.
        strategy: ``ddp`` keeps all parameters on each rank; ``fsdp`` keeps a shard of each and gathers them one unit at
            a time; ``none`` is for one process.
        shard_units: submodules that FSDP2 gathers and frees as one (the encoder blocks); the rest forms one more unit.
        expert_parallel: number of ranks over which the experts of each layer are spread; ``fsdp`` only.

    Raises:
        ConfigError: ``none`` with several processes, which would train as many models; ``expert_parallel`` with another
            strategy, or of a number that does not divide processes and experts.
    """
    if strategy not in ("none", "ddp", "fsdp"):
        raise ConfigError(f"parallel strategy: '{strategy}' must be none, ddp or fsdp")
    if strategy == "none" and world.world_size > 1:
        raise ConfigError(f"parallel strategy: 'none' needs one process, not {world.world_size}; use ddp or fsdp")
    if expert_parallel > 1 and strategy != "fsdp":
        raise ConfigError(f"expert_parallel: {expert_parallel} needs strategy=fsdp, not '{strategy}'")
    require_divisor(expert_parallel, "processes", world.world_size)
    module.to(world.device)
    if strategy == "none" or not dist.is_initialized():
        return module
    if strategy == "ddp":
        return _replicate(module, world)
    return _shard(module, world, shard_units, expert_parallel)


def unwrap(module: nn.Module) -> nn.Module:
    """The module that was given to :func:`parallelize`."""
    return module.module if isinstance(module, DistributedDataParallel) else module


@contextmanager
def accumulating(module: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Around forward and backward of one micro-batch; gradients are complete after the last one.

    DDP reduces once, in the last micro-batch. FSDP2 reduces in each: that keeps gradients sharded (memory), and a part
    that no rank runs in the last micro-batch cannot lose what it had accumulated before.
    """
    defer = isinstance(module, DistributedDataParallel) and not is_last
    with module.no_sync() if defer else nullcontext():  # type: ignore[operator]
        yield
    # Activation checkpointing runs the experts of a pool again even if the loss does not depend on them, and nothing
    # then puts away what was gathered: the module would show parameters without gradients.
    reshard(module)


def reshard(module: nn.Module) -> None:
    """Put away what FSDP2 has gathered of the parameters, if anything is; the shards are what is left."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def clip_grad_norm(module_or_parameters: nn.Module | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients so that their global 2-norm is at most ``max_norm``; return the norm before, a scalar.

    Sharded and replicated gradients may be mixed, and shards of several meshes, as long as each element of a sharded
    gradient is on one rank only. If the norm is not finite the gradients are left as they are: one NaN would otherwise
    reach all of them, and the caller decides by the returned norm whether to skip the step.
    Collective if any gradient is sharded.
    """
    parameters = (
        module_or_parameters.parameters() if isinstance(module_or_parameters, nn.Module) else module_or_parameters
    )
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    replicas = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norm = nn.utils.get_total_norm(replicas)
    if shards:
        square = all_reduce_sum(nn.utils.get_total_norm(shards).square())
        norm = (square + norm.to(square.device).square()).sqrt()
    scale = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
    for gradient in (*shards, *replicas):
        gradient.mul_(scale.to(gradient.device))
    return norm


def _replicate(module: nn.Module, world: World) -> DistributedDataParallel:
    replica = DistributedDataParallel(
        module,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        # Also keeps the gradient buckets of the first step for good, so that a resumed run adds in the same order.
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )
    replica.register_comm_hook(None, _sum_over_ranks)
    return replica


def _sum_over_ranks(_, bucket):
    """In place of DDP's average; dividing and multiplying again would not be exact.

    ``(state, GradBucket) -> Future[Tensor]``, unannotated because DDP refuses annotations that are strings.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _shard(module: nn.Module, world: World, shard_units: Sequence[nn.Module], expert_parallel: int) -> nn.Module:
    # DDP does this by itself.
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, src=0)
    if expert_parallel > 1:
        spread_experts(module, degree=expert_parallel, world=world)
    # Blocks also return keys and values, which are views; nobody writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(world.mesh_device, (world.world_size,))
    for unit in shard_units:
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            # Gloo has no scaled sum, by which FSDP2 would divide.
            part.set_force_sum_reduction_for_comms(True)
            # Not in every supported torch. Covers a parameter that only some ranks use inside one unit.
            if hasattr(part, "set_reduce_scatter_unused_params"):
                part.set_reduce_scatter_unused_params(True)
    return module
