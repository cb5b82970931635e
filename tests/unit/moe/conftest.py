"""Triton's interpreter, mended, and the CPU engine with and without its compiled part.

Without a GPU, Triton's kernels run in the interpreter (tests/conftest.py switches it on).
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from mhmoe_vl.moe import compiled

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


@pytest.fixture(autouse=True)
def mended_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bfloat16 as integers, and multiplies these: give its products the numbers instead."""
    if not INTERPRETS:
        return
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def numbers(handle: Any) -> Any:
        if handle.dtype.scalar.name != "bf16":
            return handle
        values = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, interpreter.tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, numbers(a), numbers(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Triton 3.6 (of torch 2.11) turns arrays of one element into an int, which numpy refuses since 2.4.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_index)


@pytest.fixture(params=["compiled", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU engine with its compiled loops, and as where they were not built."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "LOOPS", None)
    elif compiled.LOOPS is None:
        pytest.skip(compiled.STATE)
    return str(request.param)
