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

import torch

from mhmoe_vl.train.run_directory import environment


def take_turns(
    passes: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each pass. All run once in each repeat, so that a busy machine slows all of them alike."""
    for run in passes.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, run in passes.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


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
