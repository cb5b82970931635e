"""From dense weights to sparse runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mhmoe_vl.config import validate_config
from mhmoe_vl.convert.__main__ import main
from mhmoe_vl.convert.starting_point import model_of
from mhmoe_vl.convert.upcycle import upcycle
from mhmoe_vl.distributed.weights import load_weights
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.metrics import read_metrics
from tests.integration.runs import fine_tuning, language_modeling, pretraining, train, write_config
from tests.unit.models.released import fabricate

EXACT = {"top_k": 2, "renormalize": True, "sub_ln": True, "selection_bias_rate": 0.0}


@pytest.fixture(scope="module")
def dense(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense") / "run"
    tree = pretraining(shards, out, max_steps=20)
    tree["model"] |= {"ffn": "dense", "drop_path": 0.0}
    train(tree)
    return out


def sparse(shards: Path, folder: Path, ffn: str, **moe: Any) -> dict[str, Any]:
    tree = pretraining(shards, folder / "run", init_from=str(folder / "start"), max_steps=2)
    tree["model"] |= {"ffn": ffn, "drop_path": 0.0}
    tree["model"]["moe"] |= moe
    return tree


def start(dense: Path, tree: dict[str, Any], folder: Path, fit_steps: int = 0) -> Any:
    config = validate_config(RunConfig, tree)
    return upcycle(dense, config, folder / "start", num_samples=12, fit_steps=fit_steps)


@pytest.mark.parametrize("ffn", ["smoe", "xmoe"])
def test_copies_go_on_where_the_dense_run_ended(shards: Path, tmp_path: Path, dense: Path, ffn: str) -> None:
    tree = sparse(shards, tmp_path, ffn, **EXACT)
    closeness = start(dense, tree, tmp_path)
    assert set(closeness.pools) == {"block1/vision", "block1/text"}
    assert max(*closeness.pools.values(), closeness.hidden) < 1e-10
    assert closeness.figures.keys() >= {"mim", "mlm", "pair_mim", "pair_mlm"}
    for before, after in closeness.figures.values():
        assert after == pytest.approx(before, rel=1e-4)
    assert model_of(tmp_path / "start").ffn == ffn
    train(tree)
    # The same weights outside the experts, heads too.
    old, new = load_weights(dense / "model.safetensors"), load_weights(tmp_path / "start" / "model.safetensors")
    common = old.keys() & new.keys()
    assert {"mim_head.linear.weight", "encoder.blocks.0.ffn.pools.text.w1.weight"} <= common
    assert all(torch.equal(old[name], new[name]) for name in common)
    assert {name for name in old if ".blocks.1.ffn." in name}.isdisjoint(new)
    # And in training the first loss is that of the dense run going on.
    dense_again = pretraining(shards, tmp_path / "dense", init_from=str(dense), max_steps=2)
    dense_again["model"] |= {"ffn": "dense", "drop_path": 0.0}
    train(dense_again)
    first = [read_metrics(tmp_path / run, "train")[0] for run in ("run", "dense")]
    assert first[0]["mim"] == pytest.approx(first[1]["mim"], rel=1e-4)


def test_language_models_whose_head_is_the_embedding(shards: Path, corpus: Path, tmp_path: Path) -> None:
    tree = language_modeling(shards, corpus, tmp_path / "dense", max_steps=2)
    tree["model"] |= {"ffn": "dense", "tie_embeddings": True}
    train(tree)
    tree |= {"out": str(tmp_path / "run"), "init_from": str(tmp_path / "start")}
    tree["model"] |= {"ffn": "smoe", "moe": tree["model"]["moe"] | EXACT}
    assert start(tmp_path / "dense", tree, tmp_path).hidden < 1e-10
    weights = load_weights(tmp_path / "start" / "model.safetensors")
    assert torch.equal(weights["lm_head.linear.weight"], weights["encoder.text_embedding.tokens.weight"])
    train(tree)


@pytest.mark.parametrize("ffn", ["mhmoe", "mhmoe_head_parallel"])
def test_sub_tokens_start_near(shards: Path, tmp_path: Path, dense: Path, ffn: str) -> None:
    tree = sparse(shards, tmp_path, ffn)
    closeness = start(dense, tree, tmp_path, fit_steps=30)
    assert max(*closeness.pools.values(), closeness.hidden) < 0.5
    for before, after in closeness.figures.values():
        assert after == pytest.approx(before, rel=0.1)
    train(tree)


def test_from_beit3_to_fine_tuned_experts(shards: Path, tmp_path: Path) -> None:
    """By the commands of the README: convert, upcycle, fine-tune."""
    torch.save(
        {"model": fabricate("pretrain", image_size=32, vocab_size=300, max_positions=26, num_codes=16)},
        tmp_path / "x.pth",
    )
    released, config = tmp_path / "released", tmp_path / "mhmoe.yaml"
    assert main(["from-beit3", "--checkpoint", str(tmp_path / "x.pth"), "--out", str(released)]) == 0
    tree = fine_tuning(shards, tmp_path / "run", "nlvr2", tmp_path / "start")
    moe = {"num_experts": 4, "num_heads": 2, "match": "none", "top_k": 2, "renormalize": True, "choices": 2}
    tree["model"] |= {"dim": 128, "ffn_dim": 96, "ffn": "smoe", "moe": moe | {"sub_ln": True}}
    write_config(config, tree)
    arguments = ["--config", str(config), "--num-samples", "4", "--fit-steps", "2"]
    command = ["upcycle", "--run", str(released), "--out", str(tmp_path / "start"), *arguments]
    assert main(command) == 0
    train(tree)
    command[4] = str(tmp_path / "heads")
    assert main([*command, "model.ffn=mhmoe", "model.moe.sub_ln=false"]) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.ffn=dense"], "model.ffn: 'dense' cannot start from a dense model; use smoe, xmoe,"),
        (["model.ffn=fine_grained"], "model.ffn: 'fine_grained' cannot"),
        (["model.moe.experts=shared"], "model.moe.experts: one pool for both modalities"),
        (["model.dim=32"], "tensors of the encoder differ"),
        (["model.moe.inner_residual=true"], "model.moe: inner_residual adds the input"),
    ],
)
def test_mistakes_are_one_line(
    shards: Path, tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    config = write_config(tmp_path / "x.yaml", sparse(shards, tmp_path, "smoe"))
    with pytest.raises(SystemExit):
        main(["upcycle", "--run", str(dense), "--config", config, "--out", str(tmp_path / "start"), *overrides])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "start" / "model.safetensors").exists()
