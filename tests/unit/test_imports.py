"""What a command imports is what its user waits for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKING = [
    f"data_prep.{name}"
    for name in (
        "make_scenes", "pack_classes", "pack_images", "pack_nlvr2", "pack_pairs", "pack_text", "pack_vqa",
        "train_text_tokenizer", "verify_shards",
    )
]  # fmt: skip
EVALUATIONS = [
    "eval.captioning",
    "eval.classification",
    "eval.nlvr2",
    "eval.retrieval",
    "eval.vqa",
    "mhmoe_vl.report.__main__",
]


def imported_by(modules: list[str]) -> set[str]:
    """Roots of everything that a fresh interpreter has once it has imported ``modules``."""
    program = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in result.stdout.split()}


def test_packing_needs_no_torch() -> None:
    assert not imported_by(PACKING) & {"torch", "torchvision", "sklearn", "timm", "matplotlib"}


def test_packing_leaves_webdataset_whole_for_others(tmp_path: Path) -> None:
    program = """
import sys
from mhmoe_vl.data.prepare.tar_writer import TarWriter
with TarWriter(sys.argv[1]) as tar:
    tar.write({"__key__": "a", "txt": b"text"})
assert "torch" not in sys.modules
import torch, webdataset
assert issubclass(webdataset.WebDataset, torch.utils.data.IterableDataset)
print([sample["txt"] for sample in webdataset.WebDataset(sys.argv[1], shardshuffle=False)])
"""
    command = [sys.executable, "-c", program, str(tmp_path / "a.tar")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[b'text']\n"


def test_evaluations_need_no_collections_of_models() -> None:
    found = imported_by(EVALUATIONS)
    assert "torch" in found
    assert not found & {"torchvision", "timm", "open_clip", "sklearn", "transformers"}
