"""Weights of a dense run as the start of a sparse one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhmoe_vl.convert.starting_point import refuse_existing, write_starting_point
from mhmoe_vl.data.loader import train_loader
from mhmoe_vl.data.prepare.progress import show_progress
from mhmoe_vl.distributed.weights import tensor_names
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.encoder import EncoderOutput
from mhmoe_vl.models.upcycling import copy_into_experts, fit, missed_share, start_linear
from mhmoe_vl.moe import FeedForward, MoE, MultiHeadMoE
from mhmoe_vl.tasks.base import MicroBatch, Task, TaskOutput
from mhmoe_vl.train.build import build_dataset, build_plan, build_task, initial_weights
from mhmoe_vl.train.config import RunConfig

_KINDS = ("smoe", "xmoe", "mhmoe", "mhmoe_head_parallel")
#: Share of the tokens that closeness is measured on, and that nothing is fitted to.
_HELD_OUT = 0.25


@dataclass(frozen=True)
class Closeness:
    """How near the sparse model starts.

    Attributes:
        pools: by name (``block1/vision``), the share of the variance of the dense layer's output that its successor
            misses, on tokens that it was not fitted to.
        hidden: the same share of the encoder's final states, all layers together.
        figures: of the task, dense and sparse.
    """

    pools: dict[str, float]
    hidden: float
    figures: dict[str, tuple[float, float]]


def upcycle(run: Path, config: RunConfig, out: Path, *, num_samples: int, fit_steps: int) -> Closeness:
    """Write ``out``, from which the sparse run ``config`` can start.

    Args:
        run: of a dense model, or what ``from-beit3`` wrote; its model must be that of ``config`` but for ``ffn``.
        config: the run to come; its training data show what inputs the layers have.
        num_samples: of these data that are looked at.
        fit_steps: for each layer that cannot be copied.

    Raises:
        UserError: models that do not fit, or data that cannot be read.
    """
    refuse_existing(out)
    _require_upcyclable(config)
    dense = build_task(config.model_copy(update={"model": config.model.model_copy(update={"ffn": "dense"})}))
    taken = initial_weights(dense, str(run))
    dense.load_state_dict(taken, strict=False)
    sparse = build_task(config)
    known = sparse.state_dict()
    common = {name: tensor for name, tensor in dense.state_dict().items() if name in known}
    sparse.load_state_dict(common, strict=False)
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    dense.to(device).eval()
    sparse.to(device).eval()
    micro_batch = {name: batch.to(device) for name, batch in _samples(config, num_samples).items()}
    inputs = _inputs_of_layers(dense, micro_batch)
    pools = {}
    layers = list(_replaced(dense, sparse))
    for name, before, after in show_progress(layers, label="replacing layers", amount=lambda _: 1, total=len(layers)):
        seen_ND, held_out_ND = _split(inputs[before], name)
        try:
            if isinstance(after, MoE):
                copy_into_experts(before, after, seen_ND)
            else:
                start_linear(before, after, seen_ND)
                fit(before, after, seen_ND, num_steps=fit_steps, seed=config.seed)
        except ValueError as error:
            raise ConfigError(f"model.moe: {error}") from None
        pools[name] = missed_share(before, after, held_out_ND)
    closeness = _compare(dense, sparse, micro_batch, pools)
    weights, tied = {}, {}
    for tensor, names in tensor_names(sparse).items():
        if any(name.startswith("encoder.") or name in taken for name in names):
            weights[names[0]] = tensor.detach().cpu().contiguous()
            tied.update(dict.fromkeys(names[1:], names[0]))
    write_starting_point(out, config.model, weights, tied=tied)
    return closeness


def describe(closeness: Closeness, config: RunConfig, out: Path) -> str:
    """Lines for people."""
    lines = [f"{name}: misses {missed:.2%} of the dense layer" for name, missed in closeness.pools.items()]
    lines.append(f"final hidden states: miss {closeness.hidden:.2%}")
    lines += [f"{name}: {dense:.4f} dense, {sparse:.4f} now" for name, (dense, sparse) in closeness.figures.items()]
    if config.model.moe.renormalize and config.model.ffn_shape.top_k == 1:
        lines.append("note: with one choice and renormalize, only the balance loss trains the router")
    return "\n".join([*lines, f"{out}: start from it with init_from={out}"]) + "\n"


def _require_upcyclable(config: RunConfig) -> None:
    """Refuse what cannot start from a dense model.

    Raises:
        ConfigError: naming the setting.
    """
    model = config.model
    if model.ffn not in _KINDS:
        raise ConfigError(f"model.ffn: '{model.ffn}' cannot start from a dense model; use {', '.join(_KINDS)}")
    if model.moe.experts == "shared":
        raise ConfigError(
            "model.moe.experts: one pool for both modalities cannot start as two dense layers; use per_modality"
        )


def _samples(config: RunConfig, num_samples: int) -> MicroBatch:
    """The first samples of the training data, all in one micro-batch."""
    data = config.data.model_copy(update={"batch_size": num_samples, "num_workers": 0})
    config = config.model_copy(update={"data": data})
    dataset = build_dataset(config, config.data.train, training=True)
    plan = build_plan(config, dataset)
    loader = train_loader(
        dataset, plan, steps=range(1), num_micro_batches=1, rank=0, world_size=1, num_workers=0, pin_memory=False
    )
    return next(iter(loader))


def _replaced(dense: Task, sparse: Task) -> Iterator[tuple[str, FeedForward, MoE | MultiHeadMoE]]:
    """Name, dense layer, and what takes its place."""
    for layer, (before, after) in enumerate(zip(dense.encoder.blocks, sparse.encoder.blocks, strict=True)):
        for pool, module in after.ffn.pools.items():
            if isinstance(module, MoE | MultiHeadMoE):
                old = before.ffn.pools[pool]
                assert isinstance(old, FeedForward)
                yield f"block{layer}/{pool}", old, module


def _inputs_of_layers(dense: Task, micro_batch: MicroBatch) -> dict[nn.Module, Tensor]:
    """Tokens ``[N, D]`` that each dense layer works on, without padding."""
    parts: dict[nn.Module, list[Tensor]] = defaultdict(list)

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x, valid = arguments
        parts[module].append(x.flatten(0, -2) if valid is None else x[valid])

    layers = [module for block in dense.encoder.blocks for module in block.ffn.pools.values()]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    _run(dense, micro_batch)
    for handle in handles:
        handle.remove()
    return {module: torch.cat(rows) for module, rows in parts.items()}


def _split(inputs_ND: Tensor, name: str) -> tuple[Tensor, Tensor]:
    cut = len(inputs_ND) - max(1, round(_HELD_OUT * len(inputs_ND)))
    if cut < 2:
        raise ConfigError(f"{name}: {len(inputs_ND)} tokens reach it, too few; raise --num-samples")
    return inputs_ND[:cut], inputs_ND[cut:]


def _compare(dense: Task, sparse: Task, micro_batch: MicroBatch, pools: dict[str, float]) -> Closeness:
    outputs, states = [], []
    for task in (dense, sparse):
        with _final_states(task) as of_task:
            outputs.append(_run(task, micro_batch))
        states.append(torch.cat(of_task))
    before, after = states
    figures = {
        name: tuple(float(output.sums[name]) / max(1.0, float(output.counts[name])) for output in outputs)
        for name in outputs[0].sums
    }
    missed = (after - before).square().sum() / (before - before.mean(0)).square().sum()
    return Closeness(pools, float(missed), figures)  # type: ignore[arg-type]


@contextmanager
def _final_states(task: Task) -> Iterator[list[Tensor]]:
    """Filled with the encoder's output ``[N, D]`` of every pass inside, without padding."""
    states: list[Tensor] = []

    def note(_: nn.Module, __: tuple[Any, ...], options: dict[str, Any], output: EncoderOutput) -> None:
        valid = options.get("text_valid")
        states.extend((output.vision.flatten(0, 1), output.text.flatten(0, 1) if valid is None else output.text[valid]))

    handle = task.encoder.register_forward_hook(note, with_kwargs=True)
    yield states
    handle.remove()


@torch.no_grad()
def _run(task: Task, micro_batch: MicroBatch) -> TaskOutput:
    return task(micro_batch, {name: float(count) for name, count in task.num_targets([micro_batch]).items()})
