"""The examples of docs/moe.md run as they are printed."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[3] / "docs" / "moe.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number: int) -> None:
    for package in ("timm", "transformers"):
        if re.search(rf"^(import|from) {package}\b", EXAMPLES[number], flags=re.MULTILINE) and not find_spec(package):
            pytest.skip(f"{package} is not installed")
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(EXAMPLES[number], f"{PAGE.name} example {number}", "exec"), names)
    assert torch.isfinite(names["loss"])  # type: ignore[arg-type]
    for module in names.get("routed", []):  # type: ignore[attr-defined]
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3
