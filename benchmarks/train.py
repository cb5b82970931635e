"""python -m benchmarks.train --config configs/pretrain/tiny.yaml --repeats 5 --set data.batch_size=24

A whole pretraining step (forward, backward, clipping, optimizer) of models that differ by one word, ``model.ffn``, on
random batches of the right shapes. The kinds take turns within each repeat; figures are medians of paired ratios to the
first kind. MFU is the FLOPs that the sizes say (forward and backward pass, nothing recomputed, no targets) over what a
plain matmul of the dtype reaches on this device. Writes a table, a JSON file and a picture.

All models are in memory at once: name fewer kinds if they do not fit.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import clock_named, draw_bars, paired_ratios, saved_bytes, take_turns, write_result
from mhmoe_vl.config import load_config
from mhmoe_vl.models.cost import encoder_cost
from mhmoe_vl.moe import KINDS
from mhmoe_vl.plan.devices import compute_dtype, measure_matmul
from mhmoe_vl.plan.workload import (
    build_task_without_files,
    sample_cost,
    samples_of,
    samples_per_step,
    synthetic_batch,
)
from mhmoe_vl.tasks.base import MicroBatch, Task
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.optimizer import build_optimizer
from mhmoe_vl.train.precision import autocast_for
from mhmoe_vl.train.step import Figures, global_totals, train_step


@dataclass
class Subject:
    """A model, ready to take steps."""

    config: RunConfig
    task: Task
    optimizer: torch.optim.Optimizer
    micro_batches: list[MicroBatch]
    device: torch.device

    def step(self) -> None:
        train_step(
            self.task,
            self.optimizer,
            self.micro_batches,
            clip_norm=self.config.optimizer.clip_norm,
            autocast=autocast_for(self.config.precision, self.device),
            figures=Figures(),
        )

    def forward(self) -> object:
        """Of the first micro-batch."""
        totals = global_totals(self.task, self.micro_batches)
        with autocast_for(self.config.precision, self.device):
            return self.task(self.micro_batches[0], totals, len(self.micro_batches))

    def state_bytes(self) -> int:
        """Weights and AdamW's moments; its step counters, a scalar each, are left out."""
        states = [t for state in self.optimizer.state.values() for name, t in state.items() if name != "step"]
        return sum(tensor.nbytes for tensor in (*self.task.parameters(), *states))


def main(argv: Sequence[str] | None = None) -> int:
    """Time the steps; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description="Whole pretraining steps.")
    parser.add_argument("--config", type=Path, default=Path("configs/pretrain/tiny.yaml"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="the first is the reference")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: CPU time of one thread")
    parser.add_argument("--out", type=Path, help="JSON result file (default: benchmarks/results/train_DATE.json)")
    parser.add_argument("--set", nargs="*", default=["data.batch_size=24"], metavar="a.b=c", dest="overrides")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    clock = clock_named(args.clock, device)
    subjects = {kind: make_subject(kind_config(args, kind), device) for kind in args.kinds}
    ceiling = measure_matmul(device, compute_dtype(args.dtype, device.type), clock)
    passes = {kind: subject.step for kind, subject in subjects.items()}
    seconds = take_turns(passes, repeats=args.repeats, device=device, clock=clock)
    reference = seconds[args.kinds[0]]
    rows = [
        {"kind": kind, **_sizes(subject), **_speed(subject, seconds[kind], ceiling), **_memory(subject)}
        | paired_ratios(seconds[kind], reference)
        for kind, subject in subjects.items()
    ]
    _show(rows, args)
    out = args.out or Path("benchmarks/results") / f"train_{date.today():%Y%m%d}.json"
    write_result(out, {**vars(args), "matmul_flops_per_second": ceiling}, rows)
    ratios = {row["kind"]: row["median_ratio"] for row in rows}
    draw_bars(out.with_suffix(".svg"), ratios, ylabel=f"step time / {args.kinds[0]}")
    return 0


def kind_config(args: argparse.Namespace, kind: str) -> RunConfig:
    """The configuration of one kind; ``fine_grained`` makes twice as many choices."""
    config = load_config(RunConfig, args.config, [*args.overrides, f"precision={args.dtype}"])
    choices = config.model.moe.choices * (2 if kind == "fine_grained" else 1)
    own = [f"model.ffn={kind}", f"model.moe.choices={choices}", f"precision={args.dtype}"]
    return load_config(RunConfig, args.config, [*args.overrides, *own])


def make_subject(config: RunConfig, device: torch.device) -> Subject:
    """Random weights and random batches, the same for the same configuration."""
    torch.manual_seed(config.seed)
    task = build_task_without_files(config, device="cpu").to(device)
    numbers = samples_per_step(config)
    micro_batches = [
        {
            source: synthetic_batch(config, source, number // config.num_micro_batches).to(device)
            for source, number in numbers.items()
        }
        for _ in range(config.num_micro_batches)
    ]
    task.train()
    return Subject(config, task, build_optimizer(task, config.optimizer), micro_batches, device)


def _sizes(subject: Subject) -> dict[str, Any]:
    config = subject.config
    cost = encoder_cost(config.model, num_text_tokens=config.data.text_length)
    return {
        "num_params": sum(parameter.numel() for parameter in subject.task.parameters()),
        "num_active_params": cost.num_active_params,
        "flops_per_token": cost.flops_per_token,
        "num_assignments_per_token": cost.num_assignments_per_token,
    }


def _speed(subject: Subject, seconds: list[float], ceiling: float) -> dict[str, float]:
    samples = samples_of(subject.config)
    numbers = {
        source: sum(len(micro[source]) for micro in subject.micro_batches) for source in subject.micro_batches[0]
    }
    median = statistics.median(seconds)
    flops = sum(3 * sample_cost(subject.task, samples[source]).forward_flops * n for source, n in numbers.items())
    images = sum(n * samples[source].num_sequences for source, n in numbers.items() if samples[source].num_image_tokens)
    return {
        "flops_per_step": flops,
        "tokens_per_second": sum(samples[source].num_tokens * n for source, n in numbers.items()) / median,
        "images_per_second": images / median,
        "mfu": flops / median / ceiling,
    }


def _memory(subject: Subject) -> dict[str, Any]:
    """CUDA: the peak of a step. CPU: weights, optimizer and what autograd keeps, as nothing counts the rest."""
    if subject.device.type == "cuda":
        before = torch.cuda.memory_allocated(subject.device)
        torch.cuda.reset_peak_memory_stats(subject.device)
        subject.step()
        of_step = torch.cuda.max_memory_allocated(subject.device) - before
        return {"memory_bytes": subject.state_bytes() + of_step, "memory_measure": "states and peak of a step"}
    kept = saved_bytes(subject.forward, subject.task)
    return {
        "memory_bytes": subject.state_bytes() + kept,
        "saved_bytes": kept,
        "memory_measure": "states and tensors saved for the backward pass; gradients and temporaries not counted",
    }


def _show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    table = Table(title=f"{args.config}, {args.dtype}, {args.device}, whole steps", title_justify="left")
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "kind": lambda row: row["kind"],
        "parameters": lambda row: f"{row['num_params']:,}",
        "MFLOP/token": lambda row: f"{row['flops_per_token'] / 1e6:.2f}",
        "ms": lambda row: f"{row['median_ms']:.0f}",
        f"ratio to {args.kinds[0]} (min to max)": lambda row: (
            f"{row['median_ratio']:.2f} ({row['min_ratio']:.2f} to {row['max_ratio']:.2f})"
        ),
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "images/s": lambda row: f"{row['images_per_second']:,.1f}",
        "MFU": lambda row: f"{row['mfu']:.1%}",
        "memory": lambda row: f"{row['memory_bytes'] / 1e6:,.0f} MB",
    }
    for name in columns:
        table.add_column(name, justify="left" if name == "kind" else "right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
