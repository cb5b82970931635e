"""The page and the tables of results that the test made up."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from mhmoe_vl.config import validate_config
from mhmoe_vl.study.cells import Cell, Plan
from mhmoe_vl.study.config import StudyConfig
from mhmoe_vl.study.page import render_page
from mhmoe_vl.study.results import Results, as_json, collect
from mhmoe_vl.study.tables import markdown, timing_markdown
from tests.unit.study.builders import study_tree, write_run, write_times

VOID = {"meta", "img", "br", "link", "input"}
#: Losses of the two arms by seed: MH-MoE is lower by 0.2, 0.21 and 0.19.
LOSSES = {"smoe": (3.0, 3.5, 2.5), "mhmoe": (2.8, 3.29, 2.31), "odd": (3.1, 3.4, 2.55)}


class Tags(HTMLParser):
    """Every tag that is opened is closed; collects what would come from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.outside += [
            value or "" for name, value in attributes if name in ("src", "href") and value and "#" not in value
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("page")
    arms = {"smoe": {"ffn": "smoe"}, "mhmoe": {"ffn": "mhmoe"}, "odd": {"ffn": "smoe", "seed_offset": 9}}
    plan = Plan(
        validate_config(StudyConfig, study_tree(folder, arms=arms, seeds=[0, 1, 2], title="A <b>title</b> & more"))
    )
    for arm, losses in zip(plan.arms, LOSSES.values(), strict=True):
        for seed, loss in enumerate(losses):
            write_run(plan, Cell("train", "masked", arm, seed), loss)
    # Ratios to the reference are 1, 1, 1 and 2.4, 2, 2.4; the odd arm has not been timed.
    write_times(plan, "masked", {"smoe": [0.5, 1.0, 1.5], "mhmoe": [1.2, 2.0, 3.6]})
    return collect(plan)


def test_numbers_and_verdicts(results: Results) -> None:
    (outcome,) = results.outcomes
    mhmoe, odd = outcome.comparisons
    assert mhmoe.difference is not None
    assert mhmoe.difference.mean == pytest.approx(-0.2)
    # Standard deviation 0.01 of three: 4.3027 * 0.01 / sqrt(3) = 0.0248.
    assert mhmoe.verdict == "mhmoe lower than smoe by 0.200 ± 0.025 nats (perplexity -18.1%)"
    assert "no difference at 3 seeds" in odd.verdict
    assert mhmoe.adjusted_p == pytest.approx(2 * (mhmoe.difference.p or 0))
    assert results.num_comparisons == 2


def test_tables(results: Results) -> None:
    text = markdown(results)
    assert "| smoe | 3 | 3.00 ± 0.29 | 2" in text
    assert "-0.200 | -0.225 to -0.175 |" in text
    assert "2 comparisons are tested together by Holm" in text
    assert "Unfinished" not in text
    assert "seconds" not in text
    # 6 samples of 5 image and 16 text tokens a step, 126 tokens in the reference's 1 s.
    assert "| smoe | 1.00 | 1.00 to 1.00 | 1.000 | 126 | 3, a machine |" in timing_markdown(results)
    assert "| mhmoe | 2.40 | 2.20 to 2.40 | 2.400 | 52 |" in timing_markdown(results)
    assert "| odd |" not in timing_markdown(results)
    widths: dict[int, set[int]] = {}
    for number, block in enumerate(re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)):
        widths[number] = {len(line.replace("\\|", "").split("|")) for line in block.strip().splitlines()}
    assert all(len(of_table) == 1 for of_table in widths.values())


def test_the_page_stands_alone(results: Results) -> None:
    page = render_page(results)
    assert page == render_page(results)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.outside == []
    assert "<script" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    assert "A &lt;b&gt;title&lt;/b&gt; &amp; more" in page
    assert "<strong>mhmoe lower than smoe" in page
    for title in ("Against steps", "Against compute", "Against time"):
        assert title in page
    assert page.count("<svg ") == 3
    assert not re.search(r"#0[1-4]0[1-4]0[1-6]", page)


def test_json_has_every_seed(results: Results) -> None:
    found = json.loads(json.dumps(as_json(results), allow_nan=False))
    assert found["curves"]["masked"]["pair_mlm"]["mhmoe"]["1"] == {"step": [2, 4], "value": [5.29, 3.29]}
    assert [timing["step_seconds"] for timing in found["timings"]] == pytest.approx([1.0, 2.4])
    assert found["outcomes"][0]["arms"][0]["values"] == {"0": 3.0, "1": 3.5, "2": 2.5}
