"""What ceilings are computed from; how fast this machine is does not matter here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mhmoe_vl.plan import devices


def test_the_half_speed_width_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products 64 wide that take 1.5 times as long: 1 + n / 64 = 1.5 for n = 32. A busy second changes nothing."""
    cpu = torch.device("cpu")
    calls: list[int] = []

    def products(device: torch.device, dtype: torch.dtype, width: int) -> Callable[[], object]:
        return lambda: width

    def seconds(run: Callable[[], int], device: torch.device, clock: devices.Clock, repeats: int) -> float:
        calls.append(run())
        busy = 10.0 if len(calls) in (5, 8) else 1.0
        return busy * (1.5 if run() == 64 else 1.0)

    monkeypatch.setattr(devices, "_products", products)
    monkeypatch.setattr(devices, "_seconds", seconds)
    assert devices._half_speed_width(cpu, lambda: 0.0) == pytest.approx(32)
    assert calls == [64, 1024] * 15


def test_products_of_any_width_have_the_same_flops() -> None:
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        devices._products(torch.device("cpu"), torch.float32, 64)()
    assert counter.get_total_flops() == 2 * 1024**3
