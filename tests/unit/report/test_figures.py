from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from xml.etree import ElementTree

import pytest

from mhmoe_vl.report.figures import (
    Band,
    affinity_heat_map,
    bands,
    curves,
    dots,
    grid_heat_map,
    load_heat_map,
    modality_of,
    pool_curves,
    score_bars,
)
from tests.unit.report.runs import CARD

LOAD = {"block1/vision": [0.25, 0.5, 0.0, 0.25], "block1/text": [0.25, 0.25, 0.25, 0.25]}

BAND = Band(x=[1e9, 2e9], y=[20.0, 10.0], low=[19.0, 9.5], high=[22.0, 11.0])


@cache
def figures() -> dict[str, str]:
    return {
        "scores": score_bars(CARD),
        "curves": curves({"a": [(1, 1.0), (2, 0.5)], "b": [(1, 2.0)]}, ylabel="loss", name="one"),
        "log": curves({"a": [(1, 90.0), (2, 5.0)]}, ylabel="perplexity", log=True, name="two"),
        "pools": pool_curves({"block1/vision": [(1, 0), (2, 3)], "block1/text": [(1, 1)]}, ylabel="dead", name="three"),
        "heat": load_heat_map(LOAD, name="four"),
        "affinity": affinity_heat_map({"block1/shared": [0.2, 0.9, 0.5]}, mean=0.6, name="six"),
        "grid": grid_heat_map([[1.0, 1.5], [2.0, 1.25]], limits=(1.0, 2.0), name="seven"),
        "dots": dots({"content words": 1.25, "numbers": 1.5}, xlabel="distinct experts", name="eight"),
        "bands": bands({"arm": BAND, "other": BAND}, xlabel="FLOPs", ylabel="perplexity", name="five", log=True),
    }


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]


def test_every_figure_is_an_element_without_prolog_metadata_or_outside_references() -> None:
    for svg in figures().values():
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg")
        assert "viewBox" in root.attrib
        assert "<metadata" not in svg
        assert all(target.startswith(("#", "data:image/png")) for target in re.findall(r'href="([^"]*)"', svg))


def test_colours_of_the_theme_are_css_variables() -> None:
    for name, svg in figures().items():
        assert not re.search(r"#0[1-4]0[1-4]0[1-4]", svg), name
        assert "currentColor" in svg
    assert "var(--series-1)" in figures()["curves"]
    assert "var(--line)" in figures()["curves"]


def test_figures_on_one_page_do_not_share_ids() -> None:
    ids = [found for svg in figures().values() for found in re.findall(r' id="([^"]*)"', svg)]
    assert len(ids) == len(set(ids))
    used = {target for svg in figures().values() for target in re.findall(r'(?:href="|url\()#([^")]*)', svg)}
    assert used == set(ids) != set()


def test_the_same_data_give_the_same_bytes() -> None:
    assert figures() == figures.__wrapped__()


def test_bars_carry_their_values_and_leave_out_what_is_not_known() -> None:
    assert {"43.2", "30.2", "21.5", "model", "blind", "majority answer"} <= set(texts(score_bars(CARD)))
    without = texts(score_bars(replace(CARD, blind=None)))
    assert "43.2" in without
    assert "blind" not in without


def test_the_heat_map_shows_load_over_mean_sorted_in_each_row() -> None:
    shown = texts(load_heat_map(LOAD, name="heat"))
    numbers = [text for text in shown if re.fullmatch(r"\d\.\d", text)]
    assert numbers[:8] == ["2.0", "1.0", "1.0", "0.0", "1.0", "1.0", "1.0", "1.0"]
    assert {"block1/vision", "block1/text"} <= set(shown)


def test_affinity_is_sorted_and_grids_keep_their_places() -> None:
    shown = [text for text in texts(figures()["affinity"]) if re.fullmatch(r"0\.\d", text)]
    assert shown[:3] == ["0.9", "0.5", "0.2"]
    shown = [text for text in texts(figures()["grid"]) if re.fullmatch(r"\d\.\d\d", text)]
    assert shown[:4] == ["1.00", "1.50", "2.00", "1.25"]


def test_dots_carry_their_names_and_values() -> None:
    assert {"content words", "numbers", "1.25", "1.50", "distinct experts"} <= set(texts(figures()["dots"]))


def test_pools_of_different_size_stand_in_one_map() -> None:
    shown = texts(load_heat_map({"a/vision": [0.5, 0.5], "a/text": [0.1, 0.2, 0.7]}, name="heat"))
    assert not any("nan" in text for text in shown)


@pytest.mark.parametrize(("pool", "modality"), [("block3/vision", "vision"), ("block3/shared/text", "text")])
def test_the_modality_is_the_last_part_of_a_pool(pool: str, modality: str) -> None:
    assert modality_of(pool) == modality
