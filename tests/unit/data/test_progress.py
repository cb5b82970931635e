"""Progress: everything is passed through, with a bar on a terminal and lines in a log."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from mhmoe_vl.data.prepare.progress import show_progress

SHOW = """
from mhmoe_vl.data.prepare.progress import show_progress
for _ in show_progress(range(200), label="things", amount=lambda _: 2, total={total}):
    pass
"""


def on_a_terminal(total: int | None) -> str:
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", SHOW.format(total=total)], stderr=theirs) as run:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
    os.close(ours)
    assert run.returncode == 0
    return shown.decode()


def test_a_bar_if_the_total_is_known() -> None:
    shown = on_a_terminal(400)
    assert "things: 400 of 400" in shown
    assert "━━━" in shown


def test_a_count_if_it_is_not() -> None:
    shown = on_a_terminal(None)
    assert "things: 400" in shown
    assert "━" not in shown


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("mhmoe_vl.data.prepare.progress._SECONDS_BETWEEN_LINES", 0.0)
    assert list(show_progress("ab", label="things", amount=lambda _: 2, total=4)) == ["a", "b"]
    assert list(show_progress("a", label="others", amount=lambda _: 2)) == ["a"]
    assert capsys.readouterr().err == "things: 2 of 4\nthings: 4 of 4\nothers: 2\n"
