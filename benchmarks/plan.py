"""python -m benchmarks.plan --config configs/pretrain/tiny.yaml --rounds 5 --set data.batch_size=24

What ``python -m mhmoe_vl.plan`` predicts against what a run takes: bytes of weights and optimizer, bytes that autograd
keeps, seconds of a step. In every round the ceilings are measured, the step is predicted from them, and steps are
timed; the ratio is of one round, so that a machine that is busier in another round changes nothing.

``--clock process`` counts CPU time of this process instead of wall-clock time: on a busy machine, with one thread.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import clock_named, saved_bytes, take_turns, write_result
from benchmarks.train import kind_config, make_subject
from mhmoe_vl.moe import KINDS
from mhmoe_vl.plan.devices import compute_dtype, measure_device
from mhmoe_vl.plan.plan import make_plan


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description="Predicted against measured.")
    parser.add_argument("--config", type=Path, default=Path("configs/pretrain/tiny.yaml"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="per round")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: CPU time of one thread")
    parser.add_argument("--out", type=Path, help="JSON result file (default: benchmarks/results/plan_DATE.json)")
    parser.add_argument("--set", nargs="*", default=["data.batch_size=24"], metavar="a.b=c", dest="overrides")
    args = parser.parse_args(argv)
    rows = [_compare(kind, args) for kind in args.kinds]
    _show(rows)
    write_result(args.out or Path("benchmarks/results") / f"plan_{date.today():%Y%m%d}.json", vars(args), rows)
    return 0


def _compare(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    config, device = kind_config(args, kind), torch.device(args.device)
    clock = clock_named(args.clock, device)
    subject = make_subject(config, device)
    row: dict[str, Any] = {"kind": kind, "rounds": []}
    for _ in range(args.rounds):
        ceilings = measure_device(device, {torch.float32, compute_dtype(args.dtype, device.type)}, clock)
        plan = make_plan(config, ceilings, world_size=1)
        seconds = take_turns({kind: subject.step}, repeats=args.steps, device=device, clock=clock)[kind]
        row["rounds"].append(
            {
                "predicted_seconds": plan.time.expected,
                "measured_seconds": statistics.median(seconds),
                "matmul_flops": dict(ceilings.matmul_flops),
                "half_speed_width": ceilings.half_speed_width,
                "attention_flops": dict(ceilings.attention_flops),
                "memory_bandwidth": ceilings.memory_bandwidth,
                "function_bandwidth": ceilings.function_bandwidth,
                "call_seconds": ceilings.call_seconds,
            }
        )
    ratios = [r["predicted_seconds"] / r["measured_seconds"] for r in row["rounds"]]
    return row | {
        "time_ratio": statistics.median(ratios),
        "time_ratio_min": min(ratios),
        "time_ratio_max": max(ratios),
        "predicted_states": plan.memory.weights + plan.memory.optimizer,
        "measured_states": subject.state_bytes(),
        "predicted_activations": plan.memory.activations + plan.memory.weight_copies,
        "measured_activations": saved_bytes(subject.forward, subject.task),
    }


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="predicted / measured", title_justify="left")
    for column in ("kind", "weights and moments", "kept for backward", "step time (min to max)", "measured step"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in rows:
        measured = statistics.median(r["measured_seconds"] for r in row["rounds"])
        table.add_row(
            row["kind"],
            f"{row['predicted_states'] / row['measured_states']:.4f}",
            f"{row['predicted_activations'] / row['measured_activations']:.3f}",
            f"{row['time_ratio']:.2f} ({row['time_ratio_min']:.2f} to {row['time_ratio_max']:.2f})",
            f"{measured:.3f} s",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
