"""Alarms are said when they begin."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from mhmoe_vl.distributed.world import World
from mhmoe_vl.moe import RoutingStats
from mhmoe_vl.report.progress import alarm_spans
from mhmoe_vl.train.alarm import CodebookAlarm, ExpertAlarm
from mhmoe_vl.train.journal import Journal
from mhmoe_vl.train.metrics import MetricsWriter, read_metrics

HEALTHY, DEAD, COLLAPSED = [100, 100, 100, 100], [0, 134, 133, 133], [370, 10, 10, 10]


def stats(load: list[int]) -> RoutingStats:
    zero = torch.tensor(0.0, dtype=torch.float64)
    return RoutingStats(torch.tensor(load).double(), zero, zero, torch.tensor(float(sum(load))).double())


def test_an_alarm_is_said_once_and_again_after_a_recovery() -> None:
    alarm = ExpertAlarm()
    said = []
    for load in (HEALTHY, DEAD, DEAD, HEALTHY, DEAD, COLLAPSED):
        alarms, onsets = alarm.check({"block1/text": stats(load)})
        said.append((alarms, [line.split(" since")[0] for line in onsets]))
    dead = "block1/text: 1 of 4 experts were never chosen"
    assert said == [
        ({}, []),
        ({"block1/text": ["dead"]}, [dead]),
        ({"block1/text": ["dead"]}, []),
        ({}, []),
        ({"block1/text": ["dead"]}, [dead]),
        (
            {"block1/text": ["collapsed"]},
            [
                "block1/text: experts have collapsed: entropy of the load 0.25 of 1, the busiest of 4 has 3.7 times "
                "the mean load"
            ],
        ),
    ]


def test_pools_are_told_apart() -> None:
    alarm = ExpertAlarm()
    assert len(alarm.check({"block1/text": stats(DEAD), "block1/vision": stats(HEALTHY)})[1]) == 1
    alarms, onsets = alarm.check({"block1/text": stats(DEAD), "block1/vision": stats(DEAD)})
    assert set(alarms) == {"block1/text", "block1/vision"}
    assert [line.split(":")[0] for line in onsets] == ["block1/vision"]


def test_an_expert_of_a_shared_pool_that_serves_one_modality_is_not_dead() -> None:
    routing = {"block1/shared/vision": stats([0, 0, 100, 100]), "block1/shared/text": stats([100, 100, 0, 0])}
    assert ExpertAlarm().check(routing) == ({}, [])
    dead = {"block1/shared/vision": stats([0, 50, 100, 100]), "block1/shared/text": stats([0, 100, 50, 50])}
    assert ExpertAlarm().check(dead)[0] == {"block1/shared": ["dead"]}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_journal_warns_at_onset_and_records_every_interval(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    config: Any = SimpleNamespace(data=SimpleNamespace(batch_size=8), task=None)
    writer = MetricsWriter(tmp_path, num_steps_done=0) if rank == 0 else None
    journal = Journal(config, World(rank, 2, rank, torch.device("cpu")), writer, 0)
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 1.0, "lr_scale": 1.0}])
    with caplog.at_level(logging.WARNING):
        for step, load in ((10, DEAD), (20, DEAD), (30, HEALTHY)):
            with mock.patch.object(journal.figures, "expert_load", return_value={"block1/text": stats(load)}):
                journal.log(step, optimizer, 1.0)
    lines = [line for line in caplog.messages if "never chosen" in line]
    if rank == 1:
        assert lines == []
        return
    assert writer is not None
    writer.close()
    assert len(lines) == 1
    assert lines[0].startswith("step 10: block1/text: 1 of 4 experts were never chosen since the last log line; ")
    records = read_metrics(tmp_path, "experts")
    assert [record["alarms"] for record in records] == [{"block1/text": ["dead"]}, {"block1/text": ["dead"]}, {}]
    assert [record["num_alarms"] for record in records] == [1, 1, 0]
    thresholds, shares = records[0]["activation_thresholds"], records[0]["activation"]["block1/text"]
    assert dict(zip(thresholds, shares, strict=True)) == {
        0: 0.75,
        0.1: 0.75,
        0.25: 0.75,
        0.5: 0.75,
        0.75: 0.75,
        1: 0.75,
    }
    assert alarm_spans(records) == ["block1/text: dead experts in steps 1 to 20"]


def test_spans_of_alarms() -> None:
    def record(step: int, alarms: dict[str, list[str]]) -> dict[str, Any]:
        return json.loads(json.dumps({"step": step, "alarms": alarms}))

    records = [
        {"step": 10},  # of an earlier version
        record(20, {"a": ["dead"]}),
        record(30, {"a": ["dead", "collapsed"], "b": ["dead"]}),
        record(40, {"b": ["dead"]}),
        record(50, {"a": ["dead"]}),
    ]
    assert alarm_spans(records) == [
        "a: dead experts in steps 11 to 30",
        "a: collapsed experts in steps 21 to 30",
        "b: dead experts in steps 21 to 40",
        "a: dead experts in steps 41 to 50",
    ]


def test_a_codebook_that_collapses_is_said_once() -> None:
    """At a tenth of its codes."""
    alarm = CodebookAlarm(512)
    said = [alarm.check(perplexity) for perplexity in (51.3, 51.1, 20.0, 400.0, 51.1)]
    assert [is_on for is_on, _ in said] == [False, True, True, False, True]
    assert [line is not None for _, line in said] == [False, True, False, False, True]
    assert said[1][1] is not None
    assert said[1][1].startswith("the codebook has collapsed: its use has a perplexity of 51.1, below 10% of its 512")
