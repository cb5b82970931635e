"""``python -m mhmoe_vl.train`` as a user meets it: dry runs, one line for each mistake, torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mhmoe_vl.config import validate_config
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import exit_on_user_error
from mhmoe_vl.train.__main__ import main
from mhmoe_vl.train.build import build_task
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.metrics import read_metrics
from mhmoe_vl.train.run import train as run_training
from tests.distributed.fork_harness import run_ranks
from tests.integration.runs import pretraining, train, write_config
from tests.integration.test_steps import spoiled

ROOT = Path(__file__).parents[2]
Change = Callable[[dict[str, Any], Path], object]


def fails_with_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[Any, str]:
    """Exit code and the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert line.endswith("\n")
    return stopped.value.code, line


def set_key(*path: str, to: Any) -> Change:
    def change(tree: dict[str, Any], folder: Path) -> None:
        node = tree
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = to(folder) if callable(to) else to

    return change


MISTAKES: dict[str, tuple[Change, int, str]] = {
    "unknown key": (set_key("optimizer", "lerning_rate", to=1), 64, "did you mean 'learning_rate'?"),
    "missing shards": (
        set_key("data", "train", "text", "shards", to=lambda folder: str(folder / "absent")),
        65,
        "no shards at ",
    ),
    "missing tokenizer": (
        set_key("data", "text_tokenizer", to=lambda folder: str(folder / "absent.json")),
        64,
        "absent.json: No such file or directory, but the configuration names it for text_tokenizer",
    ),
    "small vocabulary": (set_key("model", "vocab_size", to=299), 64, "set model.vocab_size=300 or more"),
    "another codebook": (
        set_key("model", "num_visual_codes", to=17),
        64,
        "model.num_visual_codes: 17, but",
    ),
    "other patches": (set_key("model", "patch_size", to=8), 64, "set model.patch_size=16"),
    "light source": (
        set_key("data", "train", "text", "weight", to=0.1),
        64,
        "less than one of the 6 samples",
    ),
    "wrong kind of shard": (
        lambda tree, _: tree["data"]["train"]["text"].update(shards=tree["data"]["train"]["image"]["shards"]),
        65,
        "is a shard of kind 'image', but source 'text' needs 'text'",
    ),
    "stream to validate on": (
        set_key("data", "validation", to={"x": {"kind": "text", "shards": "https://host/x.tar"}}),
        64,
        "data.validation.x.shards: URLs are streamed for training on image, text, pair only",
    ),
    "command in a URL": (
        set_key("data", "train", "text", "shards", to="pipe:cat x.tar"),
        64,
        "data.train.text.shards: 'pipe:' runs a shell command",
    ),
    "no weights to start from": (set_key("init_from", to=lambda folder: str(folder)), 74, "model.safetensors"),
    "experts that cannot be shared out": (
        set_key("expert_parallel", to=3),
        64,
        "expert_parallel: 3 must divide the 4 experts of a layer; use 2 or 4, or model.moe.num_experts=6",
    ),
    "spread experts under ddp": (
        lambda tree, _: tree.update(expert_parallel=2, strategy="ddp"),
        64,
        "expert_parallel: 2 needs strategy=fsdp (or auto), not 'ddp'",
    ),
    "heads that cannot be shared out": (
        lambda tree, _: (
            tree.update(expert_parallel=4),
            tree["model"].update(ffn="mhmoe_head_parallel"),
        ),
        64,
        "expert_parallel: 4 must divide the 2 heads (model.moe.num_heads) that mhmoe_head_parallel spreads over "
        "processes; use 2",
    ),
    "heads with a capacity": (
        lambda tree, _: (
            tree.update(expert_parallel=2),
            tree["model"].update(ffn="mhmoe_head_parallel"),
            tree["model"]["moe"].update(capacity_factor=1.0),
        ),
        64,
        "expert_parallel: 2 exchanges whole heads, which cannot have a capacity",
    ),
    "nothing to spread": (
        lambda tree, _: (tree.update(expert_parallel=2), tree["model"].update(ffn="dense")),
        64,
        "expert_parallel: 2 needs experts, and model.ffn is dense",
    ),
    "too few processes": (
        set_key("expert_parallel", to=2),
        64,
        "expert_parallel: 2 must divide the number of processes, 1; use 1",
    ),
    "unwritable run directory": (
        lambda tree, folder: tree.update(out=write_config(folder / "file", {}) + "/run"),
        73,
        "cannot create the run directory",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str) -> None:
    change, code, message = MISTAKES[mistake]
    tree = pretraining(shards, tmp_path / "run")
    change(tree, tmp_path)
    found, line = fails_with_one_line(capsys, ["--config", write_config(tmp_path / "x.yaml", tree)])
    assert message in line
    assert found == code


def test_the_number_of_processes_is_checked_before_they_form_a_group(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one would wait for five others."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    config = write_config(tmp_path / "x.yaml", pretraining(shards, tmp_path / "run"))
    message = "error: expert_parallel: 4 must divide the number of processes, 6; use 3 or 6\n"
    for arguments in ([], ["--dry-run"]):
        assert fails_with_one_line(capsys, ["--config", config, "expert_parallel=4", *arguments]) == (64, message)


def test_a_corrected_mistake_may_use_the_same_directory(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = pretraining(shards, tmp_path / "run", max_steps=2)
    config = write_config(tmp_path / "x.yaml", tree)
    code, _ = fails_with_one_line(capsys, ["--config", config, "model.vocab_size=299"])
    assert code == 64
    assert main(["--config", config]) == 0
    code, line = fails_with_one_line(capsys, ["--config", config, "seed=7"])
    assert code == 73
    assert line.startswith(f"error: {tmp_path / 'run'}: holds another run (seed was 0, is 7); choose another out=")


def test_damage_to_every_checkpoint_is_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = pretraining(shards, tmp_path / "run", max_steps=2)
    train(tree)
    (file,) = (tmp_path / "run" / "checkpoints").glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    code, line = fails_with_one_line(capsys, ["--config", write_config(tmp_path / "x.yaml", tree)])
    assert code == 74
    assert "no intact checkpoint (1 damaged)" in line


def test_divergence_is_one_line(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "x.yaml", pretraining(shards, tmp_path / "run", log_every=100))
    with spoiled({0, 1, 2}):
        code, line = fails_with_one_line(capsys, ["--config", config])
    assert code == 76
    assert "lower optimizer.learning_rate" in line


def test_a_dry_run_prints_sizes_and_looks_at_the_data(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = pretraining(shards, tmp_path / "run")
    tree["data"]["validation"] = {"pair": {"kind": "pair", "shards": str(shards / "pairs-val")}}
    config = write_config(tmp_path / "x.yaml", tree)
    assert main(["--config", config, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for expected in (
        "task pretrain, ffn mhmoe",
        "forward FLOPs per token",
        "sparse layers: ",
        "train.image: 24 items",
        "train.text: 24 items",
        "validation.pair: 8 items",
        "layout: 1 process, strategy none\n",
    ):
        assert expected in printed
    assert main(["--config", config, "--dry-run", "expert_parallel=2"]) == 0
    layout = "layout: 2 processes, strategy fsdp, the 4 experts of each pool spread over 2 (2 experts on each)\n"
    assert layout in capsys.readouterr().out
    task = build_task(validate_config(RunConfig, tree))
    assert f"parameters {sum(p.numel() for p in task.parameters()):,} (encoder" in printed
    for override, code in (
        ("data.train.image.shards=absent", 65),
        ("data.train.image.weight=0.01", 64),
        ("data.text_tokenizer=absent", 65),
        ("model.num_visual_codes=99", 64),
    ):
        assert fails_with_one_line(capsys, ["--config", config, "--dry-run", override])[0] == code


@pytest.mark.parametrize("rank", [0, 1])
def test_what_all_processes_find_one_says(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Dry runs, printed configurations and mistakes, under torchrun; every process exits alike."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = write_config(tmp_path / "x.yaml", pretraining(shards, tmp_path / "run"))
    assert main(["--config", config, "--dry-run"]) == 0
    assert main(["--config", config, "--print-config"]) == 0
    assert capsys.readouterr().out.count("layout: 2 processes") == (1 if rank == 0 else 0)
    for arguments, code in ((["seeed=1"], 64), (["--dry-run", "data.train.text.shards=absent"], 65)):
        with pytest.raises(SystemExit) as stopped:
            main(["--config", config, *arguments])
        assert stopped.value.code == code
        assert capsys.readouterr().err.count("error: ") == (1 if rank == 0 else 0)


def test_what_one_process_finds_it_says(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Once they form a group: shards that are not on every machine, and a run directory that only rank 0 looks at."""
    tree = pretraining(shards, tmp_path / "run")

    def finds(world: World, wrong: Callable[[World], dict[str, Any]]) -> object:
        with pytest.raises(SystemExit) as stopped, exit_on_user_error(rank=world.rank):
            run_training(validate_config(RunConfig, wrong(world)), world)
        return stopped.value.code

    absent = set_key("data", "text_tokenizer", to="absent")
    absent(tree, tmp_path)
    assert run_ranks(lambda world: finds(world, lambda _: tree), 2) == [64, 64]
    assert capfd.readouterr().err.count("error: absent: No such file") == 1


@pytest.mark.slow
def test_torchrun_trains(shards: Path, tmp_path: Path) -> None:
    """Two real processes."""
    tree = pretraining(shards, tmp_path / "run", max_steps=2, strategy="fsdp", expert_parallel=2)
    config = write_config(tmp_path / "x.yaml", tree)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*command, "-m", "mhmoe_vl.train", "--config", config],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "source pair: 24 items, 33.3 % of each step" in finished.stderr
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert [record["step"] for record in read_metrics(tmp_path / "run", "train")] == [1, 2]
    assert (tmp_path / "run" / "model.safetensors").is_file()
