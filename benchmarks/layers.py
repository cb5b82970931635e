"""python -m benchmarks.layers --dim 768 --num-tokens 1024 --repeats 9

Forward and backward of all kinds of feed-forward layer at the same FLOPs and parameters, each against the dense
layer of the same FLOPs. The kinds take turns within each repeat and the medians are of *paired* ratios, so that a busy
machine slows all of them alike. Prints a table and writes a result file with hardware, versions, commit and command.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.measure import paired_ratios, take_turns, write_result
from mhmoe_vl.moe import KINDS, FeedForward, FfnShape, MoE, MultiHeadMoE, match_ffn
from mhmoe_vl.moe.cost import MULTI_HEAD_KINDS, default_router


def main(argv: Sequence[str] | None = None) -> int:
    """Time the layers; see the top of this file."""
    parser = argparse.ArgumentParser(description="Feed-forward layers of all kinds at equal cost.")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument(
        "--num-experts", type=int, default=8, help="of the reference SMoE, whose experts are 4*dim wide"
    )
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=1, help="of mhmoe; fine_grained makes twice as many choices")
    parser.add_argument("--num-tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON result file (default: benchmarks/results/layers_DATE.json)")
    args = parser.parse_args(argv)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    shapes = {kind: _shape(kind, args) for kind in KINDS}
    passes = {kind: _pass(_layer(shape).to(device, dtype), shape, args.num_tokens) for kind, shape in shapes.items()}
    seconds = take_turns(passes, repeats=args.repeats, device=device)
    rows = [_row(shapes[kind], seconds[kind], seconds["dense"]) for kind in KINDS]
    _show(rows, args)
    out = args.out or Path("benchmarks/results") / f"layers_{date.today():%Y%m%d}.json"
    write_result(out, vars(args), rows)
    return 0


def _shape(kind: str, args: argparse.Namespace) -> FfnShape:
    top_k = 2 * args.top_k if kind == "fine_grained" else args.top_k
    return match_ffn(kind, args.dim, 4 * args.dim, args.num_experts, 1, args.num_heads, top_k)


def _layer(shape: FfnShape) -> nn.Module:
    torch.manual_seed(0)
    if shape.kind == "dense":
        return FeedForward(shape.dim, shape.ffn_dim)
    if shape.kind in MULTI_HEAD_KINDS:
        pools = "per_head" if shape.kind == "mhmoe_head_parallel" else "shared"
        return MultiHeadMoE(shape.dim, shape.ffn_dim, shape.num_experts, shape.num_heads, shape.top_k, pools=pools)
    return MoE(shape.dim, shape.ffn_dim, shape.num_experts, shape.top_k, router=default_router(shape.kind))


def _pass(layer: nn.Module, shape: FfnShape, num_tokens: int) -> Callable[[], None]:
    parameter = next(layer.parameters())
    x = torch.randn(num_tokens, shape.dim, device=parameter.device, dtype=parameter.dtype, requires_grad=True)
    gradient = torch.randn_like(x)

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x)[0].backward(gradient)

    return run


def _row(shape: FfnShape, seconds: list[float], dense: list[float]) -> dict[str, Any]:
    return {
        "kind": shape.kind,
        "ffn_dim": shape.ffn_dim,
        "num_experts": shape.num_experts,
        "num_params": shape.cost.num_params,
        "flops_per_token": shape.cost.flops_per_token,
        "num_assignments_per_token": shape.cost.num_assignments_per_token,
        **paired_ratios(seconds, dense),
    }


def _show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    table = Table(title=f"{args.num_tokens} tokens, dim {args.dim}, {args.dtype}, {args.device}, forward + backward")
    for column in ("kind", "experts", "width", "parameters", "FLOPs/token", "ms", "ratio to dense (min to max)"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in rows:
        table.add_row(
            row["kind"], str(row["num_experts"]), str(row["ffn_dim"]), f"{row['num_params']:,}",
            f"{row['flops_per_token']:,}", f"{row['median_ms']:.1f}",
            f"{row['median_ratio']:.2f} ({row['min_ratio']:.2f} to {row['max_ratio']:.2f})",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
