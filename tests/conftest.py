"""Fixtures of all tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: its own language is written in kernels too, and stays compiled otherwise.
    os.environ["TRITON_INTERPRET"] = "1"

# Nothing that collecting tests makes is garbage, and looking for it takes seconds.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real sample data; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("MHMOE_VL_SHARED", Path(__file__).parents[1] / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("../shared/data is absent: set MHMOE_VL_SHARED")
    return folder
