from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mhmoe_vl.errors import OutputError
from mhmoe_vl.report.scores import write_scores
from tests.unit.report.runs import CARD


def test_the_file_has_the_headline_figures_of_every_task_and_nothing_else(tmp_path: Path) -> None:
    captioning = replace(CARD, task="captioning", metric="CIDEr x 100", score=118.0, majority=20.0, blind=None, n=40)
    write_scores(tmp_path / "scores.json", [CARD, captioning])
    assert json.loads((tmp_path / "scores.json").read_text()) == {
        "vqa": {"score": 43.217, "majority": 21.5, "blind": 30.25, "n": 1234},
        "captioning": {"score": 118.0, "majority": 20.0, "blind": None, "n": 40},
    }


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"absent/scores\.json: cannot be written: No such file"):
        write_scores(tmp_path / "absent" / "scores.json", [CARD])
