"""Whole studies at tiny size: they end the same however they are interrupted, and find nothing where nothing is."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mhmoe_vl.config import validate_config
from mhmoe_vl.data.loader import MicroBatch
from mhmoe_vl.errors import ConfigError, DataError, OutputError
from mhmoe_vl.study import execute, stopwatch
from mhmoe_vl.study.__main__ import main, state_of, write_results
from mhmoe_vl.study.cells import Plan
from mhmoe_vl.study.config import StudyConfig
from mhmoe_vl.study.execute import chosen_factor, directory_of, require_same_study, run_all, try_cell
from mhmoe_vl.study.results import as_json, collect
from mhmoe_vl.study.stopwatch import measure_times, read_times
from mhmoe_vl.study.tables import markdown
from mhmoe_vl.tasks.base import Task
from mhmoe_vl.train import run
from mhmoe_vl.train.metrics import read_metrics
from mhmoe_vl.train.step import train_step
from tests.integration.runs import fine_tuning, pretraining, write_config

ROOT = Path(__file__).parents[2]
IDENTITY = ["model.moe.num_heads=1", "model.moe.num_head_layers=0", "model.moe.num_merge_layers=0"]


def study(shards: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Two kinds, one task, two seeds, the sweep on the first of them."""
    tree = pretraining(
        shards, folder / "unused", max_steps=4, validate_every=2, checkpoint_every=2, num_micro_batches=1
    )
    tree["data"]["validation"] = {"pair": {"kind": "pair", "shards": str(shards / "pairs-val")}}
    tree["model"] |= {"drop_path": 0.0, "ffn_dim": 64, "moe": {"num_experts": 4, "num_heads": 2}}
    folder.mkdir(exist_ok=True)
    return {
        "title": "tiny",
        "out": str(folder / "out"),
        "match": "none",
        "arms": {"smoe": {"ffn": "smoe"}, "mhmoe": {"ffn": "mhmoe", "num_experts": [4]}},
        "baseline": "smoe",
        "tasks": {"masked": {"config": write_config(folder / "task.yaml", tree), "metrics": ["pair_mlm", "pair_mim"]}},
        "seeds": [0, 1],
        "learning_rates": {"factors": [0.5, 1], "seed": 0},
        "num_timed_steps": 2,
        **changes,
    }


def plan_of(tree: dict[str, Any]) -> Plan:
    return Plan(validate_config(StudyConfig, tree))


def tables(plan: Plan) -> dict[str, Any]:
    """Everything that does not come from a clock."""
    results = collect(plan)
    found = json.loads(json.dumps(as_json(results)))
    found.pop("timings")
    found.pop("config")  # has paths
    return found | {"markdown": markdown(results)}


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = plan_of(study(shards, tmp_path_factory.mktemp("study") / "x"))
    run_all(plan)
    return plan


def test_a_study_from_end_to_end(finished: Plan) -> None:
    # Four runs of the sweep, of which two are those of seed 0, and two of seed 1.
    assert [cell.name for cell in finished.cells] == [
        *(f"sweep/masked/{arm}/x{factor}" for arm in ("smoe", "mhmoe-4") for factor in ("0.5", "1")),
        *(f"train/masked/{arm}/seed{seed}" for seed in (0, 1) for arm in ("smoe", "mhmoe-4")),
    ]
    runs = {str(path.parent.relative_to(finished.out)) for path in finished.out.rglob("model.safetensors")}
    assert len(runs) == 6
    assert not any(name.endswith("seed0") for name in runs)
    found = tables(finished)
    assert found["num_finished"] == found["num_cells"] == 8
    first = found["outcomes"][0]
    assert (first["name"], first["unit"]) == ("pair_mlm", "nats")
    for arm, result in zip(("smoe", "mhmoe-4"), first["arms"], strict=True):
        (sweep,) = [sweep for sweep in found["sweeps"] if sweep["arm"] == arm]
        assert sweep["chosen"] == float(min(sweep["losses"], key=sweep["losses"].get))
        last = read_metrics(finished.out / f"train/masked/{arm}/seed1", "validation")[-1]
        assert last["step"] == 4
        assert result["values"] == {"0": min(sweep["losses"].values()), "1": last["pair_mlm"]}
        values = list(result["values"].values())
        assert result["perplexity"]["mean"] == pytest.approx(sum(map(math.exp, values)) / 2)
        trained = yaml.safe_load((finished.out / f"train/masked/{arm}/seed1/config.yaml").read_text())
        assert trained["optimizer"]["learning_rate"] == pytest.approx(1e-2 * sweep["chosen"])
        assert found["curves"]["masked"]["pair_mlm"][arm]["1"]["step"] == [2, 4]
    assert found["num_comparisons"] == 2
    assert not list(finished.out.rglob("checkpoints"))
    write_results(finished, collect(finished))
    written = json.loads((finished.out / "study.json").read_text())
    assert {name for name in written if written[name] != found.get(name)} == {"timings", "config"}
    assert (finished.out / "study.md").read_text() == found["markdown"]
    page = (finished.out / "study.html").read_text()
    assert "mhmoe-4" in page
    assert "<script" not in page


def test_nothing_is_done_twice_and_the_same_seeds_give_the_same_numbers(
    finished: Plan, shards: Path, tmp_path: Path
) -> None:
    with mock.patch.object(execute, "train", side_effect=AssertionError):
        run_all(finished)
    again = plan_of(study(shards, tmp_path / "again"))
    run_all(again)
    assert tables(again) == tables(finished)


def test_killed_anywhere_and_started_again_it_ends_the_same(finished: Plan, shards: Path, tmp_path: Path) -> None:
    """A kill at a step, which may be of any cell, in each of several starts; then to the end by two workers."""
    tree = study(shards, tmp_path / "killed")
    killed = plan_of(tree)
    whole_step = run.train_step

    class Killed(BaseException):
        """As sudden as a signal, for what is on disk."""

    for stop_after in (3, 6, 5):
        done = 0

        def step(*arguments: Any, stop_after: int = stop_after, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done > stop_after:
                raise Killed
            return whole_step(*arguments, **options)

        with mock.patch.object(run, "train_step", step), pytest.raises(Killed):
            run_all(killed)
    config = write_config(tmp_path / "study.yaml", tree)
    command = [sys.executable, "-m", "mhmoe_vl.study", "--config", config]
    # A real kill -9, as soon as there is something to lose.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    begun = "*/*/*/*/metrics.jsonl"
    num_before = len(list(killed.out.glob(begun)))
    while process.poll() is None and len(list(killed.out.glob(begun))) == num_before:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode in (-signal.SIGKILL, 0)
    run_all(killed)
    assert tables(killed) == tables(finished)
    for path in finished.out.rglob("model.safetensors"):
        twin = load_file(killed.out / path.relative_to(finished.out))
        assert all((tensor == twin[name]).all() for name, tensor in load_file(path).items())


def test_several_workers(
    finished: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of the cells, by two processes; a study may be moved."""
    tree = finished.config.model_dump(mode="json") | {"out": str(tmp_path / "out")}
    shutil.copytree(finished.out, tmp_path / "out")
    for arm in ("smoe", "mhmoe-4"):
        shutil.rmtree(tmp_path / f"out/train/masked/{arm}/seed1")
    monkeypatch.chdir(ROOT)
    assert main(["--config", write_config(tmp_path / "study.yaml", tree), "--workers", "2"]) == 0
    printed = capsys.readouterr()
    assert "cells 8/8 finished" in printed.err
    assert "study.html" in printed.out
    assert tables(plan_of(tree)) == tables(finished)
    assert {times.arm for times in read_times(plan_of(tree), "masked")} == {"smoe", "mhmoe-4"}


def test_steps_are_timed_in_turns_on_the_same_samples_and_change_nothing(finished: Plan) -> None:
    config = finished.config.model_copy(update={"num_timed_steps": 3})
    plan = Plan(config)
    seen: list[tuple[int, list[torch.Tensor], bool]] = []

    def step(module: Task, optimizer: Any, micro_batches: list[MicroBatch], **options: Any) -> Any:
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        train_step(module, optimizer, micro_batches, **options)
        is_same = all((tensor == before[name]).all() for name, tensor in module.state_dict().items())
        seen.append((id(module), [micro["pair"].image for micro in micro_batches], bool(is_same)))

    with mock.patch.object(stopwatch, "train_step", step):
        measure_times(plan)
    smoe, mhmoe = read_times(plan, "masked")
    assert (smoe.arm, mhmoe.arm, mhmoe.reference) == ("smoe", "mhmoe-4", "smoe")
    assert len(mhmoe.seconds) == len(mhmoe.reference_seconds) == 3
    assert min(*mhmoe.seconds, *mhmoe.reference_seconds) > 0
    # Two arms, each with its reference, two steps to warm up and three; who is first alternates.
    assert len(seen) == 20
    for (first, images, _), (second, others, _) in zip(seen[::2], seen[1::2], strict=True):
        assert first != second
        assert all((image == other).all() for image, other in zip(images, others, strict=True))
    assert [first for first, *_ in seen[10::2]] == [seen[10][0], seen[11][0]] * 2 + [seen[10][0]]
    assert all(is_same for *_, is_same in seen)
    with mock.patch.object(stopwatch, "train_step", side_effect=AssertionError):
        measure_times(plan)
    # Other settings, other times; with data that are gone, none.
    slower = Plan(config.model_copy(update={"overrides": ("data.batch_size=12",)}))
    assert read_times(slower, "masked") == []
    (path,) = (plan.out / "times").iterdir()
    path.unlink()
    with mock.patch.object(stopwatch, "build_dataset", side_effect=DataError("no such shard")):
        measure_times(plan)
    assert read_times(plan, "masked") == []


def test_a_worker_that_fails_is_heard(
    finished: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(finished.config.model_dump(mode="json") | {"out": str(tmp_path)})
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(SystemExit) as stopped:
        main(["--config", write_config(tmp_path / "s.yaml", plan.config.model_dump(mode="json")), "--workers", "2"])
    assert stopped.value.code == 70
    assert "a worker ended with exit code 1" in capsys.readouterr().err


def test_a_cell_that_another_process_is_at_is_left_to_it(shards: Path, tmp_path: Path) -> None:
    plan = plan_of(study(shards, tmp_path / "x"))
    first, *_, last = plan.cells
    assert state_of(plan, first) == "ready"
    assert state_of(plan, last) == "waiting"
    path = str(execute._lock_of(plan, first).lock_file)
    hold = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", hold, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    assert state_of(plan, first) == "running"
    assert not try_cell(plan, first)
    holder.kill()
    holder.wait()
    assert try_cell(plan, first)
    assert state_of(plan, first) == "finished"


def test_one_cell_by_name(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "study.yaml", study(shards, tmp_path / "x"))
    assert main(["--config", config, "--cell", "sweep/masked/smoe/x1"]) == 0
    assert main(["--config", config, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "finished  sweep/masked/smoe/x1" in lines
    assert "ready     sweep/masked/smoe/x0.5" in lines
    assert "waiting   train/masked/smoe/seed1" in lines
    for name, message in (
        ("train/masked/smoe/seed1", "needs sweep/masked/smoe/x0.5, which is not finished"),
        ("train/masked/smo/seed1", "did you mean 'train/masked/smoe/seed1'"),
    ):
        with pytest.raises(SystemExit):
            main(["--config", config, "--cell", name])
        assert message in capsys.readouterr().err
    assert main(["--config", config, "--only-report"]) == 0
    assert "Unfinished: 1 of 8 runs." in (tmp_path / "x/out/study.md").read_text()


def test_finished_runs_must_be_those_of_the_configuration(finished: Plan) -> None:
    tree = finished.config.model_dump(mode="json")
    tree["overrides"] = ["data.num_workers=1", "log_every=2"]
    require_same_study(plan_of(tree))
    for setting in ("max_steps=6", "model.dim=32", "optimizer.learning_rate=0.5"):
        tree["overrides"] = [setting]
        with pytest.raises(OutputError, match="holds another run"):
            require_same_study(plan_of(tree))


def test_controls_find_nothing(shards: Path, tmp_path: Path) -> None:
    """One head without layers is the SMoE to the last bit; a kind under other seeds does not differ from itself."""
    arms = {
        "smoe": {"ffn": "smoe"},
        "one-head": {"ffn": "mhmoe", "overrides": IDENTITY},
        "other-seeds": {"ffn": "smoe", "seed_offset": 10},
    }
    plan = plan_of(
        study(shards, tmp_path / "x", arms=arms, match="flops", seeds=[0, 1, 2], learning_rates={"factors": [1]})
    )
    run_all(plan)
    found = tables(plan)
    for outcome in found["outcomes"]:
        one_head, other_seeds = outcome["comparisons"]
        assert one_head["verdict"] == "one-head and smoe: identical at 3 seeds"
        assert "no difference at 3 seeds" in other_seeds["verdict"]
        assert other_seeds["difference"]["mean"] != 0


def test_fine_tuning_and_evaluation(shards: Path, tmp_path: Path) -> None:
    tree = study(shards, tmp_path / "x", seeds=[3], learning_rates={"factors": [1]}, arms={"smoe": {"ffn": "smoe"}})
    base = yaml.safe_load(Path(tree["tasks"]["masked"]["config"]).read_text())
    files = {}
    for task in ("vqa", "nlvr2"):
        fine = fine_tuning(shards, tmp_path / "unused", task, tmp_path) | {
            "model": base["model"],
            "num_micro_batches": 1,
        }
        files[task] = write_config(tmp_path / f"{task}.yaml", fine)
    evaluation = {"program": "vqa", "data": str(shards / "vqa-val")}
    tree["tasks"]["masked"]["fine_tunings"] = {
        "vqa": {"config": files["vqa"], "metrics": ["vqa_accuracy"], "evaluation": evaluation},
        "nlvr2": {"config": files["nlvr2"], "after": "vqa", "metrics": ["nlvr2"]},
    }
    plan = plan_of(tree)
    run_all(plan)
    vqa = plan.out / "fine/masked/smoe/seed3/vqa"
    config = yaml.safe_load((vqa / "config.yaml").read_text())
    assert config["init_from"] == str(plan.out / "train/masked/smoe/seed3")
    assert config["seed"] == 3
    after = yaml.safe_load((plan.out / "fine/masked/smoe/seed3/nlvr2/config.yaml").read_text())
    assert after["init_from"] == str(vqa)
    found = {outcome["name"]: outcome for outcome in tables(plan)["outcomes"]}
    assert list(found) == ["pair_mlm", "pair_mim", "vqa: score", "vqa: vqa_accuracy", "nlvr2: nlvr2"]
    card = json.loads((vqa / "vqa_score.json").read_text())
    assert found["vqa: score"]["arms"][0]["values"] == {"3": card["score"]}
    assert found["vqa: score"]["unit"] == "points"


def test_a_run_that_diverges_is_a_result(shards: Path, tmp_path: Path) -> None:
    tree = study(
        shards, tmp_path / "x", arms={"smoe": {"ffn": "smoe"}}, learning_rates={"factors": [1, 1e30], "seed": 5}
    )
    tree["overrides"] = ["max_bad_steps=1", "optimizer.clip_norm=null", "optimizer.warmup_steps=0"]
    plan = plan_of(tree)
    run_all(plan)
    diverged = plan.out / "sweep/masked/smoe/x1e+30"
    assert "not finite" in json.loads((diverged / "diverged.json").read_text())["message"]
    (arm,) = plan.arms
    assert chosen_factor(plan, "masked", arm) == 1
    found = tables(plan)
    assert found["sweeps"][0]["losses"]["1e+30"] is None
    assert "diverged" in found["markdown"]
    assert directory_of(plan, plan.cells[-1]) == plan.out / "train/masked/smoe/seed1"


def test_a_figure_that_no_validation_has(shards: Path, tmp_path: Path) -> None:
    tree = study(shards, tmp_path / "x", arms={"smoe": {"ffn": "smoe"}})
    tree["tasks"]["masked"]["metrics"] = ["lm"]
    with pytest.raises(ConfigError, match=r"'lm' is not a figure of the validation of .*, which has .*pair_mlm"):
        run_all(plan_of(tree))
