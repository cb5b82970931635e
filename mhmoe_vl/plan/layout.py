"""How a run is spread over ranks: what rank 0 keeps of every parameter, what FSDP2 gathers, which layouts cannot be."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mhmoe_vl.distributed.expert_parallel import require_divisor
from mhmoe_vl.distributed.fake_world import local_sizes
from mhmoe_vl.distributed.parallel import Strategy
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.tasks.base import Task
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.layout import strategy_of


@dataclass(frozen=True)
class Layout:
    """Ranks and how parameters are spread over them.

    Attributes:
        expert_parallel: ranks that share the experts of a pool; each has ``num_experts / expert_parallel`` of them.
    """

    world_size: int
    strategy: Strategy
    expert_parallel: int
    num_micro_batches: int


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """The layout that a configuration asks for.

    Raises:
        ConfigError: a layout that cannot run, with the numbers and a remedy.
    """
    strategy, degree = strategy_of(config, world_size), config.expert_parallel
    if world_size < 1:
        raise ConfigError(f"--world-size: {world_size} must be positive")
    if strategy == "none" and world_size > 1:
        raise ConfigError(f"strategy: 'none' needs one process, not {world_size}; use ddp or fsdp")
    _check_batch(config, world_size)
    require_divisor(degree, "processes", world_size)
    return Layout(world_size, strategy, degree, config.num_micro_batches)


def _check_batch(config: RunConfig, world_size: int) -> None:
    size, num_micro_batches = config.data.batch_size, config.num_micro_batches
    num_parts = world_size * num_micro_batches
    if size < num_parts:
        raise ConfigError(
            f"data.batch_size: {size} samples are fewer than {world_size} ranks x {num_micro_batches} micro-batches = "
            f"{num_parts}: some ranks would compute nothing; use data.batch_size={num_parts} or more, or at most "
            f"{size // num_micro_batches} ranks"
        )


@dataclass(frozen=True)
class Shards:
    """Sizes in values (not bytes).

    Attributes:
        total: all parameters.
        local: what rank 0 keeps.
        units: what each unit of FSDP2 is padded to when it is gathered, the last (the root) included; empty if
            parameters are not sharded.
        unpadded_units: the same without padding.
        most_padded: the parameter that padding makes largest, with its shape.
        frozen: of ``local``, what is not trained.
    """

    total: int
    local: int
    units: tuple[int, ...]
    unpadded_units: tuple[int, ...]
    most_padded: str
    frozen: int = 0

    @property
    def trained(self) -> int:
        """Of ``local``, what has a gradient and moments."""
        return self.local - self.frozen

    @property
    def padding(self) -> float:
        """What is gathered over what is used; 1 if nothing is gathered."""
        return sum(self.units) / sum(self.unpadded_units) if self.units else 1.0


def shards_of(task: Task, layout: Layout) -> Shards:
    """What rank 0 keeps, by formula.

    FSDP2 cuts every parameter along its first dimension: of d rows, rank 0 of n gets ``ceil(d / n)``, and the gathered
    tensor is padded to n times as much. Experts are stacked along the first dimension, so that a pool of 40 on 1,024
    ranks leaves one whole expert each on 40 of them, and is padded 25-fold; a table of positions ``[1, L, D]`` stays
    whole on rank 0 and is padded 1,024-fold.
    """
    is_sharded = layout.strategy == "fsdp"
    units: defaultdict[str, int] = defaultdict(int)
    unpadded: defaultdict[str, int] = defaultdict(int)
    total = local = frozen = most = 0
    most_padded = ""
    for name, parameter in task.named_parameters():
        size = parameter.numel()
        total += size
        num_rows, num_shards = parameter.shape[0] if parameter.ndim else 1, layout.world_size
        is_spread = layout.expert_parallel > 1 and is_expert(name)
        if is_spread:
            size //= layout.expert_parallel
            num_rows //= layout.expert_parallel
            num_shards //= layout.expert_parallel
        part = math.ceil(num_rows / num_shards) * (size // num_rows) if is_sharded else size
        local += part
        if not parameter.requires_grad:
            frozen += part
        if not is_sharded:
            continue
        unit = ".".join(name.split(".")[:3]) if name.startswith("encoder.blocks.") else "root"
        if is_spread:
            # Each pool is a unit of its own, over the ranks that hold the same experts.
            unit = name.split(".experts.")[0].split(".router.")[0]
        units[unit] += num_shards * part
        unpadded[unit] += size
        if num_shards * part - size > most:
            most, most_padded = num_shards * part - size, f"{name} {list(parameter.shape)}"
    order: Sequence[str] = sorted(units, key=lambda unit: unit == "root")
    gathered, unpadded_units = tuple(units[unit] for unit in order), tuple(unpadded[unit] for unit in order)
    return Shards(total, local, gathered, unpadded_units, most_padded, frozen)


def is_expert(name: str) -> bool:
    """Whether a parameter is a stack of expert weights, or of routers one per head, by its name in the state dict."""
    return ".experts." in name or name.endswith(".router.weight_HDE")


def really_shard(task: Task, layout: Layout) -> int:
    """Values that rank 0 keeps once the training program's own ``parallelize`` has sharded ``task``, on the meta device
    and among ranks that do not exist. ``task`` is changed in place.

    Raises:
        ConfigError: what torch refuses to shard.
    """
    try:
        sizes = local_sizes(
            task,
            strategy=layout.strategy,
            world_size=layout.world_size,
            shard_units=task.encoder.shard_units(),
            expert_parallel=layout.expert_parallel,
        )
    except ValueError as error:
        raise ConfigError(f"strategy: {layout.strategy} with {layout.world_size} ranks: {error}") from None
    return sum(sizes.values())
