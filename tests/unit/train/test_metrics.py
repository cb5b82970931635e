"""``metrics.jsonl``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhmoe_vl.errors import OutputError
from mhmoe_vl.train.metrics import MetricsWriter, ProgressBar, read_metrics
from tests.unit.train.full_disk import full_disk


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


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, num_steps_done=0)
    writer.write("train", 1, {"loss": float("nan"), "nested": {"a": [float("inf"), 1.5]}, "note": "NaN"})
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=refuse)
    assert found == {"kind": "train", "step": 1, "loss": None, "nested": {"a": [None, 1.5]}, "note": "NaN"}


def test_records_wait_while_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(tmp_path, num_steps_done=0)
    writer._board = None  # has a test of its own
    with full_disk(after=100):
        for step in range(1, 6):
            writer.write("train", step, {"text": "x" * 30})
        # No half record is left.
        assert [record["step"] for record in read_metrics(tmp_path, "train")] == [1]
        assert (tmp_path / "metrics.jsonl").read_text().endswith("\n")
    assert [message for message in caplog.messages if "records wait in memory" in message] == caplog.messages[:1]
    writer.write("train", 6, {})
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]
    assert len(caplog.messages) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_what_never_could_be_written_is_said_to_be_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(tmp_path, num_steps_done=0)
    with full_disk(after=10):
        writer.write("train", 1, {"loss": 1.0})
        writer.write("train", 2, {"loss": 1.0})
        writer.close()
    assert caplog.messages[-1].endswith("metrics.jsonl: the last 2 records could not be written and are lost")


def test_tensorboard_may_fail_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(tmp_path, num_steps_done=0)
    assert writer._board is not None
    with mock.patch.object(writer._board, "add_scalar", side_effect=OSError(28, "No space left on device")):
        writer.write("train", 1, {"loss": 1.0})
    writer.write("train", 2, {"loss": 1.0})
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [1, 2]
    assert "TensorBoard gets no more events until the run is resumed: No space left on device" in caplog.text


def test_metrics_that_cannot_be_opened_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match="cannot write metrics: Is a directory"):
        MetricsWriter(tmp_path, num_steps_done=0)


def test_progress_is_plain_lines_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for enabled in (True, False):
        with ProgressBar("vqa", 10, enabled=enabled) as bar:
            bar.update(3)
            bar.show(4, "loss 1.0")
            bar.note(5, "validation 2.0")
    assert capsys.readouterr().err == "vqa 4/10 loss 1.0\nvqa 5/10 validation 2.0\n"


def test_on_a_terminal_a_long_note_stands_above_the_bar_in_full(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    figures = ", ".join(f"{name}_perplexity 1234.567" for name in ("mim", "mlm", "pair_mim", "pair_mlm", "captioning"))
    with ProgressBar("pretrain", 400, enabled=True) as bar:
        bar.show(200, "loss 12.345 1234 samples/s load max 2.3x mean skipped 2 steps")
        bar.note(200, f"validation {figures}")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert f"pretrain 200/400 validation {figures}" in " ".join(shown.split())
    bar_line = [line for line in re.split(r"[\r\n]", shown) if "━" in line][-1]
    assert len(bar_line) <= 100
    for part in ("pretrain", "200/400", "loss 12.345 1234 samples/s load max 2.3x mean skipped 2 steps"):
        assert part in bar_line
