"""Tasks of lm-evaluation-harness on local files: scores against counting by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.language import main, scorer_of
from mhmoe_vl.config import load_config
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.evaluation.lm_harness import (
    HarnessTaskConfig,
    LanguageEvaluationConfig,
    baselines,
    run_harness,
    tasks_of_the_harness,
)
from mhmoe_vl.train.trained import load_trained
from tests.integration.runs import ALONE, language_modeling, pretraining, train

ROOT = Path(__file__).parents[2]

QUESTIONS = [
    {"question": "the red square", "choices": ["is left", "of the circle", "and blue"], "answer": place}
    for place in (0, 1, 1, 2, 1)
] + [{"question": "a circle", "choices": ["is", "of"], "answer": 1}]


def test_baselines_by_hand() -> None:
    samples = [{"arguments": [()] * len(q["choices"]), "target": q["answer"]} for q in QUESTIONS]
    chance, majority = baselines(samples)
    assert chance == pytest.approx((5 / 3 + 1 / 2) / 6)
    assert majority == pytest.approx(4 / 6)
    assert baselines([{"arguments": [(), ()], "target": [0, 1]}]) == (None, None)
    assert baselines([{"arguments": [()], "target": "text"}]) == (None, None)


def test_the_named_tasks_are_those_of_the_paper() -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra lm)")
    known = tasks_of_the_harness().all_tasks
    for name, number in (("language", 10), ("xnli", 14)):
        config = load_config(LanguageEvaluationConfig, ROOT / "configs/eval" / f"{name}.yaml")
        assert [task.name for task in config.tasks if task.name not in known] == []
        assert len(config.tasks) == number


@pytest.fixture
def task_files(tmp_path: Path) -> Path:
    """One task of each kind of request, and data in the form of a task that the harness knows."""
    folder = tmp_path / "tasks"
    (folder / "arc_easy").mkdir(parents=True)
    (folder / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "data.jsonl")}},
        "validation_split": "validation",
        "doc_to_text": "{{question}}",
    }
    choice = {
        "task": "shapes", "output_type": "multiple_choice", "doc_to_target": "answer", "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    rolling = {
        "task": "shapes_text", "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{question}}", "metric_list": [{"metric": "byte_perplexity"}],
    }  # fmt: skip
    generation = {
        "task": "shapes_next", "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    for task in (choice, rolling, generation):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    rows = [
        {
            "question": q["question"],
            "choices": {"text": q["choices"], "label": list("ABC")},
            "answerKey": "ABC"[q["answer"]],
        }
        for q in QUESTIONS
    ]
    for split in ("train", "validation", "test"):
        (folder / "arc_easy" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_local_tasks(
    shards: Path,
    corpus: Path,
    task_files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra lm)")
    out = tmp_path / "run"
    train(language_modeling(shards, corpus, out, max_steps=2))
    config = tmp_path / "own.yaml"
    tasks = [
        {"name": "shapes", "metrics": ["acc", "acc_norm"]},
        {"name": "arc_easy"},
        {"name": "shapes_text", "metrics": ["byte_perplexity"]},
        {"name": "shapes_next", "metrics": ["exact_match"]},
    ]
    config.write_text(yaml.safe_dump({"tasks": tasks}))
    arguments = ["--run", str(out), "--config", str(config), "--include", str(task_files)]
    assert main([*arguments, "--local-data", str(task_files)]) == 0
    found = {(s["task"], s["metric"]): s for s in json.loads((out / "own_scores.json").read_text())["scores"]}

    scorer = scorer_of(load_trained(out, ALONE, task_kind="language_modeling"), batch_size=4)
    right = {"acc": 0, "acc_norm": 0}
    for q in QUESTIONS:
        scores = scorer.continuations([(q["question"], " " + choice) for choice in q["choices"]])
        by_length = [s.log_probability / len(c) for s, c in zip(scores, q["choices"], strict=True)]
        plain = [s.log_probability for s in scores]
        right["acc"] += max(range(len(plain)), key=plain.__getitem__) == q["answer"]
        right["acc_norm"] += max(range(len(plain)), key=by_length.__getitem__) == q["answer"]
    for metric, number in right.items():
        score = found["shapes", metric]
        assert score["score"] == pytest.approx(number / 6)
        assert (score["n"], score["chance"], score["majority"]) == (6, pytest.approx(13 / 36), pytest.approx(4 / 6))
    assert found["arc_easy", "acc"]["n"] == 6
    texts = [q["question"] for q in QUESTIONS]
    nats = -sum(score.log_probability for score in scorer.texts(texts))
    assert found["shapes_text", "byte_perplexity"]["score"] == pytest.approx(
        2.718281828 ** (nats / sum(len(text) for text in texts)), rel=1e-5
    )
    assert found["shapes_next", "exact_match"]["chance"] is None
    printed = capsys.readouterr().out
    for expected in ("zero-shot, log-likelihood", "num params", "flops per token", "36.1", "66.7"):
        assert expected in printed


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_there(shards: Path, corpus: Path, task_files: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra lm)")
    train(language_modeling(shards, corpus, tmp_path / "run", max_steps=2))
    scorer = scorer_of(load_trained(tmp_path / "run", ALONE, task_kind="language_modeling"), batch_size=4)

    def run(name: str, metric: str = "acc") -> None:
        tasks = (HarnessTaskConfig(name=name, metrics=(metric,)),)
        run_harness(scorer, LanguageEvaluationConfig(tasks=tasks), include=[task_files], local_data=task_files, limit=1)

    with pytest.raises(ConfigError, match=r"no task 'arc_eazy' \(did you mean 'arc_easy'\?\)"):
        run("arc_eazy")
    # A tag and a group of the harness.
    for several in ("ai2_arc", "xnli"):
        with pytest.raises(ConfigError, match=f"'{several}' is several tasks"):
            run(several)
    with pytest.raises(ConfigError, match=r"shapes: has no metric 'acc_nrm' \(did you mean 'acc_norm'\?\); it has acc"):
        run("shapes", "acc_nrm")
    with pytest.raises(DataError, match=r"piqa: has none of train.jsonl, validation.jsonl, test.jsonl"):
        run("piqa")


@pytest.mark.filterwarnings("ignore")
def test_a_masked_encoder(shards: Path, task_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By pseudo-log-likelihood; it generates nothing."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra lm)")
    out, config = tmp_path / "run", tmp_path / "own.yaml"
    train(pretraining(shards, out, max_steps=2))
    config.write_text(yaml.safe_dump({"tasks": [{"name": "shapes"}]}))
    arguments = ["--run", str(out), "--config", str(config), "--include", str(task_files)]
    assert main(arguments) == 0
    card = json.loads((out / "own_scores.json").read_text())
    assert card["scoring"] == "pseudo-log-likelihood"
    scorer = scorer_of(load_trained(out, ALONE, task_kind="pretrain"), batch_size=5)
    num_right = 0
    for q in QUESTIONS:
        scores = scorer.continuations([(q["question"], " " + choice) for choice in q["choices"]])
        num_right += max(range(len(scores)), key=lambda place, s=scores: s[place].log_probability) == q["answer"]
    assert card["scores"][0]["score"] == pytest.approx(num_right / 6)
    with pytest.raises(SystemExit, match="64"):
        main([*arguments, "tasks=[{name: shapes_next, metrics: [exact_match]}]"])
    assert "a masked encoder does not generate text" in capsys.readouterr().err
