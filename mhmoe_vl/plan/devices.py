"""Ceilings of devices: from datasheets, or measured on the spot.

A datasheet's ceiling is what a chip could do; how much of it a step reaches is an assumption (:attr:`Device.reached`),
which is printed with every figure that rests on it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mhmoe_vl.errors import ConfigError, suggest

Clock = Callable[[], float]


@dataclass(frozen=True)
class Device:
    """One accelerator, or the CPU as one process sees it.

    Attributes:
        kind: ``cuda`` or ``cpu``: decides precision and expert backend, as in training.
        matmul_flops: dense FLOP/s of matrix products, by dtype.
        half_speed_width: narrowest side of a matrix product at which it reaches half of its ceiling: a side of n takes
            ``1 + half_speed_width / n`` times as long. 0 where it was not measured.
        attention_flops: FLOP/s of fused attention, by dtype.
        memory_bandwidth: bytes/s, read and written together.
        function_bandwidth: the same of operations that take exponentials or error functions; on a CPU these are bound
            by arithmetic.
        memory: bytes.
        num_per_node: devices that ``intra_node_bandwidth`` joins.
        intra_node_bandwidth, inter_node_bandwidth: bytes/s of one device in one direction, inside a node and out of it;
            None where it is not known.
        call_seconds: host time of one operation, forward or backward; None where it was not measured.
        reached: share of the ceilings that a step is assumed to reach; 1 where they were measured.
        source: where the figures come from.
    """

    name: str
    kind: str
    matmul_flops: Mapping[str, float]
    half_speed_width: float
    attention_flops: Mapping[str, float]
    memory_bandwidth: float
    function_bandwidth: float
    memory: int
    num_per_node: int
    intra_node_bandwidth: float | None
    inter_node_bandwidth: float | None
    call_seconds: float | None
    reached: float
    source: str


#: A judgement, not a measurement: no step of ours has been timed on these devices.
_REACHED = 0.6


def _from_datasheet(
    name: str,
    bfloat16: float,
    float32: float,
    bandwidth: float,
    memory: float,
    link: float,
    network: float,
    source: str,
) -> Device:
    """An NVIDIA GPU in NVIDIA's own machine of eight: TFLOP/s, TB/s, GB, and GB/s in one direction."""
    flops = {"bfloat16": 1e12 * bfloat16, "float32": 1e12 * float32}
    return Device(
        name, "cuda", flops, 0.0, flops, 1e12 * bandwidth, 1e12 * bandwidth, int(1e9 * memory), 8,
        1e9 * link, 1e9 * network, None, _REACHED, source,
    )  # fmt: skip


#: Dense figures without sparsity, float32 without TF32 (torch's default). NVLink's published total is both directions.
_DATASHEETS = (
    # NVIDIA H100 Tensor Core GPU datasheet, SXM; DGX H100: 8 x 400 Gb/s.
    _from_datasheet("h100", 989, 67, 3.35, 80, 450, 50, "NVIDIA H100 SXM and DGX H100 datasheets"),
    # NVIDIA H200 Tensor Core GPU datasheet, SXM; DGX H200: 8 x 400 Gb/s.
    _from_datasheet("h200", 989, 67, 4.8, 141, 450, 50, "NVIDIA H200 SXM and DGX H200 datasheets"),
    # NVIDIA A100 Tensor Core GPU datasheet, 80GB SXM; DGX A100: 8 x 200 Gb/s.
    _from_datasheet("a100", 312, 19.5, 2.039, 80, 300, 25, "NVIDIA A100 80GB SXM and DGX A100 datasheets"),
)
DATASHEETS = {device.name: device for device in _DATASHEETS}
NAMES = (*DATASHEETS, "cpu", "this")


def find_device(name: str, *, precision: str = "auto") -> Device:
    """A device by name; ``cpu`` and ``this`` (the GPU if there is one) are measured now, which takes seconds.

    Args:
        precision: of the run; products are measured in its dtype and in float32.

    Raises:
        ConfigError: unknown name.
    """
    if name in DATASHEETS:
        return DATASHEETS[name]
    if name not in NAMES:
        raise ConfigError(f"--device: '{name}' must be one of {', '.join(NAMES)}{suggest(name, list(NAMES))}")
    device = torch.device("cuda" if name == "this" and torch.cuda.is_available() else "cpu")
    return measure_device(device, {torch.float32, compute_dtype(precision, device.type)})


def compute_dtype(precision: str, kind: str) -> torch.dtype:
    """What matrix products compute in, by the rule of :func:`mhmoe_vl.train.precision.autocast_for`; of GPUs, all that
    are listed here have bfloat16."""
    return torch.bfloat16 if precision == "bfloat16" or (precision == "auto" and kind == "cuda") else torch.float32


def measure_device(device: torch.device, dtypes: Collection[torch.dtype], clock: Clock = time.perf_counter) -> Device:
    """Ceilings of the device under this process, with its number of threads and whatever else is running.

    Args:
        clock: ``time.process_time`` leaves out what other processes take of a busy CPU; with one thread only.
    """
    on_cuda = device.type == "cuda"
    return Device(
        name=torch.cuda.get_device_name(device) if on_cuda else "cpu",
        kind=device.type,
        matmul_flops={_short(dtype): measure_matmul(device, dtype, clock) for dtype in dtypes},
        half_speed_width=_half_speed_width(device, clock),
        attention_flops={_short(dtype): _attention(device, dtype, clock) for dtype in dtypes},
        memory_bandwidth=_bandwidth(device, torch.neg, clock),
        function_bandwidth=_bandwidth(device, nn.functional.gelu, clock),
        memory=torch.cuda.mem_get_info(device)[0] if on_cuda else _free_memory(),
        num_per_node=torch.cuda.device_count() if on_cuda else 1,
        intra_node_bandwidth=None,
        inter_node_bandwidth=None,
        call_seconds=_call_seconds(device, clock),
        reached=1.0,
        source=f"measured now, {torch.get_num_threads()} threads" if not on_cuda else "measured now",
    )


def measure_matmul(device: torch.device, dtype: torch.dtype, clock: Clock = time.perf_counter) -> float:
    """FLOP/s of a matrix product that is large enough to be at full speed."""
    size = _large(device)
    return 2 * size**3 / _seconds(_products(device, dtype, size), device, clock)


def _half_speed_width(device: torch.device, clock: Clock, width: int = 64, repeats: int = 15) -> float:
    """From float32 products with one narrow side, the width of sub-tokens, and one of the same FLOPs without, taking
    turns."""
    whole, narrow = (_products(device, torch.float32, side) for side in (_large(device), width))
    ratios = [_seconds(narrow, device, clock, 1) / _seconds(whole, device, clock, 1) for _ in range(repeats)]
    return max(0.0, width * (statistics.median(ratios) - 1))


def _large(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 1024


def _products(device: torch.device, dtype: torch.dtype, width: int) -> Callable[[], object]:
    """``[size, width] x [width, size]``, as often as makes ``size**3`` multiplications."""
    size = _large(device)
    a_SW = torch.randn(size, width, device=device).to(dtype)
    b_WS, out_SS = a_SW.T.contiguous(), torch.empty(size, size, device=device, dtype=dtype)

    def run() -> None:
        for _ in range(size // width):
            torch.mm(a_SW, b_WS, out=out_SS)

    return run


def _attention(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """FLOP/s of forward and backward pass at the length of a 224-px image, heads 64 wide."""
    shape = (64 if device.type == "cuda" else 4, 12, 197, 64)
    query, key, value = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))

    def run() -> None:
        nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()

    # Two products forward; five backward, the scores again among them.
    return 7 * 2 * query.numel() * shape[2] / _seconds(run, device, clock)


def _bandwidth(device: torch.device, function: Callable[[Tensor], Tensor], clock: Clock) -> float:
    """Bytes/s of an operation with a new result, on a tensor of the size that activations have."""
    x = torch.ones(2**28 if device.type == "cuda" else 2**22, device=device)
    return 2 * x.nbytes / _seconds(lambda: function(x), device, clock)


def _call_seconds(device: torch.device, clock: Clock, num_calls: int = 300) -> float:
    """Host time of one small operation, averaged over its forward and its backward pass."""
    x = torch.ones(8, device=device, requires_grad=True)

    def run() -> None:
        y = x
        for _ in range(num_calls):
            y = y.sin()
        y.sum().backward()

    # Forward: one operation per call; backward: cosine and product.
    return _seconds(run, device, clock) / (3 * num_calls)


def _seconds(run: Callable[[], object], device: torch.device, clock: Clock, repeats: int = 7) -> float:
    """Median; the first run is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        start = clock()
        run()
        _wait(device)
        seconds.append(clock() - start)
    return statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _free_memory() -> int:
    """Bytes that a process could still get (Linux); elsewhere unknown and therefore not a limit."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return 2**63 - 1
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])
