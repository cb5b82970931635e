"""The layer as a torch module: state dict, checkpointing, meta device, imports, and the README's snippets."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mhmoe_vl.moe
from mhmoe_vl.moe import FeedForward, MoE, MultiHeadMoE, balance_loss, count_flops, ffn_cost
from tests.unit.moe.builders import build, gradients, random

EXPERT_KEYS = {"experts.w1_EDF", "experts.b1_EF", "experts.w2_EFD", "experts.b2_ED"}
ROUTER_KEYS = {
    "linear": {"router.weight_DE"},
    "cosine": {"router.projection_DR", "router.embedding_ER", "router.log_temperature"},
}


@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_the_state_dict_depends_on_neither_dispatcher_nor_backend(router: str) -> None:
    keys = {"router.selection_bias_E"} | ROUTER_KEYS[router] | EXPERT_KEYS
    keys = {f"moe.{key}" for key in keys} | {"head.weight", "head.bias", "merge.weight", "merge.bias"}
    layers = [
        MultiHeadMoE(16, 24, 4, 2, router=router, capacity_factor=factor, backend=backend, inner_residual=residual)
        for factor, backend, residual in product([None, 1.0], ["auto", "loop", "grouped_mm"], [False, True])
    ]
    for layer in layers:
        assert set(layer.state_dict()) == keys
        layer.load_state_dict(layers[0].state_dict())


def test_the_state_dict_of_moe_without_biases() -> None:
    keys = {"router.weight_DE", "router.selection_bias_E", "experts.w1_EDF", "experts.w2_EFD"}
    assert set(MoE(16, 24, 4, bias=False, glu=True).state_dict()) == keys


def test_a_loaded_layer_decides_as_the_saved_one() -> None:
    layer = build(2, top_k=2)
    layer.moe.router.update_selection_bias(torch.tensor([4, 1, 1, 1]), rate=0.2)
    loaded = build(2, top_k=2, seed=1)
    loaded.load_state_dict(layer.state_dict())
    x = random(9, 8, seed=2)
    assert torch.equal(loaded(x)[0], layer(x)[0])
    assert torch.equal(loaded(x)[1].experts_NK, layer(x)[1].experts_NK)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"router": "cosine", "capacity_factor": 0.5, "glu": True}])
def test_activation_checkpointing_gives_the_same_gradients(options: dict[str, Any]) -> None:
    layer = build(2, **options)
    x = random(2, 5, 8, seed=1)
    valid = torch.arange(10).view(2, 5) % 3 != 1
    results = []
    for use_checkpoint in (False, True):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        if use_checkpoint:
            y, routing = checkpoint(layer, inputs, valid, use_reentrant=False)
        else:
            y, routing = layer(inputs, valid)
        ((y * random(2, 5, 8, seed=2)).sum() + balance_loss(routing, valid)).backward()
        results.append({"x": inputs.grad, **gradients(layer)})
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name]), name


@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_a_layer_built_on_the_meta_device_can_be_materialised(router: str) -> None:
    with torch.device("meta"):
        layer = MultiHeadMoE(16, 24, 4, 2, router=router)
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    built = MultiHeadMoE(16, 24, 4, 2, router=router)
    for module in (layer, built):
        torch.manual_seed(0)
        module.reset_parameters()
    expected = built.state_dict()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_dense_layer_equals_its_formula() -> None:
    x = random(5, 8, seed=1)
    for glu, sub_ln in product([False, True], repeat=2):
        dense = FeedForward(8, 12, glu=glu, sub_ln=sub_ln).double()
        hidden = x @ dense.w1.weight.T + dense.w1.bias
        if glu:
            hidden = hidden[:, :12] * torch.sigmoid(hidden[:, :12]) * hidden[:, 12:]
        else:
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        if sub_ln:
            variance = hidden.var(-1, keepdim=True, correction=0)
            hidden = (hidden - hidden.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
        y, routing = dense(x, torch.ones(5, dtype=torch.bool))
        torch.testing.assert_close(y, hidden @ dense.w2.weight.T + dense.w2.bias)
        assert routing is None


def test_the_package_is_an_island() -> None:
    """A fresh interpreter that imports it has torch, and nothing else of ours or of the project's libraries."""
    program = "import sys, mhmoe_vl.moe; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    modules = result.stdout.split()
    roots = {name.split(".")[0] for name in modules}
    assert "torch" in roots
    assert not roots & {
        "webdataset",
        "PIL",
        "timm",
        "open_clip",
        "torchvision",
        "pydantic",
        "omegaconf",
        "rich",
    }
    ours = [name for name in modules if name.startswith("mhmoe_vl.") and not name.startswith("mhmoe_vl.moe")]
    assert ours == []


def test_the_snippets_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, as a reader would."""
    readme = (Path(mhmoe_vl.moe.__file__).parent / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 4
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    layer = namespace["layer"]
    listed = set(re.findall(r"^\| `([\w.]+)` \|", readme, flags=re.MULTILINE))
    cosine = MultiHeadMoE(16, 24, 4, 2, router="cosine")
    per_head = MultiHeadMoE(16, 24, 4, 2, pools="per_head")
    assert set(layer.state_dict()) | set(cosine.state_dict()) | set(per_head.state_dict()) == listed


@pytest.mark.parametrize(("num_head_layers", "num_merge_layers"), [(0, 0), (1, 0), (0, 1), (3, 2)])
def test_head_and_merge_layers_of_any_depth(num_head_layers: int, num_merge_layers: int) -> None:
    """Against the same products written out, with ReLU between them and none behind."""
    layer = MultiHeadMoE(
        8, 12, 4, 2, num_head_layers=num_head_layers, num_merge_layers=num_merge_layers, backend="loop"
    ).double()
    x = random(2, 5, 8, seed=1)

    def through(projection: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        linears = [module for module in projection.modules() if isinstance(module, nn.Linear)]
        for number, linear in enumerate(linears):
            hidden = (hidden.clamp_min(0) if number else hidden) @ linear.weight.T + linear.bias
        return hidden

    sub_ND, _ = layer.moe(through(layer.head, x).reshape(-1, 4))
    y, _ = layer(x)
    torch.testing.assert_close(y, through(layer.merge, sub_ND.reshape(x.shape)))
    expected = ffn_cost("mhmoe", 8, 12, 4, 1, 2, num_projections=num_head_layers + num_merge_layers)
    assert sum(p.numel() for p in layer.parameters()) == expected.num_params
    layer.float()
    assert count_flops(lambda: layer(x.float())) == 10 * expected.flops_per_token


def test_one_head_without_layers_is_the_moe_layer() -> None:
    torch.manual_seed(0)
    plain = MoE(8, 12, 4)
    torch.manual_seed(0)
    wrapped = MultiHeadMoE(8, 12, 4, 1, num_head_layers=0, num_merge_layers=0)
    x = random(2, 5, 8, seed=1, dtype=torch.float32)
    assert torch.equal(wrapped(x)[0], plain(x)[0])


def test_depth_of_a_head_layer_is_not_negative() -> None:
    with pytest.raises(ValueError, match="must be 0 or more, got -1"):
        MultiHeadMoE(8, 12, 4, 2, num_head_layers=-1)
