"""python -m benchmarks.moe --cells 768,8,1,2304 768,32,2,1152 --dtypes float32 bfloat16 --repeats 7

The expert layer against its floor: two matmuls of the same FLOPs, ``dim x 4 dim`` and ``4 dim x dim``, into memory that
is there already. Every backend of ours and every peer does the same work, head and merge layers included, in the same
run, taking turns; figures are medians of paired ratios to the floor. Writes a table, a JSON file and a picture.

A cell is ``dim,num_experts,top_k,ffn_dim``. A subject that cannot run is left out, with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.measure import paired_ratios, take_turns, write_result
from benchmarks.peers import gshard, hugging_face
from mhmoe_vl.moe import FeedForward, MoE, MultiHeadMoE

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Pass = Callable[[], object]


class Cell(NamedTuple):
    """Sizes of a layer; FLOPs equal those of a dense layer of width ``4 dim`` if ``top_k * ffn_dim = 3 dim``."""

    dim: int
    num_experts: int
    top_k: int
    ffn_dim: int


#: ``MultiHeadMoE`` with each backend, then the peers.
SUBJECTS: dict[str, Callable[[Cell, int], nn.Module]] = {
    **{
        f"mhmoe {backend}": lambda cell, heads, backend=backend: MultiHeadMoE(
            cell.dim, cell.ffn_dim, cell.num_experts, heads, cell.top_k, backend=backend
        )
        for backend in ("auto", "loop", "segments", "grouped_mm", "fused")
    },
    "smoe auto": lambda cell, heads: MoE(cell.dim, 4 * cell.dim // cell.top_k, cell.num_experts, cell.top_k),
    "dense": lambda cell, heads: FeedForward(cell.dim, 4 * cell.dim),
    "transformers eager": lambda cell, heads: hugging_face(cell.dim, cell.ffn_dim, cell.num_experts, heads, cell.top_k),
    "transformers grouped_mm": lambda cell, heads: hugging_face(
        cell.dim, cell.ffn_dim, cell.num_experts, heads, cell.top_k, implementation="grouped_mm"
    ),
    "gshard einsum": lambda cell, heads: gshard(cell.dim, cell.ffn_dim, cell.num_experts, heads, cell.top_k),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Time the layers; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe", description="The expert layer and its floor.")
    parser.add_argument("--cells", nargs="+", type=_cell, default=[Cell(768, 8, 1, 2304), Cell(768, 32, 2, 1152)])
    parser.add_argument("--num-tokens", type=int, default=4096)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--subjects", nargs="+", choices=tuple(SUBJECTS), default=list(SUBJECTS), metavar="NAME")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON result file (default: benchmarks/results/moe_DATE.json)")
    args = parser.parse_args(argv)
    results = [
        result for dtype in args.dtypes for cell in args.cells for result in _measure(cell, getattr(torch, dtype), args)
    ]
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
    x_TD = torch.randn(args.num_tokens, cell.dim, device=device, dtype=dtype)
    floor = _floor(x_TD)
    forward, both = {"floor": floor[0]}, {"floor": floor[1]}
    results: list[dict[str, Any]] = []
    shared = {**cell._asdict(), "dtype": str(dtype).removeprefix("torch.")}
    for name in args.subjects:
        try:
            passes = _passes(SUBJECTS[name](cell, args.num_heads).to(device, dtype), x_TD)
            passes[1]()
        except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            results.append({**shared, "subject": name, "skipped": " ".join(str(error).split())[:160]})
        else:
            forward[name], both[name] = passes
    for what, passes_of in (("forward", forward), ("forward + backward", both)):
        seconds = take_turns(passes_of, repeats=args.repeats, device=device)
        reference = seconds["floor"]
        results += [
            {**shared, "pass": what, "subject": name, **paired_ratios(times, reference)}
            for name, times in seconds.items()
        ]
    _show(cell, results, args)
    return results


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
    x_TD = x_TD.clone().requires_grad_()
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
    for column in ("subject", "pass", "ms", "ratio to the floor (min to max)"):
        table.add_column(column, justify="left" if column in ("subject", "pass") else "right")
    for row in results:
        if "skipped" in row:
            table.add_row(row["subject"], "left out", "", row["skipped"])
        else:
            ratio = f"{row['median_ratio']:.2f} ({row['min_ratio']:.2f} to {row['max_ratio']:.2f})"
            table.add_row(row["subject"], row["pass"], f"{row['median_ms']:.1f}", ratio)
    Console().print(table)


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
