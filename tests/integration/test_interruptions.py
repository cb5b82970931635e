"""What is kept when a run is asked to stop, diverges, or loses what it does not need."""

from __future__ import annotations

import logging
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

from mhmoe_vl.config import validate_config
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import ConfigError, NonFiniteError
from mhmoe_vl.train import run, run_directory
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.dry_run import dry_run
from mhmoe_vl.train.metrics import read_metrics
from mhmoe_vl.train.stop import STOPPED
from mhmoe_vl.train.trained import cost_of
from tests.distributed.fork_harness import run_ranks
from tests.integration.runs import (
    figures,
    final_weights,
    fine_tuning,
    pretraining,
    tensors_of_checkpoint,
    train,
    write_config,
)
from tests.integration.test_steps import spoiled

ROOT = Path(__file__).parents[2]


def validated(shards: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A run with four batches of held-out texts."""
    tree = pretraining(shards, out, **changes)
    tree["data"] |= {
        "validation": {"text": {"kind": "text", "shards": str(shards / "text-val")}},
        "validation_batch_size": 2,
    }
    return tree


def saved_steps(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def validated_steps(out: Path) -> list[int]:
    return [record["step"] for record in read_metrics(out, "validation")]


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_whoever_is_asked_to_stop_saves_and_does_not_validate(
    shards: Path, tmp_path: Path, stop_signal: signal.Signals
) -> None:
    """Torchrun kills after 30 seconds: what is due is validated when the run goes on."""
    tree = validated(shards, tmp_path, validate_every=2)
    with mock.patch.object(run, "validate", side_effect=AssertionError):
        train(tree, stop_after=2, stop_signal=stop_signal)
    assert saved_steps(tmp_path) == ["step_0000002"]
    assert validated_steps(tmp_path) == []
    train(tree)
    assert validated_steps(tmp_path) == [2, 4]
    assert list(figures(tmp_path)) == [1, 2, 3, 4]


def test_a_run_is_saved_before_it_validates(shards: Path, tmp_path: Path) -> None:
    """The last steps too: a run that is killed while it validates has only that to do."""
    tree = validated(shards, tmp_path, checkpoint_every=2, validate_every=2)
    with mock.patch.object(run, "validate", side_effect=MemoryError), pytest.raises(MemoryError):
        train(tree)
    assert saved_steps(tmp_path) == ["step_0000002"]
    with mock.patch.object(run, "validate", return_value={"mlm": 1.0}):
        train(tree)
    (tmp_path / "model.safetensors").unlink()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line for line in lines if '"validation", "step": 4' not in line))
    assert validated_steps(tmp_path) == [2]
    assert train(tree) == []
    assert validated_steps(tmp_path) == [2, 4]
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_validation_is_broken_off_to_save(shards: Path, tmp_path: Path, num_ranks: int) -> None:
    """By a signal to one rank, after the first of its batches."""
    tree = validated(shards, tmp_path, validate_every=1, checkpoint_every=100)
    whole = run.validate

    def interrupted(*arguments: Any, should_stop: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments, should_stop=should_stop)

    def stopped(world: World) -> None:
        with (
            mock.patch.object(run, "validate", interrupted if world.is_main else whole),
            pytest.raises(SystemExit) as e,
        ):
            run.train(validate_config(RunConfig, tree), world)
        assert e.value.code == STOPPED

    run_ranks(stopped, num_ranks)
    assert saved_steps(tmp_path) == ["step_0000001"]
    assert validated_steps(tmp_path) == []
    # Once more, while step 1 is validated that was left out.
    run_ranks(stopped, num_ranks)
    assert saved_steps(tmp_path) == ["step_0000001"]
    run_ranks(lambda world: train(tree, world), num_ranks)
    assert validated_steps(tmp_path) == [1, 2, 3, 4]


def test_a_stop_at_the_last_step_leaves_the_rest_for_later(shards: Path, tmp_path: Path) -> None:
    tree = validated(shards, tmp_path)
    train(tree, stop_after=4)
    assert saved_steps(tmp_path) == ["step_0000004"]
    assert not (tmp_path / "model.safetensors").exists()
    assert train(tree) == []
    assert validated_steps(tmp_path) == [4]
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("num_presses", [1, 2])
def test_ctrl_c(shards: Path, tmp_path: Path, num_presses: int) -> None:
    """As a terminal sends it: to the whole process group, so to the loader's workers too."""
    tree = pretraining(shards, tmp_path / "run", max_steps=100_000)
    tree["data"]["num_workers"] = 1
    config = write_config(tmp_path / "x.yaml", tree)
    with subprocess.Popen(
        [sys.executable, "-m", "mhmoe_vl.train", "--config", config],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            while not read_metrics(tmp_path / "run", "train"):
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.1)
            for _ in range(num_presses):
                os.killpg(process.pid, signal.SIGINT)
            _, printed = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "Traceback" not in printed
    if num_presses == 1:
        assert process.returncode == STOPPED, printed
        assert saved_steps(tmp_path / "run")
    else:
        # The second one may come before Python has looked at the first: then they count as one.
        assert process.returncode in (-signal.SIGINT, STOPPED)


def test_skipped_steps_are_counted_and_said_once(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), spoiled({1, 2, 4}):
        train(pretraining(shards, tmp_path, max_steps=6, log_every=3))
    records = read_metrics(tmp_path, "train")
    assert [record.get("skipped_steps") for record in records] == [2, 1]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pretrain ")]
    assert [line.rpartition("skipped ")[2] for line in lines] == ["2 steps", "1 step"]
    assert [message for message in caplog.messages if "not finite" in message] == [
        "step 2: loss or gradient is not finite, the step is skipped; further ones are only counted, as skipped_steps"
    ]


def test_what_is_not_finite_is_null_in_the_records(shards: Path, tmp_path: Path) -> None:
    with spoiled({1}):
        train(pretraining(shards, tmp_path, max_steps=2))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert figures(tmp_path)[2]["grad_norm"] is None


def test_a_run_that_diverged_goes_on_as_it_is_advised_to(shards: Path, tmp_path: Path) -> None:
    tree = pretraining(shards, tmp_path, max_steps=8, checkpoint_every=2)
    with spoiled({3, 4, 5}), pytest.raises(NonFiniteError) as caught:
        train(tree)
    assert "a lower optimizer.learning_rate (or another optimizer.clip_norm or precision)" in str(caught.value)
    tree["optimizer"]["learning_rate"] = 1e-3
    assert len(train(tree)) == 4
    assert list(figures(tmp_path)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert figures(tmp_path)[5]["learning_rate"] < 1e-3 < figures(tmp_path)[4]["learning_rate"]
    assert run_directory.load_run(tmp_path).optimizer.learning_rate == 1e-3
    (_, second) = run_directory.starts_of(tmp_path)
    assert second["changed"] == {"optimizer.learning_rate": {"was": 1e-2, "is": 1e-3}}


def test_a_fine_tuning_goes_on_without_the_run_that_it_began_with(shards: Path, tmp_path: Path) -> None:
    pretrained = tmp_path / "pretrained"
    train(pretraining(shards, pretrained, max_steps=2))
    tree = fine_tuning(shards, tmp_path / "run", "nlvr2", pretrained)
    whole = fine_tuning(shards, tmp_path / "whole", "nlvr2", pretrained)
    train(whole)
    train(tree, stop_after=1)
    shutil.rmtree(pretrained)
    assert "resumes" in dry_run(validate_config(RunConfig, tree))
    assert len(train(tree)) == 1
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "whole")


def test_a_finished_run_that_is_started_again_tells_nothing_new(shards: Path, tmp_path: Path) -> None:
    """On two processes and with other settings, which have done no step."""
    tree = pretraining(shards, tmp_path, max_steps=2)
    train(tree)
    names = ("environment.json", "config.yaml", "cost.json")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    tree["optimizer"]["learning_rate"] = 1e-5
    assert run_ranks(lambda world: train(tree, world), 2) == [[], []]
    assert {name: (tmp_path / name).read_bytes() for name in names} == before


def test_a_run_that_went_on_elsewhere_says_both(shards: Path, tmp_path: Path) -> None:
    tree = pretraining(shards, tmp_path)
    train(tree, stop_after=1)
    run_ranks(lambda world: len(train(tree, world)), 2)
    first, second = run_directory.starts_of(tmp_path)
    assert [(start["first_step"], start["world_size"]) for start in (first, second)] == [(0, 1), (1, 2)]
    where = cost_of(tmp_path)["trained_on"]
    assert where.startswith("1 x ")
    assert "; from step 1 on 2 x " in where


def moved(shards: Path, to: Path, kind: str = "images") -> str:
    shutil.copytree(shards / f"{kind}-train", to)
    return str(to)


def test_shards_may_move(shards: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    tree = pretraining(shards, out)
    train(pretraining(shards, whole))
    train(tree, stop_after=2)
    tree["data"]["train"]["image"]["shards"] = moved(shards, tmp_path / "moved")
    train(tree)
    assert tensors_of_checkpoint(out, 4) == tensors_of_checkpoint(whole, 4)
    assert run_directory.load_run(out).data.train["image"].shards == str(tmp_path / "moved")


def test_other_data_of_the_same_number_are_refused(shards: Path, tmp_path: Path) -> None:
    """The same shards in another order, here: every checksum is known, but not at this place."""
    tree = pretraining(shards, tmp_path / "run")
    train(tree, stop_after=1)
    before = run_directory.load_run(tmp_path / "run")
    tree["data"]["train"]["image"]["shards"] = sorted(map(str, (shards / "images-train").glob("*.tar")), reverse=True)
    with pytest.raises(ConfigError, match=r"data order would change: checksums\.train\.image was '[0-9a-f]{16}', is '"):
        train(tree)
    # A start that is refused does not count.
    assert run_directory.load_run(tmp_path / "run") == before


def test_other_held_out_data_are_refused_too(shards: Path, tmp_path: Path) -> None:
    tree = validated(shards, tmp_path / "run")
    train(tree, stop_after=1)
    tree["data"]["validation"]["text"]["shards"] = str(shards / "text-train")
    with pytest.raises(ConfigError, match=r"checksums\.validation\.text was"):
        train(tree)


def test_checkpoints_that_know_no_checksums_resume(shards: Path, tmp_path: Path) -> None:
    tree = pretraining(shards, tmp_path)
    order = run._Run._data_order

    def older(self: Any) -> dict[str, Any]:
        return {name: value for name, value in order(self).items() if name != "checksums"}

    with mock.patch.object(run._Run, "_data_order", older):
        train(tree, stop_after=1)
    assert len(train(tree)) == 3


def test_a_list_of_broken_samples_that_cannot_be_written_does_not_end_the_run(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = tmp_path / "pairs"
    shutil.copytree(shards / "pairs-train", pairs)
    (shard,) = pairs.glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    shard.write_bytes(content)
    out = tmp_path / "run"
    (out / "broken_samples.rank0.txt").mkdir(parents=True)
    tree = pretraining(shards, out)
    tree["data"]["train"]["pair"]["shards"] = str(pairs)
    assert len(train(tree)) == 4
    assert sum(record.get("broken_samples", 0) for record in read_metrics(out, "train")) > 0
    assert "broken_samples.rank0.txt: cannot write: Is a directory; not listed: " in caplog.text
