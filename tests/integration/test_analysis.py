"""``python -m mhmoe_vl.analysis`` on runs that were really trained, against counts that the test makes one by one."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhmoe_vl.analysis.__main__ import main
from mhmoe_vl.analysis.against import load_other_encoder
from mhmoe_vl.analysis.measure import analyse_experts
from mhmoe_vl.data.plan import SampleRef
from mhmoe_vl.models.encoder import MultiwayEncoder
from mhmoe_vl.moe import MoE
from mhmoe_vl.train.build import build_dataset
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.trained import load_trained
from tests.integration.runs import ALONE, fine_tuning, language_modeling, pretraining, train

SOURCES = {"image": "images", "text": "text", "pair": "pairs"}


def trained_run(shards: Path, out: Path, *, moe: dict[str, Any] | None = None, **model: Any) -> Path:
    """Two steps, a checkpoint after each, validation on all three kinds of shards."""
    tree = pretraining(shards, out, max_steps=2, checkpoint_every=1)
    tree["model"] |= model
    tree["model"]["moe"] |= moe or {}
    tree["data"]["validation"] = {
        kind: {"kind": kind, "shards": str(shards / f"{folder}-val")} for kind, folder in SOURCES.items()
    }
    train(tree)
    return out


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sub-tokens with two choices each, of six experts, in two sparse layers."""
    out = tmp_path_factory.mktemp("analysed") / "run"
    return trained_run(shards, out, depth=3, moe={"num_experts": 6, "every": 1, "choices": 2})


@pytest.fixture(scope="module")
def shared(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(shards, tmp_path_factory.mktemp("shared") / "run", moe={"experts": "shared"})


def analyse(run: Path, out: Path, *options: str) -> tuple[dict[str, Any], str]:
    assert main(["--run", str(run), "--out", str(out), "--device", "cpu", *options]) == 0
    page = (out / "analysis.html").read_text(encoding="utf-8")
    HTMLParser().feed(page)
    assert "<script" not in page
    for reference in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert reference.startswith(("data:image/", "#")), reference[:80]
    return json.loads((out / "analysis.json").read_text()), page


def measured(run: Path, *, batch_size: int = 32, against: Path | None = None) -> dict[str, Any]:
    """The numbers alone, of four samples of each source."""
    trained = load_trained(run, ALONE, task_kind="pretrain")
    analysis = analyse_experts(
        trained,
        trained.config.data.validation,
        num_samples=4,
        against=None if against is None else load_other_encoder(trained, against),
        against_name=None if against is None else str(against),
        batch_size=batch_size,
    )
    return json.loads(analysis.as_json())


def one_by_one(run: Path) -> dict[str, Any]:
    """Loads, distinct experts and states of every pool, of every sample of the validation on its own."""
    trained = load_trained(run, ALONE, task_kind="pretrain")
    ratios = dict.fromkeys(("image_mask_ratio", "text_mask_ratio", "pair_text_mask_ratio"), 0.0)
    config: RunConfig = trained.config.model_copy(update={"data": trained.config.data.model_copy(update=ratios)})
    encoder: MultiwayEncoder = trained.task.encoder
    inputs: dict[MoE, torch.Tensor] = {}
    for module in encoder.modules():
        if isinstance(module, MoE):
            module.router.register_forward_pre_hook(
                lambda router, given, module=module: inputs.update({module: given[0]})
            )
    dataset = build_dataset(config, dict(config.data.validation), training=False)
    loads: dict[str, Counter[int]] = {}
    distinct: dict[str, list[int]] = {}
    states: dict[str, list[tuple[np.ndarray, int]]] = {}
    grid = np.zeros(encoder.config.num_patches)
    num_images = 0
    for name in dataset.sources:
        for item in range(len(dataset.indexed(name))):
            batch = dataset.batch(name, [SampleRef(name, 0, item)])
            assert batch.text_ids is None or trained.tokenizer.mask_id not in batch.text_ids
            with torch.no_grad():
                encoded = encoder(batch.image, batch.text_ids)
            of_patches = []
            for layer in encoded.routings:
                ffn = encoder.blocks[layer.layer].ffn.pools[layer.pool]
                x_ND = inputs[getattr(ffn, "moe", ffn)]
                for row, chosen in enumerate(layer.routing.experts_NK.tolist()):
                    states.setdefault(layer.name, []).append((x_ND[row].numpy(), chosen[0]))
                for modality, routing in layer.by_modality().items():
                    tokens = routing.experts_NK.reshape(-1, routing.num_heads * routing.top_k).tolist()
                    key = layer.name if layer.pool == modality else f"{layer.name}/{modality}"
                    loads.setdefault(key, Counter()).update(expert for token in tokens for expert in token)
                    distinct.setdefault(key, []).extend(len(set(token)) for token in tokens)
                    if modality == "vision" and tokens:
                        of_patches.append([len(set(token)) for token in tokens[1:]])
            if of_patches:
                grid += np.mean(of_patches, axis=0)
                num_images += 1
    return {"loads": loads, "distinct": distinct, "states": states, "grid": grid / num_images, "images": num_images}


@pytest.mark.parametrize("which", ["run", "shared"])
def test_numbers_are_those_of_samples_taken_one_by_one(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = request.getfixturevalue(which)
    found, page = analyse(run, tmp_path / "out", "--batch-size", "5")
    expected = one_by_one(run)
    assert found["num_samples"] == {"image": 8, "text": 6, "pair": 8}
    pools = {pool["pool"]: pool for pool in found["pools"]}
    for name, load in expected["loads"].items():
        total = load.total()
        assert pools[name]["load"] == pytest.approx([load[e] / total for e in range(found["num_experts"])])
        assert pools[name]["num_rows"] * found["top_k"] == total
        by_pool = found["divergence"]["by_pool"][name]
        assert by_pool["mean"] == pytest.approx(np.mean(expected["distinct"][name]))
        assert by_pool["num_tokens"] == len(expected["distinct"][name])
    for name, states in expected["states"].items():
        x, experts = np.stack([state for state, _ in states]).astype(float), np.array([e for _, e in states])
        center = x.mean(0)
        means = {e: x[experts == e].mean(0) for e in set(experts.tolist())}
        within = np.mean([((state - means[e]) ** 2).sum() for state, e in zip(x, experts.tolist(), strict=True)])
        between = np.mean([((means[e] - center) ** 2).sum() for e in experts.tolist()])
        assert found["collapse"][name]["num_rows"] == len(x)
        assert found["collapse"][name]["ratio"] == pytest.approx(within / between, rel=1e-3)
    patches = found["divergence"]["patches"]
    assert patches["num_images"] == expected["images"] == 16
    np.testing.assert_allclose(np.array(patches["grid"]).reshape(-1), expected["grid"])
    if which == "run":
        assert found["affinity"] == []
        assert "Modality affinity" not in page
    else:
        (affinity,) = found["affinity"]
        vision, text = (expected["loads"][f"block1/shared/{modality}"] for modality in ("vision", "text"))
        for expert, share in enumerate(affinity["vision_share"]):
            total = vision[expert] + text[expert]
            assert share == (pytest.approx(vision[expert] / total) if total else None)
        assert affinity["mean"] == pytest.approx(vision.total() / (vision.total() + text.total()))
        assert [pool["pool"] for pool in found["pools"]] == [
            "block1/shared", "block1/shared/vision", "block1/shared/text"
        ]  # fmt: skip
        assert "Modality affinity" in page
    assert page.count('alt="its patches by distinct experts"') == 8
    assert "Distinct experts per token" in page


def test_the_same_samples_give_the_same_figures_whatever_the_batches(run: Path) -> None:
    found, again = measured(run, batch_size=1), measured(run, batch_size=64)
    assert found["num_samples"] == {"image": 4, "text": 4, "pair": 4}
    assert again["num_tokens"] == found["num_tokens"]
    for one, other in zip(again["pools"], found["pools"], strict=True):
        assert one["load"] == other["load"]
        assert one["gate_entropy"] == pytest.approx(other["gate_entropy"], rel=1e-5)
    assert again["divergence"]["by_pool"] == found["divergence"]["by_pool"]
    assert again["divergence"]["pictures"] == found["divergence"]["pictures"]


def test_fluctuation_against_checkpoints_and_runs(run: Path, shared: Path, shards: Path, tmp_path: Path) -> None:
    """The last checkpoint holds the final weights, the first one others; so does a fine-tuning of the run."""
    checkpoints = run / "checkpoints"
    found, page = analyse(run, tmp_path / "same", "--against", str(checkpoints / "step_0000002"))
    assert {figures["choices"] for figures in found["fluctuation"].values()} == {0}
    assert "Routing fluctuation" in page
    found, _ = analyse(run, tmp_path / "before", "--against", str(checkpoints / "step_0000001"))
    assert set(found["fluctuation"]) == {f"block{i}/{modality}" for i in range(3) for modality in ("vision", "text")}
    assert sum(figures["choices"] for figures in found["fluctuation"].values()) > 0
    for figures in found["fluctuation"].values():
        assert figures["choices"] <= figures["tokens"] <= 4 * figures["choices"]
    itself = measured(run, against=run)["fluctuation"]
    assert {figures["tokens"] for figures in itself.values()} == {0}
    tree = fine_tuning(shards, tmp_path / "vqa", "vqa", shared)
    tree["model"]["moe"]["experts"] = "shared"
    train(tree)
    found, _ = analyse(tmp_path / "vqa", tmp_path / "tuned", "--against", str(shared))
    assert found["num_samples"]["x"] > 8  # questions, several for each of 8 images
    assert 0 <= found["fluctuation"]["block1/shared/text"]["choices"] < 1


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a user error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    assert exit_info.value.code in (64, 65, 74)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("expert analysis")]
    assert len(lines) == 1
    return lines[0]


def test_user_errors(run: Path, shared: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path / "out"), "--device", "cpu")
    dense = trained_run(shards, tmp_path / "dense", ffn="dense")
    assert "model.ffn is 'dense', so there are no experts" in fails(capsys, "--run", str(dense), *out)
    line = fails(capsys, "--run", str(run), "--against", str(shared), *out)
    assert "is a run of another encoder than" in line
    assert "model.moe." in line or "model.depth" in line
    checkpoint = str(shared / "checkpoints" / "step_0000001")
    assert "the checkpoint lacks" in fails(capsys, "--run", str(run), "--against", checkpoint, *out)
    assert "neither a run directory" in fails(capsys, "--run", str(run), "--against", str(shards), *out)
    line = fails(capsys, "--run", str(run), "--data", str(shards / "vqa-val"), *out)
    assert "is a shard of kind 'vqa', but a run of task 'pretrain' reads" in line
    assert "--num-samples: 0 must be 1 or more" in fails(capsys, "--run", str(run), "--num-samples", "0", *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ffn", "choices", "note"),
    [
        ("smoe", 1, "A token is routed as a whole and makes 1 choice, so every token has 1 distinct expert in"),
        ("xmoe", 1, "A token is routed as a whole and makes 1 choice, so every token has 1 distinct expert in"),
        ("fine_grained", 2, "makes 2 choices, so every token has 2 distinct experts in"),
        ("mhmoe_head_parallel", 1, "Each head has experts of its own, so every token has 2 distinct experts in"),
    ],
)
def test_kinds_without_divergence_say_so(shards: Path, tmp_path: Path, ffn: str, choices: int, note: str) -> None:
    run = trained_run(shards, tmp_path / "run", ffn=ffn, moe={"choices": choices})
    data = ("--data", str(shards / "text-val"), str(shards / "images-val"))
    found, page = analyse(run, tmp_path / "out", *data, "--against", str(run / "checkpoints" / "step_0000001"))
    assert found["divergence"] is None
    assert note in found["no_divergence"]
    assert note in page
    assert found["num_samples"] == {"text": 6, "image": 8}
    assert set(found["collapse"]) == set(found["fluctuation"]) == {"block1/vision", "block1/text"}


def test_language_modeling_has_words_and_no_patches(shards: Path, corpus: Path, tmp_path: Path) -> None:
    train(language_modeling(shards, corpus, tmp_path / "run", max_steps=2))
    found, page = analyse(tmp_path / "run", tmp_path / "out")
    assert found["num_tokens"].keys() == {"text"}
    assert found["num_samples"]["short"] == 30
    divergence = found["divergence"]
    assert divergence["patches"] is None
    assert divergence["pictures"] == []
    classes = {of_class["name"]: of_class["num_pieces"] for of_class in divergence["classes"]}
    assert classes["special tokens"] >= 36  # at least one <s> for each document
    words = {word["word"] for word in (*divergence["most"], *divergence["least"])}
    assert words <= {"red", "green", "blue", "square", "circle", "left", "of", "the", "a", "is", "and", "large"}
    assert len(words) >= 6
    assert "most divergent" in page
    assert "Image patches" not in page
