"""The page of the documentation: what is in it, and that it is the same for the same results."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from mhmoe_vl.config import load_config
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.study.__main__ import main
from mhmoe_vl.study.cells import Plan
from mhmoe_vl.study.config import StudyConfig
from mhmoe_vl.study.document import write_document
from mhmoe_vl.study.results import Results
from tests.unit.study.builders import finished_study

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two numbers of experts, a figure that is only shown, a fine-tuning of two arms, and published figures."""
    return finished_study(tmp_path_factory.mktemp("document"))


@pytest.fixture(scope="module")
def written(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("docs") / "RESULTS.md"
    folder = path.with_name("results")
    folder.mkdir()
    (folder / "reading.md").write_text("## Our reading\n\nAs *written* | by hand.\n")
    (folder / "gone.svg").touch()
    write_document(results, path, command="the command")
    return path


def test_what_people_wrote_is_taken_over_and_the_rest_is_made(written: Path) -> None:
    text = written.read_text()
    assert "\n## Our reading\n\nAs *written* | by hand.\n\n## Verdicts" in text
    assert "`the command`" in text
    assert "- **masked, pair_mlm**: mhmoe-4 lower than smoe-4 by 0.200" in text
    assert "\n\n\n" not in text
    assert text.endswith("\n")


def test_pictures_are_small_files_of_their_own(written: Path) -> None:
    shown = re.findall(r"!\[[^]]+\]\((results/[^)]+)\)", written.read_text())
    files = {f"results/{path.name}" for path in written.with_name("results").glob("*.svg")}
    assert set(shown) == files
    assert len(shown) == len(files)
    names = ["masked-pair-mlm-steps-4", "masked-pair-mlm-time-4", "masked-pair-mlm-steps-8", "masked-pair-mlm-time-8"]
    names += ["masked-pair-mlm-differences", "masked-vqa-score-differences"]
    assert shown == [f"results/{name}.svg" for name in names]
    for name in shown:
        picture = (written.parent / name).read_text()
        assert len(picture) < 300_000
        assert not re.search(r"var\(|currentColor|#0[1-4]0[1-4]0[1-6]", picture)
        root = ElementTree.fromstring(picture)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert int(root.attrib["width"]) > int(root.attrib["height"]) > 60
        assert root[0].attrib["fill"] == "#ffffff"


def test_the_same_results_give_the_same_bytes(results: Results, written: Path, tmp_path: Path) -> None:
    paths = write_document(results, tmp_path / "RESULTS.md", command="the command")
    assert [path.name for path in paths[:2]] == ["RESULTS.md", "masked-pair-mlm-steps-4.svg"]
    for path in paths[1:]:
        assert path.read_bytes() == (written.parent / path.relative_to(tmp_path)).read_bytes()
    by_hand = "## Our reading\n\nAs *written* | by hand.\n\n"
    assert written.read_text().replace(by_hand, "") == (tmp_path / "RESULTS.md").read_text()


def test_figures_that_are_shown_are_not_tested(results: Results, written: Path) -> None:
    (shown,) = results.outcomes_of("masked", are_tested=False)
    assert shown.name == "pair_mim"
    assert all(comparison.adjusted_p is None for comparison in shown.comparisons)
    # Two pairs of the metric and one of the score: what is only shown costs the others nothing.
    assert results.num_comparisons == 3
    (first, *_) = results.outcomes
    (mhmoe, *_) = first.comparisons
    assert mhmoe.difference is not None
    assert mhmoe.adjusted_p == pytest.approx(3 * (mhmoe.difference.p or 0))
    assert "### masked: Other figures, not tested" in written.read_text()


def test_published_figures_and_baselines_stand_beside_ours(results: Results, written: Path) -> None:
    text = written.read_text()
    # A ratio of perplexities is a difference in nats: ln(12 / 15).
    (mhmoe, *_) = results.outcomes[0].comparisons
    assert mhmoe.published == pytest.approx(math.log(12 / 15))
    assert "| -0.2231 |" in text
    (score,) = [outcome for outcome in results.outcomes if outcome.name == "vqa: score"]
    assert [result.arm for result in score.arms] == ["smoe-4", "mhmoe-4"]
    assert score.arms[0].baselines == {"majority": 22.5, "n": 80}
    assert "| arm | seeds | points | sd of one run | majority | n | a paper |" in text
    assert [comparison.published for comparison in score.comparisons] == [pytest.approx(2.0)]


def test_the_document_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", str(ROOT / "configs/study/smoke.yaml")]
    with pytest.raises(SystemExit):
        main([*config, "--document", "x.md", "--dry-run"])
    assert "--document: is written where results are" in capsys.readouterr().err


def test_a_document_is_markdown(results: Results, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'.*x.html' must be a Markdown file"):
        write_document(results, tmp_path / "x.html", command="")


def test_published_arms_of_the_main_study_are_its_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = Plan(load_config(StudyConfig, Path("configs/study/main.yaml")))
    names = {arm.name for arm in plan.arms}
    for task in plan.config.tasks.values():
        for published in (task.published, *(fine_tuning.published for fine_tuning in task.fine_tunings.values())):
            assert published is not None
            assert published.values.keys() <= names
