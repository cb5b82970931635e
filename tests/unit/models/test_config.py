"""One clear line for every size that cannot be built."""

from __future__ import annotations

from typing import Any

import pytest

from mhmoe_vl.config import validate_config
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.config import ModelConfig
from tests.unit.models.builders import make_config

SIZES = {"dim": 64, "depth": 4, "num_heads": 4, "ffn_dim": 256, "ffn": "dense"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 must divide dim=64"),
        ({"patch_size": 15}, "patch_size=15 must divide image_size=224"),
        ({"vl_ffn_layers": 5}, "vl_ffn_layers=5 exceeds depth=4"),
        ({"modalities": []}, "modalities=() must name 'vision', 'text' or both, once each"),
        ({"modalities": ["text", "text"]}, "modalities=('text', 'text') must name"),
        ({"modalities": ["sound"]}, "modalities.0: 'sound': Input should be 'vision' or 'text'"),
        ({"ffn": "moe"}, "ffn: 'moe': Input should be 'dense', 'smoe', 'xmoe', 'fine_grained', 'mhmoe' or"),
        ({"depth": 0}, "depth: 0: Input should be greater than 0"),
        ({"drop_path": 1.0}, "drop_path: 1.0: Input should be less than 1"),
        ({"moe": {"num_expert": 4}}, "moe.num_expert: unknown key (did you mean 'num_experts'?)"),
        ({"ffn": "smoe", "moe": {"top_k": 9}}, "reference_top_k=9 must lie between 1 and reference_num_experts=8"),
        ({"ffn": "mhmoe", "moe": {"num_heads": 7}}, "num_heads=7 must divide dim=64"),
        ({"ffn": "mhmoe", "ffn_dim": 64}, "use a wider reference"),
        ({"ffn": "smoe", "moe": {"num_experts_multiple": 3}}, "num_experts_multiple: 3 does not divide the 8 experts"),
        (
            {"ffn": "mhmoe_head_parallel", "moe": {"router": "cosine"}},
            "moe.router: 'cosine' has no form per head; ffn=mhmoe_head_parallel needs 'linear'",
        ),
        (
            {"ffn": "mhmoe_head_parallel", "moe": {"num_experts": 6, "match": "none"}},
            "num_heads=4 must divide num_experts=6: each head has experts of its own",
        ),
        ({"ffn": "mhmoe", "moe": {"num_heads": 64}}, "moe: no sizes match the reference SMoE to 2 % in whole percent"),
    ],
)
def test_impossible_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(ModelConfig, SIZES | changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_remedies_of_a_mismatch_work() -> None:
    unmatched = SIZES | {"ffn": "mhmoe", "moe": {"num_heads": 64, "match": "none"}}
    assert not validate_config(ModelConfig, unmatched).ffn_shape.is_matched


def test_which_blocks_are_special() -> None:
    config = make_config("mhmoe", depth=6, vl_ffn_layers=2)
    assert [config.is_sparse(layer) for layer in range(6)] == [False, True] * 3
    assert [config.has_vl_ffn(layer) for layer in range(6)] == [False] * 4 + [True] * 2
    assert not any(make_config("dense", depth=6).is_sparse(layer) for layer in range(6))


def test_the_router_that_a_kind_means() -> None:
    assert {kind: make_config(kind).router for kind in ("smoe", "xmoe", "mhmoe")} == {
        "smoe": "linear",
        "xmoe": "cosine",
        "mhmoe": "linear",
    }
    assert make_config("mhmoe", moe={"router": "cosine"}).router == "cosine"


def test_derived_numbers_of_experts_are_rounded_for_expert_parallelism() -> None:
    sizes = {"dim": 768, "depth": 2, "num_heads": 12, "ffn_dim": 3072, "ffn": "mhmoe"}
    exact, rounded = (
        validate_config(ModelConfig, sizes | {"moe": {"num_experts_multiple": multiple}}).ffn_shape
        for multiple in (1, 8)
    )
    assert (exact.num_experts, rounded.num_experts) == (41, 40)
    assert rounded.is_matched
