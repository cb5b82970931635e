from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mhmoe_vl.config import validate_config
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.report.collect import cost_parity, read_run
from tests.unit.report.runs import CARD, MODEL, run_config, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    source = {"kind": "vqa", "shards": "absent"}
    config = run_config(tmp_path / "vqa", {"kind": "vqa", "answers": "absent.json"}, source, tmp_path / "absent.json")
    records = [{"kind": "train", "step": 2, "loss": 1.5}, {"kind": "validation", "step": 2, "vqa": 1.25}]
    return write_run(config, records=records, card=CARD)


def test_a_run_is_read_without_its_data(run: Path) -> None:
    record = read_run(run, task="vqa")
    assert record.task == "vqa"
    assert record.card == CARD
    assert record.train == [{"kind": "train", "step": 2, "loss": 1.5}]
    assert record.validation == [{"kind": "validation", "step": 2, "vqa": 1.25}]
    assert record.experts == []


def test_a_run_of_another_task_says_where_it_belongs(run: Path) -> None:
    with pytest.raises(ConfigError, match="is a run of task 'vqa'; give it as --vqa"):
        read_run(run, task="nlvr2")


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        read_run(tmp_path / "nowhere", task="vqa")


@pytest.mark.parametrize("content", ["{", "[]", '{"task": "vqa"}', '{"colour": 3}'])
def test_a_broken_score_card_is_one_line_that_names_it(run: Path, content: str) -> None:
    (run / "vqa_score.json").write_text(content)
    with pytest.raises(DataError, match=r"vqa_score\.json: ") as error:
        read_run(run, task="vqa")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("environment", "commands"),
    [
        ({"command": ["__main__.py", "--config", "a b.yaml"]}, ["python -m mhmoe_vl.train --config 'a b.yaml'"]),
        (
            {"command": ["__main__.py", "--config", "x.yaml", "seed=3"], "world_size": 4},
            ["torchrun --nproc-per-node 4 -m mhmoe_vl.train --config x.yaml seed=3"],
        ),
        ({"command": ["sweep.py", "7"]}, ["sweep.py 7"]),
        (
            {
                "command": ["__main__.py", "--config", "x.yaml"],
                "first_step": 7,
                "earlier": [{"command": ["__main__.py", "--config", "x.yaml"], "world_size": 2, "first_step": 0}],
            },
            [
                "torchrun --nproc-per-node 2 -m mhmoe_vl.train --config x.yaml",
                "python -m mhmoe_vl.train --config x.yaml",
            ],
        ),
        ({}, []),
    ],
)
def test_the_commands_can_be_given_to_a_shell(run: Path, environment: dict[str, Any], commands: list[str]) -> None:
    (run / "environment.json").write_text(json.dumps(environment))
    assert read_run(run, task="vqa").commands == commands


def parity(**changes: Any) -> str:
    return cost_parity(validate_config(ModelConfig, MODEL | changes))


def test_the_reference_costs_what_it_costs() -> None:
    assert parity(ffn="smoe", moe={"num_experts": 4, "every": 1}) == (
        "smoe in every block: 4 experts of width 64, top-1; against the reference SMoE (4 experts of width 64, top-1): "
        "FLOPs +0.00%, parameters +0.00%"
    )


def test_mhmoe_without_matching_is_said_to_be_dearer() -> None:
    # Per token of width 32: 2 rows of width 16 through 4 * 16 * 64 FLOPs of an expert and 2 * 16 * 4 of the router, and
    # head and merge layers of 4 * 32 * 32; the reference spends 4 * 32 * 64 + 2 * 32 * 4.
    flops = (2 * (4 * 16 * 64 + 2 * 16 * 4) + 4 * 32 * 32) / (4 * 32 * 64 + 2 * 32 * 4) - 1
    line = parity()
    assert line.startswith("mhmoe in one block of 2: 4 experts of width 64, top-1, 2 heads; ")
    assert f"FLOPs {flops:+.2%}," in line


def test_a_dense_model_has_no_experts() -> None:
    assert parity(ffn="dense") == "dense: every block has a feed-forward layer of width 64, no experts"
