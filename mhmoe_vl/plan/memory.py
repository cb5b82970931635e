"""Memory of the busiest rank, in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from mhmoe_vl.plan.layout import Layout, Shards
from mhmoe_vl.plan.trace import Trace, Tracer, Work
from mhmoe_vl.plan.workload import Sample, heads_of, is_frozen
from mhmoe_vl.tasks.base import Task
from mhmoe_vl.tasks.language_modeling import LanguageModelingTask
from mhmoe_vl.tasks.pretrain import PretrainTask

#: Weights, gradients and gathered parameters are float32; AdamW keeps two moments of each weight.
_FLOAT = 4
_MOMENTS = 8

#: Share of a device's memory that a plan may fill. The rest is for the context, the communication library and the
#: allocator's fragmentation: a judgement, not a measurement.
USABLE = 0.9


@dataclass(frozen=True)
class Memory:
    """Bytes on the busiest rank when the backward pass begins, and a bound of what comes on top.

    Attributes:
        average: moving average of the weights (``optimizer.ema_decay``), laid out as they are.
        tokenizer: weights of the visual tokenizer, whole on every rank.
        gathered: FSDP2: the root's parameters, two blocks' (one is computed, one is fetched), and as many gradients.
        weight_copies: 16-bit copies of weights, whole also where the weights are sharded: autocast keeps them until
            the forward pass of all sources ends, and every source casts the experts anew.
        activations: kept for the backward pass of a micro-batch.
        temporary: most that a single part needs on top of what is kept.
        all_to_all: rows and results of one expert pool, as they are sent and received.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    tokenizer: int
    gathered: int
    weight_copies: int
    activations: int
    temporary: int
    all_to_all: int

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Part:
    """A traced part of the model within the pass of one source; parts of one name share their weights."""

    name: str
    trace: Trace


def parts_of(
    task: Task, tracer: Tracer, samples: Mapping[str, Sample], shares: Mapping[str, int], *, checkpointed: bool
) -> list[Part]:
    """Everything that a micro-batch runs through, pass by pass."""
    parts = []
    for sample, number in passes_of(task, samples, shares):
        encoder = [Part("embeddings", tracer.embeddings(sample, number))]
        encoder += [
            Part(f"block{layer}", tracer.block(layer, sample, number, checkpointed=checkpointed))
            for layer in range(task.config.depth)
        ]
        parts += [_without_backward(part) for part in encoder] if is_frozen(task) else encoder
        if isinstance(task, PretrainTask) and sample.num_image_tokens and not sample.has_codes:
            parts.append(Part("codes", tracer.visual_codes(task.codebook, number)))
        parts += [
            Part(f"head{num}", tracer.head(head, number * num_rows))
            for num, (head, num_rows) in enumerate(heads_of(task, sample))
        ]
    return parts


def passes_of(task: Task, samples: Mapping[str, Sample], shares: Mapping[str, int]) -> list[tuple[Sample, int]]:
    """What goes through the encoder at once, with its number: a source, but of language modeling all together, and of
    retrieval images and texts apart."""
    if isinstance(task, LanguageModelingTask):
        return [(next(iter(samples.values())), sum(shares.values()))]
    return [(one, shares[source]) for source, sample in samples.items() for one in sample.passes]


def _without_backward(part: Part) -> Part:
    """A part that only runs forward, and whose activations are given back at once."""
    return replace(part, trace=replace(part.trace, kept=0, backward=Work()))


def memory_of(
    task: Task, shards: Shards, layout: Layout, parts: list[Part], *, all_to_all: int, keeps_average: bool = False
) -> Memory:
    """Sum of states and of what a micro-batch keeps."""
    states, gathered = states_and_gathered(shards, keeps_average=keeps_average)
    copies: dict[str, int] = {}
    for part in parts:
        copies[part.name] = max(copies.get(part.name, 0), part.trace.weight_copies)
    return Memory(
        **states,
        tokenizer=_tokenizer_bytes(task),
        gathered=gathered,
        weight_copies=sum(copies.values()) + sum(part.trace.expert_copies for part in parts) // layout.expert_parallel,
        activations=sum(part.trace.kept for part in parts),
        temporary=max(part.trace.temporary for part in parts),
        all_to_all=all_to_all,
    )


def _tokenizer_bytes(task: Task) -> int:
    if not isinstance(task, PretrainTask):
        return 0
    return sum(tensor.nbytes for tensor in (*task.codebook.parameters(), *task.codebook.buffers()))


def states_and_gathered(shards: Shards, *, keeps_average: bool = False) -> tuple[dict[str, int], int]:
    """Bytes of weights, gradients, optimizer and average, and of what FSDP2 gathers: no number of samples changes
    these."""
    states = {
        "weights": _FLOAT * shards.local,
        "gradients": _FLOAT * shards.trained,
        "optimizer": _MOMENTS * shards.trained,
        "average": _FLOAT * shards.trained if keeps_average else 0,
    }
    if not shards.units:
        return states, 0
    *blocks, root = shards.units
    return states, 2 * _FLOAT * (root + 2 * max(blocks))


def all_to_all_bytes(task: Task, samples: Mapping[str, Sample], shares: Mapping[str, int], value_bytes: int) -> int:
    """Bytes that all sparse blocks send once per micro-batch: k rows of every token, in one direction.

    MH-MoE sends h sub-tokens of width D / h for every token, so h does not matter.
    """
    config = task.config
    num_sparse = sum(config.is_sparse(layer) for layer in range(config.depth))
    num_tokens = sum(samples[source].num_tokens * number for source, number in shares.items())
    return num_sparse * num_tokens * config.ffn_shape.top_k * config.dim * value_bytes
