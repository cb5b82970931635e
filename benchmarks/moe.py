"""python -m benchmarks.moe --cells 768,8,1,2304 768,32,2,1152 --dtypes float32 bfloat16 --repeats 7

The expert layer against its floor: two matmuls of the same FLOPs, ``dim x 4 dim`` and ``4 dim x dim``, into memory that
is there already. Every backend of ours and every peer does the same work, head and merge layers included, in the same
run, taking turns; figures are medians of paired ratios to the floor. Inputs are new in every repeat, as loads of
experts are in every step: a library that compiles a product for each number of rows pays for it. Beside the time stands
what autograd keeps for the backward pass and, with ``--peak``, the most memory that both passes use at once beyond
input, weights and their gradients. Writes a table, a JSON file and a picture.

A cell is ``dim,num_experts,top_k,ffn_dim``. ``--skew 3`` gives one expert of our layers three times the mean load. A
subject that cannot run is left out, with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.measure import clock_named, paired_ratios, peak_bytes, saved_bytes, take_turns, write_result
from benchmarks.peers import gshard, hugging_face, leave_group, megablocks, scatter_moe, soft_moe, torchscale_xmoe
from mhmoe_vl.moe import FeedForward, MoE, MultiHeadMoE, routing_stats
from mhmoe_vl.moe.experts import BACKENDS

Pass = Callable[[], object]

#: Repeats before those that are timed: with new inputs, one does not show all that a library wants to compile.
NUM_WARMUPS = 3


class Cell(NamedTuple):
    """Sizes of a layer; FLOPs equal those of a dense layer of width ``4 dim`` if ``top_k * ffn_dim = 3 dim``."""

    dim: int
    num_experts: int
    top_k: int
    ffn_dim: int


class Work(NamedTuple):
    """A cell, and what is done with it."""

    cell: Cell
    num_heads: int
    num_tokens: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Arguments of the peers."""
        return self.cell.dim, self.cell.ffn_dim, self.cell.num_experts, self.num_heads, self.cell.top_k


def _ours(work: Work, backend: str) -> nn.Module:
    dim, ffn_dim, num_experts, num_heads, top_k = work.sizes
    return MultiHeadMoE(dim, ffn_dim, num_experts, num_heads, top_k, backend=backend)


def _smoe(work: Work) -> nn.Module:
    """A quarter as many experts, four times as large at h = 4: the same parameters and FLOPs, rows of whole tokens."""
    dim, ffn_dim, num_experts, num_heads, top_k = work.sizes
    width = 4 * dim // top_k
    return MoE(dim, width, max(top_k, round(num_experts * ffn_dim / (num_heads * width))), top_k)


#: ``MultiHeadMoE`` with each backend, the layers that it is compared with, then the peers.
SUBJECTS: dict[str, Callable[[Work], nn.Module]] = {
    **{f"mhmoe {backend}": lambda work, backend=backend: _ours(work, backend) for backend in BACKENDS},
    "smoe auto": _smoe,
    "dense": lambda work: FeedForward(work.cell.dim, 4 * work.cell.dim),
    "transformers eager": lambda work: hugging_face(*work.sizes),
    "transformers grouped_mm": lambda work: hugging_face(*work.sizes, implementation="grouped_mm"),
    "torchscale xmoe": lambda work: torchscale_xmoe(*work.sizes, num_tokens=work.num_tokens),
    "gshard einsum": lambda work: gshard(*work.sizes),
    "soft-moe": lambda work: soft_moe(*work.sizes, num_tokens=work.num_tokens),
    "megablocks": lambda work: megablocks(*work.sizes),
    "scattermoe": lambda work: scatter_moe(*work.sizes),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Time the layers; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe", description="The expert layer and its floor.")
    parser.add_argument("--cells", nargs="+", type=_cell, default=[Cell(768, 8, 1, 2304), Cell(768, 32, 2, 1152)])
    parser.add_argument("--num-tokens", type=int, default=4096)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--skew", type=float, help="load of the first expert of our layers, over the mean")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--subjects", nargs="+", choices=tuple(SUBJECTS), default=list(SUBJECTS), metavar="NAME")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: for busy machines")
    parser.add_argument(
        "--peak", action="store_true", help="most memory in use, on a CPU in a process for each subject"
    )
    parser.add_argument("--out", type=Path, help="JSON result file (default: benchmarks/results/moe_DATE.json)")
    args = parser.parse_args(argv)
    cells = [(cell, getattr(torch, dtype)) for dtype in args.dtypes for cell in args.cells]
    try:
        results = [result for cell, dtype in cells for result in _measure(cell, dtype, args)]
    finally:
        leave_group()
    out = args.out or Path("benchmarks/results") / f"moe_{date.today():%Y%m%d}.json"
    write_result(out, vars(args), results)
    _draw(results, out.with_suffix(".svg"))
    return 0


def _cell(text: str) -> Cell:
    try:
        return Cell(*(int(part) for part in text.split(",")))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"'{text}' is not dim,num_experts,top_k,ffn_dim") from None


def _measure(cell: Cell, dtype: torch.dtype, args: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(args.device)
    work = Work(cell, args.num_heads, args.num_tokens)
    x_TD = torch.randn(work.num_tokens, cell.dim, device=device, dtype=dtype, requires_grad=True)
    floor = _floor(x_TD.detach())
    forward, both = {"floor": floor[0]}, {"floor": floor[1]}
    results: list[dict[str, Any]] = []
    shared = {**cell._asdict(), "dtype": str(dtype).removeprefix("torch.")}
    facts: dict[str, dict[str, float]] = {"floor": {}}
    for name in args.subjects:
        try:
            layer = SUBJECTS[name](work).to(device, dtype)
            facts[name] = _skew(layer, x_TD.detach(), args.skew)
            passes = _passes(layer, x_TD)
            facts[name]["kept_mb"] = saved_bytes(lambda layer=layer: layer(x_TD), layer) / 1e6
            passes[1]()
            if args.peak and (peak := _peak_in_a_process(name, work, dtype, device)) is not None:
                facts[name]["peak_mb"] = peak / 1e6
        except (ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            results.append({**shared, "subject": name, "skipped": " ".join(str(error).split())[:160]})
        else:
            forward[name], both[name] = passes
    clock = clock_named(args.clock, device)
    for what, passes_of in (("forward", forward), ("forward + backward", both)):
        seconds = take_turns(
            passes_of,
            repeats=args.repeats,
            device=device,
            clock=clock,
            prepare=x_TD.detach().normal_,
            num_warmups=NUM_WARMUPS,
        )
        reference = seconds["floor"]
        results += [
            {**shared, "pass": what, "subject": name, **paired_ratios(times, reference), **facts[name]}
            for name, times in seconds.items()
        ]
    _show(cell, results, args)
    return results


def _peak_in_a_process(name: str, work: Work, dtype: torch.dtype, device: torch.device) -> int | None:
    if device.type != "cpu":
        return _peak(name, work, dtype, device)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, name, work, dtype, device).result()


def _peak(name: str, work: Work, dtype: torch.dtype, device: torch.device) -> int | None:
    """Of both passes of a new layer, without the gradients of its weights."""

    def measure(size: Work) -> int | None:
        layer = SUBJECTS[name](size).to(device, dtype)
        x_TD = torch.randn(size.num_tokens, size.cell.dim, device=device, dtype=dtype, requires_grad=True)
        both = _passes(layer, x_TD)[1]
        peak = peak_bytes(both, device)
        return None if peak is None else peak - sum(p.nbytes for p in layer.parameters() if p.grad is not None)

    # A small one first: what libraries set up when they are first used is not the layer's.
    measure(Work(Cell(64, 4, 1, 64), 4, 16))
    return measure(work)


def _skew(layer: nn.Module, x_TD: Tensor, skew: float | None) -> dict[str, float]:
    """Give the first expert ``skew`` times the mean load by its selection bias; the largest load over the mean."""
    if not isinstance(layer, MoE | MultiHeadMoE):
        return {}
    router = layer.router if isinstance(layer, MoE) else layer.moe.router

    def loads() -> Tensor:
        with torch.no_grad():
            return routing_stats(layer(x_TD)[1]).load_E.double()

    if skew is not None:
        low, high = -1.0, 1.0
        for _ in range(20):
            router.selection_bias_E[0] = (low + high) / 2
            load_E = loads()
            low, high = ((low + high) / 2, high) if load_E[0] < skew * load_E.mean() else (low, (low + high) / 2)
    load_E = loads()
    return {"max_load": float(load_E.max() / load_E.mean())}


def _floor(x_TD: Tensor) -> tuple[Pass, Pass]:
    """Matmuls of the forward pass, and of both passes, into tensors that exist."""
    tokens, dim = x_TD.shape
    w1_DF, w2_FD = x_TD.new_empty(dim, 4 * dim).normal_(), x_TD.new_empty(4 * dim, dim).normal_()
    hidden_TF, dhidden_TF = x_TD.new_empty(tokens, 4 * dim), x_TD.new_empty(tokens, 4 * dim)
    y_TD, dx_TD, dw1_DF, dw2_FD = (torch.empty_like(t) for t in (x_TD, x_TD, w1_DF, w2_FD))

    def forward() -> None:
        torch.mm(x_TD, w1_DF, out=hidden_TF)
        torch.mm(hidden_TF, w2_FD, out=y_TD)

    def both() -> None:
        forward()
        torch.mm(y_TD, w2_FD.T, out=dhidden_TF)
        torch.mm(hidden_TF.T, y_TD, out=dw2_FD)
        torch.mm(dhidden_TF, w1_DF.T, out=dx_TD)
        torch.mm(x_TD.T, dhidden_TF, out=dw1_DF)

    return forward, both


def _passes(layer: nn.Module, x_TD: Tensor) -> tuple[Pass, Pass]:
    gradient_TD = torch.randn_like(x_TD)

    def output() -> Tensor:
        result = layer(x_TD)
        return result[0] if isinstance(result, tuple) else result

    def forward() -> None:
        with torch.no_grad():
            output()

    def both() -> None:
        layer.zero_grad(set_to_none=True)
        x_TD.grad = None
        output().backward(gradient_TD)

    return forward, both


def _show(cell: Cell, results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    title = f"{cell}, {results[-1]['dtype']}, {args.num_tokens} tokens, {args.num_heads} heads, {args.device}"
    table = Table(title=title, title_justify="left")
    for column in ("subject", "pass", "ms", "ratio to the floor (min to max)", "kept MB", "peak MB", "largest load"):
        table.add_column(column, justify="left" if column in ("subject", "pass") else "right")
    for row in results:
        if "skipped" in row:
            table.add_row(row["subject"], "left out", "", row["skipped"])
        else:
            ratio = f"{row['median_ratio']:.2f} ({row['min_ratio']:.2f} to {row['max_ratio']:.2f})"
            memory = [
                f"{row[key]:.0f}" if key in row and row["pass"] != "forward" else "" for key in ("kept_mb", "peak_mb")
            ]
            load = f"{row['max_load']:.2f}" if "max_load" in row else ""
            table.add_row(row["subject"], row["pass"], f"{row['median_ms']:.1f}", ratio, *memory, load)
    # Where the width of the terminal is unknown, rich takes 80 columns: too few.
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def _draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of forward + backward, one group per cell; the floor is the line at 1."""
    rows = [row for row in results if row.get("pass") == "forward + backward" and row["subject"] != "floor"]
    cells = list(dict.fromkeys((row["dim"], row["num_experts"], row["top_k"], row["dtype"]) for row in rows))
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    figure, axes = plt.subplots(figsize=(2 + 2.2 * len(cells), 4))
    for number, subject in enumerate(subjects):
        found = {
            (r["dim"], r["num_experts"], r["top_k"], r["dtype"]): r["median_ratio"]
            for r in rows
            if r["subject"] == subject
        }
        places = [place + number / (len(subjects) + 1) for place, cell in enumerate(cells) if cell in found]
        axes.bar(
            places,
            [found[cell] for cell in cells if cell in found],
            1 / (len(subjects) + 1),
            label=subject,
            align="edge",
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([place + 0.45 for place in range(len(cells))], [f"d={d} E={e} k={k}\n{t}" for d, e, k, t in cells])
    axes.set_ylabel("time / floor")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
