"""What a study is made of, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mhmoe_vl.config import load_config, validate_config
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.study.cells import Cell, Plan
from mhmoe_vl.study.config import StudyConfig
from mhmoe_vl.study.cost import costs_of, mismatches, require_parity
from tests.unit.study.builders import study_tree

ROOT = Path(__file__).parents[3]
#: Other files of the folder are runs, or have no arms.
STUDIES = sorted(path.name for path in (ROOT / "configs/study").glob("*.yaml") if "\narms:" in path.read_text())


def plan_of(folder: Path, **changes: Any) -> Plan:
    return Plan(validate_config(StudyConfig, study_tree(folder, **changes)))


def test_the_studies_that_there_are() -> None:
    assert {f"{name}.yaml" for name in (
        "main", "heads", "head_merge_layers", "no_split", "experts", "experts_wide", "top_k", "inner_residual",
        "router", "pools", "balancing", "controls", "smoke", "targets",
    )} == set(STUDIES)  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_valid_runs_of_equal_cost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = Plan(load_config(StudyConfig, Path("configs/study") / name))
    require_parity(mismatches(plan, costs_of(plan)))
    assert plan.out.name in (Path(name).stem, "study-smoke")


def test_arms_in_a_seed_differ_in_their_layer_alone(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, arms={"smoe": {"ffn": "smoe"}, "mhmoe": {"ffn": "mhmoe", "num_experts": 8, "seed_offset": 5}}
    )
    smoe, mhmoe = (plan.base_run(Cell("train", "masked", arm, 1)).model_dump() for arm in plan.arms)
    assert (smoe.pop("seed"), mhmoe.pop("seed")) == (1, 6)
    assert (smoe["model"].pop("ffn"), mhmoe["model"].pop("ffn")) == ("smoe", "mhmoe")
    assert (smoe["model"]["moe"].pop("num_experts"), mhmoe["model"]["moe"].pop("num_experts")) == (4, 8)
    assert smoe.pop("out") != mhmoe.pop("out")
    assert smoe == mhmoe


def test_order_of_settings(tmp_path: Path) -> None:
    """The arm's are above the task's, which are above the study's."""
    tree = study_tree(tmp_path, overrides=["model.dim=32", "model.depth=4", "data.text_length=8"])
    tree["tasks"]["masked"]["overrides"] = ["model.dim=64", "model.depth=6"]
    tree["arms"] = {"smoe": {"ffn": "smoe", "overrides": ["model.depth=8"]}}
    plan = Plan(validate_config(StudyConfig, tree))
    run = plan.base_run(plan.cells[0])
    assert (run.model.dim, run.model.depth, run.data.text_length, run.model.moe.match) == (64, 8, 8, "flops")


def test_settings_of_task_runs_alone(tmp_path: Path) -> None:
    """A fine-tuning knows nothing of masked modeling's weights."""
    tree = study_tree(tmp_path)
    run = yaml.safe_load((tmp_path / "run.yaml").read_text())
    (tmp_path / "vqa.yaml").write_text(
        yaml.safe_dump(
            run
            | {
                "task": {"kind": "vqa", "answers": "unused"},
                "data": run["data"] | {"train": {"vqa": {"kind": "vqa", "shards": "unused"}}},
            }
        )
    )
    tree["tasks"]["masked"]["fine_tunings"] = {"vqa": {"config": str(tmp_path / "vqa.yaml")}}
    tree["arms"]["mhmoe"] = {"ffn": "mhmoe", "overrides": ["model.depth=4"], "task_overrides": ["task.mim_weight=0"]}
    plan = Plan(validate_config(StudyConfig, tree))
    arm = plan.arms[1]
    task, fine = (
        plan.base_run(Cell(kind, "masked", arm, 0, fine_tuning=name))
        for kind, name in (("train", None), ("fine", "vqa"))
    )
    assert (task.task.mim_weight, task.model.depth) == (0, 4)
    assert (fine.task.kind, fine.model.depth) == ("vqa", 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "smo"}, "'smo' is not an arm .did you mean 'smoe'.*; arms: smoe, mhmoe"),
        ({"comparisons": [["mhmoe", "dense"]]}, "'dense' is not an arm"),
        ({"comparisons": [["smoe", "smoe"]]}, "'smoe' is compared with itself; give it a second arm with seed_offset"),
        ({"seeds": [1, 1]}, "seeds: .1, 1. names one of them twice"),
        ({"learning_rates": {"factors": [1, 1]}}, "learning_rates.factors: "),
        ({"arms": {"a/b": {"ffn": "smoe"}}}, "arms.a/b"),
        ({"arms": {"smoe": {"ffn": "smo"}}}, "arms.smoe.ffn: 'smo'"),
        ({"seed": [1]}, "seed: unknown key .did you mean 'seeds'.*; known keys: title, out"),
        (
            {"arms": {"smoe": {"ffn": "smoe", "num_experts": [4]}, "mhmoe": {"ffn": "mhmoe", "num_experts": [8]}}},
            "comparisons: mhmoe and smoe have no number of experts in common",
        ),
        ({"arms": {"smoe": {"ffn": "smoe", "num_experts": [4]}, "smoe-4": {"ffn": "smoe"}}}, "called 'smoe-4'"),
        ({"variance": "shared"}, "variance: 'shared'"),
        ({"overrides": ["model.dmi=3"]}, "arm smoe of task masked: .*run.yaml: model.dmi: unknown key"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        assert not plan_of(tmp_path, **changes).comparisons


def test_fine_tunings_start_from_those_before_them(tmp_path: Path) -> None:
    tree = study_tree(tmp_path)
    run = tree["tasks"]["masked"]["config"]
    tree["tasks"]["masked"]["fine_tunings"] = {"b": {"config": run, "after": "a"}, "a": {"config": run}}
    with pytest.raises(ConfigError, match=r"fine_tunings.b.after: 'a' is not a fine-tuning before it; before it: none"):
        validate_config(StudyConfig, tree)
    tree["tasks"]["masked"]["fine_tunings"] = {"a": {"config": run}, "b": {"config": run, "after": "a"}}
    plan = Plan(validate_config(StudyConfig, tree))
    cell = plan.cell("fine/masked/smoe/seed1/b")
    assert [needed.name for needed in plan.needs(cell)] == ["fine/masked/smoe/seed1/a"]
    assert [needed.name for needed in plan.needs(plan.needs(cell)[0])] == ["train/masked/smoe/seed1"]


def test_fine_tunings_of_some_arms(tmp_path: Path) -> None:
    tree = study_tree(tmp_path, arms={"smoe": {"ffn": "smoe", "num_experts": [4, 8]}, "mhmoe": {"ffn": "mhmoe"}})
    tree["comparisons"] = []
    tree["arms"]["mhmoe"]["num_experts"] = [4, 8]
    run = tree["tasks"]["masked"]["config"]

    def arms_of(first: Any, second: Any) -> dict[str, list[str]]:
        tree["tasks"]["masked"]["fine_tunings"] = {
            "a": {"config": run, "arms": first}, "b": {"config": run, "after": "a", "arms": second},
        }  # fmt: skip
        plan = Plan(validate_config(StudyConfig, tree))
        return {
            name: [cell.arm.name for cell in plan.cells if (cell.fine_tuning, cell.seed) == (name, 1)]
            for name in ("a", "b")
        }

    assert arms_of(["smoe", "mhmoe-8"], ["mhmoe-8"]) == {"a": ["smoe-4", "smoe-8", "mhmoe-8"], "b": ["mhmoe-8"]}
    with pytest.raises(ConfigError, match=r"fine_tunings.b.arms: smoe-4 is not among those of 'a'"):
        arms_of(["mhmoe"], ["smoe-4"])
    with pytest.raises(ConfigError, match=r"fine_tunings.a.arms: 'mhmo-8' is not an arm .did you mean 'mhmoe-8'"):
        arms_of(["mhmo-8"], None)


def test_a_figure_is_tested_or_only_shown(tmp_path: Path) -> None:
    tree = study_tree(tmp_path)
    tree["tasks"]["masked"]["other_metrics"] = ["pair_mlm"]
    with pytest.raises(ConfigError, match=r"tasks.masked.other_metrics: 'pair_mlm' is among its metrics already"):
        validate_config(StudyConfig, tree)
