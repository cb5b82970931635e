"""Whole runs of language modeling: on one process or several, interrupted or not, with experts spread or not."""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mhmoe_vl.config import validate_config
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.train.build import build_dataset, build_plan, sampling_weights
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.dry_run import dry_run
from mhmoe_vl.train.metrics import read_metrics
from tests.distributed.fork_harness import run_ranks
from tests.integration.runs import ALONE, figures, final_weights, language_modeling, tensors_of_checkpoint, train
from tests.integration.test_resume import assert_close, merged


def test_an_interrupted_run_goes_on(shards: Path, corpus: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    consumed = train(language_modeling(shards, corpus, whole))
    first = train(language_modeling(shards, corpus, broken), stop_after=2)
    assert first + train(language_modeling(shards, corpus, broken)) == consumed
    assert tensors_of_checkpoint(broken, 4) == tensors_of_checkpoint(whole, 4)
    assert (figures(broken), final_weights(broken)) == (figures(whole), final_weights(whole))
    assert figures(whole)[4]["lm"] < figures(whole)[1]["lm"]


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [("ddp", {}), ("fsdp", {}), ("fsdp", {"expert_parallel": 2}), ("fsdp", {"ffn": "xmoe", "positions": "learned"})],
    ids=str,
)
def test_on_two_processes(shards: Path, corpus: Path, tmp_path: Path, strategy: str, changes: dict[str, Any]) -> None:
    """Each packs the documents that it is dealt; losses, validation, expert load and weights are as alone."""

    def tree(out: Path, **more: Any) -> dict[str, Any]:
        made = language_modeling(shards, corpus, out, **more)
        made["model"] |= {name: value for name, value in changes.items() if name in ("ffn", "positions")}
        return made

    spread = {"strategy": strategy} | {name: value for name, value in changes.items() if name == "expert_parallel"}
    alone, both, broken = (tmp_path / name for name in ("alone", "both", "broken"))
    consumed = train(tree(alone), ALONE)

    def ranks(world: Any) -> tuple[Any, Any]:
        return train(tree(both, **spread), world), train(tree(broken, **spread), world, stop_after=2)

    results = run_ranks(ranks, 2)
    assert merged([of_whole for of_whole, _ in results]) == merged([consumed])
    assert_close(figures(both), figures(alone))
    assert [r["load"] for r in read_metrics(both, "experts")] == [r["load"] for r in read_metrics(alone, "experts")]
    (scores,), (expected,) = (read_metrics(folder, "validation") for folder in (both, alone))
    assert scores.pop("kind") == expected.pop("kind")
    assert scores == pytest.approx(expected, rel=1e-4)
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (both, alone))
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")

    # What two processes began is finished by one, with the same documents.
    on_one = tmp_path / "on_one"
    shutil.copytree(broken, on_one)
    assert train(tree(on_one), ALONE) == consumed[2:]
    assert_close(figures(on_one), figures(alone))


def test_every_language_is_scored_on_its_own(shards: Path, corpus: Path, tmp_path: Path) -> None:
    train(language_modeling(shards, corpus, tmp_path, max_steps=2))
    (scores,) = read_metrics(tmp_path, "validation")
    config = validate_config(RunConfig, language_modeling(shards, corpus, tmp_path))
    dataset = build_dataset(config, config.data.validation, training=False)
    nats = {}
    for name, num_documents in (("short", 30), ("long", 6)):
        of_source = {figure: scores[f"{name}/{figure}"] for figure in ("lm", "lm_per_byte", "lm_bits_per_byte")}
        text = (corpus / f"{name}.txt").read_bytes()
        num_cuts = len(dataset.indexed(name)) - num_documents
        assert (num_cuts > 0) == (name == "long")
        # Neither line breaks between documents nor the spaces at cuts are text.
        num_bytes = len(text) - (num_documents - 1) - num_cuts
        nats[name] = (of_source["lm_per_byte"] * num_bytes, num_bytes)
        num_tokens = nats[name][0] / of_source["lm"]
        assert num_tokens == pytest.approx(round(num_tokens), abs=0.01)
        assert scores[f"{name}/lm_perplexity"] == pytest.approx(math.exp(of_source["lm"]))
        assert scores[f"{name}/lm_byte_perplexity"] == pytest.approx(2 ** of_source["lm_bits_per_byte"])
        # All of it is ASCII.
        assert scores[f"{name}/lm_character_perplexity"] == scores[f"{name}/lm_byte_perplexity"]
    total = [sum(values) for values in zip(*nats.values(), strict=True)]
    assert scores["lm_per_byte"] == pytest.approx(total[0] / total[1])


def test_languages_are_sampled_by_temperature(shards: Path, corpus: Path, tmp_path: Path) -> None:
    config = validate_config(RunConfig, language_modeling(shards, corpus, tmp_path))
    dataset = build_dataset(config, config.data.train, training=True)
    plan, sizes = build_plan(config, dataset), dataset.num_items()
    roots = {name: math.sqrt(size or 0) for name, size in sizes.items()}
    for name, root in roots.items():
        assert plan.share(name) == pytest.approx(root / sum(roots.values()), abs=1e-8)
        assert plan.num_consumed(100)[name] == pytest.approx(600 * root / sum(roots.values()), abs=1)
    lines = dry_run(config)
    assert f"train.short: 30 items, {plan.share('short'):.1%} of each step" in lines
    assert "task language_modeling, ffn mhmoe" in lines


def test_shares_by_hand() -> None:
    """XLM, section 3.1: 64 and 4 sentences at alpha 0.5 are 8 to 2."""
    assert sampling_weights({"a": 64, "b": 4}, 0.5) == {"a": 0.8, "b": 0.2}
    assert sampling_weights({"a": 64, "b": 4}, 0.0) == {"a": 0.5, "b": 0.5}
    assert sampling_weights({"a": 30, "b": 10}, 1.0) == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"modalities": ["vision", "text"], "positions": "learned"}}, r"set model.modalities=\[text\]"),
        ({"model": {"modalities": ["vision", "text"]}}, "'rotary' is for text alone"),
        ({"kind": "image"}, "'image' cannot feed task 'language_modeling', which reads text"),
        ({"shards": "https://x/y.tar", "data": {"sampling_alpha": None}}, "reads indexed shards"),
        ({"shards": "https://x/y.tar"}, "nobody knows the size of the streamed source 'short'"),
        ({"weight": 2.0}, "2.0 beside data.sampling_alpha=0.5, which decides the shares"),
        ({"task": {"segment_bytes": 100}}, "task.segment_bytes: 100: Input should be greater than or equal to 512"),
    ],
    ids=str,
)
def test_what_is_refused(shards: Path, corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tree = language_modeling(shards, corpus, tmp_path)
    for section in ("model", "data", "task"):
        tree[section] |= changes.get(section, {})
    source = {name: value for name, value in changes.items() if name in ("kind", "shards", "weight")}
    tree["data"]["train"] = {**tree["data"]["train"], "short": tree["data"]["train"]["short"] | source}
    with pytest.raises(ConfigError, match=message):
        validate_config(RunConfig, tree)


def test_another_segment_size_would_change_the_data(shards: Path, corpus: Path, tmp_path: Path) -> None:
    tree = language_modeling(shards, corpus, tmp_path)
    train(tree, stop_after=1)
    tree["task"]["segment_bytes"] = 600
    with pytest.raises(Exception, match=r"task.segment_bytes was 512, is 600"):
        partial(train, tree)()
