"""The command line, on a pretraining run that was really trained and a fine-tuning run whose files the test wrote."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from mhmoe_vl.distributed.world import World
from mhmoe_vl.report.__main__ import main
from mhmoe_vl.train.run import train
from tests.unit.report.runs import (
    CARD,
    run_config,
    write_codebook,
    write_pairs,
    write_run,
    write_shard,
    write_tokenizer,
)

WORLD = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
VOID = {"meta", "img", "br", "link", "input"}
HOSTILE = "is <script>alert(1)</script> & red?"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pretrain``, trained for 4 steps, and ``vqa``, made by hand."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer, codebook = write_tokenizer(folder / "tokenizer.json"), write_codebook(folder / "codebook.safetensors")
    pairs = {"kind": "pair", "shards": str(write_pairs(folder / "pairs.tar"))}
    train(
        run_config(folder / "pretrain", {"kind": "pretrain", "visual_codebook": str(codebook)}, pairs, tokenizer), WORLD
    )

    kinds = {"question_type": "is", "answer_type": "yes/no"}
    questions = [{"question_id": 7, "question": HOSTILE, "answers": ["no"] * 10} | kinds]
    shard = write_shard(folder / "vqa.tar", "vqa", [({"image_id": 1, "questions": questions}, ["png"])])
    (folder / "answers.json").write_text(json.dumps({"answers": ["yes", "no"]}))
    task = {"kind": "vqa", "answers": str(folder / "answers.json")}
    config = run_config(folder / "vqa", task, {"kind": "vqa", "shards": str(shard)}, tokenizer)
    records = [
        {"kind": "train", "step": 2, "vqa": 0.75, "vqa_accuracy": 0.5, "samples_per_second": 10.0},
        {"kind": "validation", "step": 2, "vqa": 0.5, "vqa_accuracy": 0.25},
    ]
    directory = write_run(config, records=records, card=CARD)
    (directory / "vqa_predictions.json").write_text(json.dumps([{"question_id": 7, "answer": "no"}]))
    return folder


def report(runs: Path, out: Path, *tasks: str, options: tuple[str, ...] = ()) -> str:
    given = [word for task in tasks for word in (f"--{task}", str(runs / task))]
    assert main([*given, "--out", str(out), *options]) == 0
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(runs, tmp_path_factory.mktemp("out") / "report.html", "pretrain", "vqa")


class Checker(HTMLParser):
    """Notes references and ids, and that tags close in the order in which they opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "srcset", "poster", "data"}:
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    checker = checked(page)
    assert len(checker.ids) == len(set(checker.ids))
    for reference in checker.references:
        assert reference.startswith("data:image/") or reference.removeprefix("#") in checker.ids, reference[:80]
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_every_section_of_what_is_there_and_no_other(page: str) -> None:
    sections = re.findall(r'<section id="([^"]*)"', page)
    assert sections == ["scores", "curves", "experts", "analysis", "codebook", "masked", "samples-vqa", "made"]
    assert re.findall(r'<a href="#([^"]*)"', page) == sections


def test_scores_stand_beside_their_baselines_and_cost(page: str) -> None:
    text = html.unescape(re.sub(r"<[^>]*>", " ", page))
    for shown in (
        "43.22",
        "21.50",
        "30.25",
        "1,234",
        "7,654,321",
        "765,432",
        "98,765",
        "76.1 min",
        "2 x Some GPU",
        "question-only prior",
        "12.62",
    ):
        assert shown in text, shown
    assert "mhmoe in one block of 2: 4 experts of width 64" in text


def test_retrieval_and_classification_have_sections(runs: Path, tmp_path: Path) -> None:
    tokenizer = runs / "tokenizer.json"
    ranked = {"captions_of": {str(n): [f"{n}/1"] for n in range(12)}, "images_of": {}}
    rankings = {"whole": ranked, "fold_size": None, "captions_per_image": None}
    (tmp_path / "classes.json").write_text(json.dumps({"classes": [HOSTILE]}))
    shard = write_shard(tmp_path / "c.tar", "class", [({"class": HOSTILE}, ["png"])])
    for task, source, name, predictions in (
        ({"kind": "retrieval"}, {"kind": "pair", "shards": str(runs / "pairs.tar")}, "retrieval_rankings", rankings),
        (
            {"kind": "classification", "classes": str(tmp_path / "classes.json")},
            {"kind": "class", "shards": str(shard)},
            "class_predictions",
            {"0000": [HOSTILE]},
        ),
    ):
        kind = task["kind"]
        records = [{"kind": "train", "step": 2, kind: 0.75, f"{kind}_accuracy": 0.5, "samples_per_second": 10.0}]
        card = replace(CARD, task=kind, blind=None)
        directory = write_run(run_config(tmp_path / kind, task, source, tokenizer), records=records, card=card)
        (directory / f"{name}.json").write_text(json.dumps(predictions))
    page = report(tmp_path, tmp_path / "report.html", "retrieval", "classification")
    checked(page)
    sections = re.findall(r'<section id="([^"]*)"', page)
    assert sections == ["scores", "curves", "samples-retrieval", "samples-classification", "made"]
    assert page.count("✓ the large blue circle") == 8
    assert f"✓ {html.escape(HOSTILE)}" in page
    for shown in ("recall@1, %", "accuracy, %", "chance", "majority answer", "nats per choice", "nats per image"):
        assert shown in page, shown


def test_curves_and_experts_are_those_of_the_run(page: str, runs: Path) -> None:
    records = [json.loads(line) for line in (runs / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "validation"][-1]
    assert f"<td>{last['pair_mlm']:.3f}</td><td>{last['pair_mlm_perplexity']:,.2f}</td>" in page
    entropy = [record for record in records if record["kind"] == "experts"][-1]["entropy"]
    for pool, value in entropy.items():
        row = re.search(rf"<tr><td>{pool}</td>(.*?)</tr>", page)
        assert row is not None
        assert f"<td>{value:.3f}</td>" in row[1]


def test_experts_are_analysed_on_the_validation_of_the_run(page: str) -> None:
    section = page[page.index('<section id="analysis"') : page.index('<section id="masked"')]
    assert "12 samples of source" in section
    assert "60 vision tokens" in section  # 12 images of 4 patches and a class token
    assert section.count('alt="its patches by distinct experts"') == 8
    for shown in ("Representation collapse", "Experts active", "Distinct experts per token", "content words"):
        assert shown in section
    assert "Routing fluctuation" not in section  # nothing to compare with


def test_the_analysis_can_be_left_out(runs: Path, tmp_path: Path) -> None:
    page = report(runs, tmp_path / "report.html", "pretrain", options=("--num-analysed", "0"))
    assert re.findall(r'<section id="([^"]*)"', page) == ["curves", "experts", "codebook", "masked", "made"]


def test_alarms_of_the_run_are_told(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "pretrain", tmp_path / "pretrain")
    (tmp_path / "pretrain" / "model.safetensors").unlink()
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    for record in records:
        if record["kind"] == "experts":
            record["alarms"] = {"block1/text": ["dead"]}
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = report(tmp_path, tmp_path / "report.html", "pretrain")
    assert '<span class="wrong">Alarm:</span> block1/text: dead experts in steps 1 to 4' in page


def test_the_codes_of_the_run_are_counted_on_its_validation(page: str) -> None:
    section = page[page.index('<section id="codebook"') : page.index('<section id="masked"')]
    assert "12 held-out images" in section
    assert "48 patches" in section
    assert "one code takes 54.2% of all patches" in section  # images of noise, whose patches are all of middle gray
    assert "whether too few are\nused is not judged" in section
    assert section.count(', decoded">') == section.count('alt="patches of code') == 2


def test_masked_pairs_have_four_pictures_and_their_words(page: str) -> None:
    section = page[page.index('<section id="masked"') : page.index('<section id="samples-vqa"')]
    assert section.count("<article>") == 8
    assert section.count("<img ") == 4 * 8
    assert "of 2 codes right" in section  # 40 % of 4 patches
    assert '<span class="word' in section


def test_text_of_data_is_escaped_and_judged(page: str) -> None:
    assert "<script" not in page
    section = page[page.index('<section id="samples-vqa"') :]
    assert html.escape(HOSTILE) in section
    assert '<span class="verdict right">' in section


def test_how_it_was_made_is_there(page: str) -> None:
    made = html.unescape(page[page.index('<section id="made"') :])
    assert "python -m mhmoe_vl.train --config x.yaml" in made
    assert "seed: 5" in made
    assert "python -m mhmoe_vl.report --pretrain" in made


def test_the_same_runs_give_the_same_bytes(page: str, runs: Path, tmp_path: Path) -> None:
    again = report(runs, tmp_path / "report.html", "pretrain", "vqa")
    assert re.sub(r"--out \S+", "", again) == re.sub(r"--out \S+", "", page)


def test_an_unfinished_run_shows_what_it_has(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "pretrain", tmp_path / "pretrain")
    (tmp_path / "pretrain" / "model.safetensors").unlink()
    page = report(tmp_path, tmp_path / "report.html", "pretrain")
    assert re.findall(r'<section id="([^"]*)"', page) == ["curves", "experts", "made"]
    (tmp_path / "pretrain" / "metrics.jsonl").unlink()
    page = report(tmp_path, tmp_path / "report.html", "pretrain")
    assert re.findall(r'<section id="([^"]*)"', page) == ["made"]
    checked(page)


def test_shards_of_the_validation_may_be_gone(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then there are no samples, and a note; shards that somebody names must be there."""
    for task, shard in (("vqa", "vqa.tar"), ("pretrain", "pairs.tar")):
        shutil.copytree(runs / task, tmp_path / task)
        config = (tmp_path / task / "config.yaml").read_text()
        assert shard in config
        (tmp_path / task / "config.yaml").write_text(config.replace(shard, "gone.tar"))
    page = report(tmp_path, tmp_path / "report.html", "pretrain", "vqa")
    assert re.findall(r'<section id="([^"]*)"', page) == ["scores", "curves", "experts", "made"]
    notes = [html.unescape(note) for note in re.findall(r"<li>(.*?no samples.*?)</li>", page)]
    assert [note.partition(": ")[0] for note in notes] == ["Pretraining", "Visual question answering"]
    assert all("no samples: no shards at " in note and "gone.tar" in note for note in notes)
    assert caplog.messages == notes
    checked(page)
    page = report(tmp_path, tmp_path / "report.html", "vqa", options=("--num-samples", "0"))
    assert "no samples" not in page
    gone = ["--vqa-data", str(tmp_path / "gone.tar")]
    with pytest.raises(SystemExit) as exit_info:
        main(["--vqa", str(tmp_path / "vqa"), "--out", str(tmp_path / "report.html"), *gone])
    assert exit_info.value.code == 65
    assert capsys.readouterr().err.count("\n") == 1


def test_captioning_is_compared_with_a_caption(runs: Path, tmp_path: Path) -> None:
    source = {"kind": "pair", "shards": str(runs / "pairs.tar")}
    config = run_config(tmp_path / "captioning", {"kind": "captioning"}, source, runs / "tokenizer.json")
    card = replace(CARD, task="captioning", metric="CIDEr x 100", blind=None, cost={}, details={}, notes=())
    write_run(config, card=card)
    page = report(tmp_path, tmp_path / "report.html", "captioning")
    assert "best constant caption" in page
    assert "n/a" in page
    assert 'id="samples-captioning"' not in page


def test_scores_are_written_too(runs: Path, tmp_path: Path) -> None:
    report(runs, tmp_path / "report.html", "vqa", options=("--scores", str(tmp_path / "scores.json")))
    expected = {"vqa": {"score": 43.217, "majority": 21.5, "blind": 30.25, "n": 1234}}
    assert json.loads((tmp_path / "scores.json").read_text()) == expected


def test_no_run_is_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--out", str(tmp_path / "report.html")])
    assert exit_info.value.code == 64
    assert "give at least one of --pretrain, --vqa, --nlvr2, --captioning" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
