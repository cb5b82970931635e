"""Files of weights that other people made: what is read, and what is refused unread."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mhmoe_vl.convert.answer2label import read_answer2label
from mhmoe_vl.convert.released_file import read_tensors, write_tensors
from mhmoe_vl.errors import CheckpointError, DataError, OutputError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.weight": torch.tensor(2.5, dtype=torch.float16)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


@pytest.mark.parametrize("wrapped", [lambda t: t, lambda t: {"model": t, "epoch": 3}, lambda t: {"module": t}])
@pytest.mark.parametrize("new_format", [True, False])
def test_state_dicts_are_read(tmp_path: Path, wrapped: Any, new_format: bool) -> None:
    # Downloads of the release get any name.
    path = tmp_path / "beit3.zip"
    torch.save(wrapped(TENSORS), path, _use_new_zipfile_serialization=new_format)
    assert same(read_tensors(path))


@pytest.mark.parametrize("name", ["x.safetensors", "folder/x.pth"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    write_tensors(tmp_path / name, TENSORS)
    assert same(read_tensors(tmp_path / name))
    if name.endswith("pth"):
        assert torch.load(tmp_path / name, weights_only=True).keys() == {"model"}
    with pytest.raises(OutputError, match="exists"):
        write_tensors(tmp_path / name, TENSORS)
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.witness,))


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "x": Malicious(tmp_path / "witness")}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth: holds \S+, and only tensors are read from a pickle"):
        read_tensors(tmp_path / "x.pth")
    assert not (tmp_path / "witness").exists()


def test_a_training_checkpoint_of_the_released_code_says_what_to_do(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "args": argparse.Namespace(lr=1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"holds argparse.Namespace, .*torch.save\(\{'model': ") as refused:
        read_tensors(tmp_path / "x.pth")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda p: p.write_bytes(b"not a checkpoint at all"), "not a readable torch file"),
        (lambda p: p.write_bytes(b""), "not a readable torch file"),
        (lambda p: p.write_text("<html>404</html>"), "not a readable torch file"),
        (lambda p: torch.save([1, 2], p), "not a state dict but list"),
        (lambda p: torch.save({}, p), "not a state dict but dict"),
        (lambda p: torch.save({"state": TENSORS}, p), "'state' is dict, and a tensor is .*'model' and 'module'"),
        (lambda p: torch.save({"model": {"a": 1}}, p), "'model': not a state dict: 'a' is int"),
        (lambda p: None, "no such file"),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "x.pth"
    content(path)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_tensors(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_cut_files_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1000)}}, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    for size in (len(content) // 2, len(content) - 10, 4):
        (tmp_path / "x.pth").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="not a readable torch file"):
            read_tensors(tmp_path / "x.pth")
    save_file({"a": torch.zeros(1000)}, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_tensors(tmp_path / "x.safetensors")


def test_answers_by_label(tmp_path: Path) -> None:
    path = tmp_path / "answer2label.txt"
    path.write_text('{"answer": "net", "label": 0}\n{"answer": "caf\\u00e9", "label": "1"}\n')
    assert read_answer2label(path)["answers"] == ["net", "café"]
    for content, message in (
        ('{"answer": "net", "label": 1}', "line 1: label 1, and labels must count up from 0"),
        ('{"answer": "net"}', "line 1: not of the form"),
        ("net", "line 1: not of the form"),
        ("", "holds no answers"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_answer2label(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_answer2label(tmp_path / "absent")
