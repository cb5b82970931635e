"""``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhmoe_vl.train.metrics import MetricsWriter, ProgressBar, read_metrics


def write_steps(folder: Path, steps: range, *, num_steps_done: int, loss: float) -> None:
    writer = MetricsWriter(folder, num_steps_done=num_steps_done)
    for step in steps:
        writer.write("train", step, {"loss": loss, "nested": {"a": [1, 2]}})
    writer.write("validation", steps[-1], {"loss": 2 * loss})
    writer.close()


def test_records_come_back_by_kind_and_in_order(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4), num_steps_done=0, loss=1.0)
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [1, 2, 3]
    assert read_metrics(tmp_path, "validation") == [{"kind": "validation", "step": 3, "loss": 2.0}]
    assert read_metrics(tmp_path, "experts") == []
    assert read_metrics(tmp_path / "absent", "train") == []


def test_resuming_keeps_what_was_done_and_drops_what_comes_again(tmp_path: Path) -> None:
    """Killed after step 5, resumed from the checkpoint of step 3: the record of step 3 is not computed again."""
    write_steps(tmp_path, range(1, 6), num_steps_done=0, loss=1.0)
    write_steps(tmp_path, range(4, 7), num_steps_done=3, loss=9.0)
    losses = {record["step"]: record["loss"] for record in read_metrics(tmp_path, "train")}
    assert losses == {1: 1.0, 2: 1.0, 3: 1.0, 4: 9.0, 5: 9.0, 6: 9.0}
    assert [record["step"] for record in read_metrics(tmp_path, "validation")] == [6]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == list(losses.items())


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train", "step": 3, "loss": 1.0', "\x00\x00"])
def test_a_half_written_last_line_is_left_out_and_repaired(tmp_path: Path, torn: str) -> None:
    write_steps(tmp_path, range(1, 3), num_steps_done=0, loss=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [1, 2]
    write_steps(tmp_path, range(3, 4), num_steps_done=2, loss=1.0)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["kind"], record["step"]) for record in records] == [
        ("train", 1),
        ("train", 2),
        ("validation", 2),
        ("train", 3),
        ("validation", 3),
    ]


def test_progress_is_plain_lines_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for enabled in (True, False):
        with ProgressBar("vqa", 10, enabled=enabled) as bar:
            bar.update(3)
            bar.show(4, "loss 1.0")
    assert capsys.readouterr().err == "vqa 4/10 loss 1.0\n"
