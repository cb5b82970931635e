"""What all benchmarks share: taking turns, paired ratios, and result files that say where they come from."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

from mhmoe_vl.train.run_directory import environment

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def take_turns(
    passes: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    prepare: Callable[[], object] = lambda: None,
    num_warmups: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each pass. All run once in each repeat, so that a busy machine slows all of them alike.

    Args:
        prepare: called before each repeat, and not timed.
        num_warmups: repeats before those that are timed.
    """
    for _ in range(num_warmups):
        prepare()
        for run in passes.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats):
        prepare()
        for name, run in passes.items():
            _wait(device)
            start = clock()
            run()
            _wait(device)
            seconds[name].append(clock() - start)
    return seconds


def clock_named(name: str, device: torch.device) -> Callable[[], float]:
    """``wall``, or ``process``: CPU time of this process, which other processes on a busy machine hardly change.

    Raises:
        SystemExit: CPU time means nothing on a GPU, and adds up over threads.
    """
    if name == "wall":
        return time.perf_counter
    if device.type != "cpu" or torch.get_num_threads() > 1:
        raise SystemExit("error: --clock process: needs --device cpu and OMP_NUM_THREADS=1")
    return time.process_time


def saved_bytes(forward: Callable[[], object], module: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward()``, parameters of ``module`` not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result  # only now may its memory be used, and counted, again
    return sum(kept.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory in use at once during ``run()``, beyond what was in use before; None where nobody counts it.

    On a CPU that is resident memory of this process, which keeps for later what was used before: the answer is too
    small in a process that has done much else.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    clear_refs = Path("/proc/self/clear_refs")
    if device.type != "cpu" or not clear_refs.exists():
        return None
    clear_refs.write_text("5")  # the peak is now what is resident
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].removesuffix("kB")) * 1024


def paired_ratios(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest ratio within a repeat, and the median time."""
    ratios = [own / other for own, other in zip(seconds, reference, strict=True)]
    return {
        "median_ms": 1000 * statistics.median(seconds),
        "median_ratio": statistics.median(ratios),
        "min_ratio": min(ratios),
        "max_ratio": max(ratios),
    }


def write_result(path: Path, settings: Mapping[str, Any], results: Any) -> None:
    """A JSON file with the settings, versions, commit, command and hardware beside the results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "settings": {name: str(value) for name, value in settings.items() if name != "out"},
        "environment": environment(1),
        "hardware": hardware(),
        "results": results,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


def draw_bars(path: Path, values: Mapping[str, float], *, ylabel: str) -> None:
    """One bar for each name, and a line at 1."""
    figure, axes = plt.subplots(figsize=(1 + len(values), 4))
    axes.bar(list(values), list(values.values()))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel(ylabel)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    print(path)


def hardware() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": model, "num_threads": torch.get_num_threads(), "gpu": gpu, "platform": sys.platform}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
