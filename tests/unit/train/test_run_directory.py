"""The run directory: what is copied into it, and when it is refused."""

from __future__ import annotations

import getpass
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from mhmoe_vl.config import validate_config
from mhmoe_vl.errors import ConfigError, OutputError
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.metrics import METRICS
from tests.unit.train.full_disk import full_disk


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Stand-ins for the files that a configuration names; their content is not looked at here."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for name in ("tokenizer.json", "answers.json", "codebook.safetensors"):
        (folder / name).write_text(f"content of {name}")
    return folder


def config_of(inputs: Path, task: str = "pretrain", **changes: Any) -> RunConfig:
    kind = {"pretrain": "pair", "vqa": "vqa"}[task]
    files = {
        "pretrain": {"visual_codebook": str(inputs / "codebook.safetensors")},
        "vqa": {"answers": str(inputs / "answers.json")},
    }
    tree: dict[str, Any] = {
        "out": str(inputs.parent / "run"),
        "task": {"kind": task, **files[task]},
        "model": {"dim": 16, "depth": 2, "num_heads": 2, "ffn_dim": 32, "ffn": "dense"},
        "data": {
            "train": {"x": {"kind": kind, "shards": "shards"}},
            "text_tokenizer": str(inputs / "tokenizer.json"),
            "batch_size": 4,
        },
        "max_steps": 10,
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return validate_config(RunConfig, tree)


def start(config: RunConfig, *, first_step: int = 0, world_size: int = 1) -> Path:
    """What is there once a run trains."""
    local = run_directory.prepare(config)
    run_directory.record_start(local, first_step=first_step, world_size=world_size, cost={"num_params": 1})
    (Path(config.out) / METRICS).touch()
    return Path(config.out)


@pytest.mark.parametrize("task", ["pretrain", "vqa"])
def test_a_run_directory_stands_alone(inputs: Path, task: str) -> None:
    run = start(config_of(inputs, task))
    local = run_directory.prepare(config_of(inputs, task))
    for file in inputs.iterdir():
        file.unlink()
    assert run_directory.load_run(run) == local
    assert Path(local.data.text_tokenizer).read_text() == "content of tokenizer.json"
    named = local.task.visual_codebook if local.task.kind == "pretrain" else local.task.answers  # type: ignore[union-attr]
    assert Path(named).parent == run
    assert Path(named).is_file()
    assert not list(run.glob("*.tmp"))


def test_a_moved_run_directory_is_still_a_run(inputs: Path) -> None:
    run = start(config_of(inputs))
    moved = run.rename(run.with_name("elsewhere"))
    assert run_directory.load_run(moved).out == str(moved)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run directory: config\.yaml is missing"):
        run_directory.load_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"model__dim": 32}, "model.dim was 16, is 32"),
        ({"data__batch_size": 8}, "data.batch_size was 4, is 8"),
        ({"data__train": {"y": {"kind": "pair", "shards": "shards"}}}, "data.train.x.kind was 'pair', is None"),
        ({"optimizer__betas": (0.9, 0.99)}, "optimizer.betas was [0.9, 0.98], is [0.9, 0.99]"),
    ],
)
def test_another_run_is_refused_and_left_as_it_was(inputs: Path, changes: dict[str, Any], message: str) -> None:
    run = start(config_of(inputs))
    (inputs / "tokenizer.json").write_text("another tokenizer")
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    with pytest.raises(OutputError, match=r"holds another run \(") as caught:
        run_directory.prepare(config_of(inputs, **changes))
    assert message in str(caught.value)
    assert str(caught.value).endswith("choose another out= or restore those settings")
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_the_same_settings_with_another_tokenizer_are_another_run(inputs: Path) -> None:
    run = start(config_of(inputs))
    (inputs / "tokenizer.json").write_text("another tokenizer")
    with pytest.raises(OutputError, match=r"differs from its text_tokenizer\.json"):
        run_directory.prepare(config_of(inputs))
    assert (run / "text_tokenizer.json").read_text() == "content of tokenizer.json"


def test_settings_that_do_not_shape_the_result_may_change(inputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = start(config_of(inputs))
    renamed = inputs / "renamed.json"
    (inputs / "tokenizer.json").rename(renamed)
    changes = {"max_steps": 20, "log_every": 3, "checkpoint_every": 5, "data__num_workers": 2, "strategy": "fsdp"}
    start(config_of(inputs, data__text_tokenizer=str(renamed), **changes), first_step=10)
    assert run_directory.load_run(run).max_steps == 20
    assert caplog.text == ""


def test_a_run_that_diverged_or_whose_shards_moved_goes_on_with_a_warning_and_a_record(
    inputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(config_of(inputs))
    changes = {
        "optimizer__learning_rate": 1e-4,
        "optimizer__clip_norm": 0.5,
        "max_bad_steps": 9,
        "precision": "float32",
        "data__train__x__shards": "moved",
    }
    start(config_of(inputs, **changes), first_step=4)
    assert (
        "goes on with other settings: data.train.x.shards was 'shards', is 'moved'; max_bad_steps was 3" in caplog.text
    )
    assert run_directory.load_run(run).optimizer.learning_rate == 1e-4
    first, second = run_directory.starts_of(run)
    assert "changed" not in first
    assert second["first_step"] == 4
    assert second["changed"]["optimizer.learning_rate"] == {"was": 1e-3, "is": 1e-4}
    assert set(second["changed"]) == {key.replace("__", ".") for key in changes}


def test_a_start_without_steps_to_do_leaves_no_trace(inputs: Path) -> None:
    """A finished run that is started again, on other processes and with another learning rate."""
    run = start(config_of(inputs))
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    start(config_of(inputs, optimizer__learning_rate=1e-4), first_step=10, world_size=8)
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_steps_that_are_done_again_belong_to_the_later_start(inputs: Path) -> None:
    for first_step, world_size in ((0, 1), (6, 2), (4, 3), (8, 4)):
        run = start(config_of(inputs), first_step=first_step, world_size=world_size)
    kept = [(start["first_step"], start["world_size"]) for start in run_directory.starts_of(run)]
    assert kept == [(0, 1), (4, 3), (8, 4)]
    assert len(json.loads((run / "environment.json").read_text())["earlier"]) == 3


def test_a_resumed_run_needs_none_of_the_files_that_it_has_copied(
    inputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(config_of(inputs))
    for file in inputs.iterdir():
        file.unlink()
    assert run_directory.prepare(config_of(inputs)) == run_directory.load_run(run)
    assert "going on with the run's own copy" in caplog.text


def test_a_start_that_failed_before_training_may_be_corrected(inputs: Path) -> None:
    run_directory.prepare(config_of(inputs, model__vocab_size=10))
    (inputs / "tokenizer.json").write_text("another tokenizer")
    run = start(config_of(inputs, model__vocab_size=300))
    config = run_directory.load_run(run)
    assert config.model.vocab_size == 300
    assert Path(config.data.text_tokenizer).read_text() == "another tokenizer"


def test_a_named_file_that_is_absent(inputs: Path) -> None:
    (inputs / "codebook.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"codebook\.safetensors: No such file .* names it for visual_codebook"):
        run_directory.prepare(config_of(inputs))


def test_a_directory_that_cannot_be_made(inputs: Path) -> None:
    (inputs.parent / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create the run directory: Not a directory"):
        run_directory.prepare(config_of(inputs, out=str(inputs.parent / "file" / "run")))


def test_a_full_disk_is_one_line(inputs: Path) -> None:
    local = run_directory.prepare(config_of(inputs))
    with full_disk(after=10), pytest.raises(OutputError, match=r"environment\.json: cannot write: File too large"):
        run_directory.record_start(local, first_step=0, world_size=1, cost={})


def test_the_environment_tells_versions_and_nobody_s_name(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/somebody/mhmoe_vl/train/__main__.py", "--config", "x.yaml", "seed=1"])
    start(config_of(inputs), world_size=3)
    text = (inputs.parent / "run" / "environment.json").read_text()
    found = json.loads(text)
    assert found["command"] == ["__main__.py", "--config", "x.yaml", "seed=1"]
    assert found["world_size"] == 3
    assert set(found["packages"]) >= {"mhmoe_vl", "torch", "timm"}
    assert found["packages"]["torch"]
    for private in (platform.node(), getpass.getuser(), os.path.expanduser("~"), os.getcwd(), "somebody"):
        assert f'"{private}"' not in text
        assert len(private) < 5 or private not in text
