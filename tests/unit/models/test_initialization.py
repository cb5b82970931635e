"""What models have in common starts alike, whatever else they are made of."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from mhmoe_vl.models.encoder import MultiwayEncoder
from mhmoe_vl.models.initialization import draw_key, random_numbers_of
from mhmoe_vl.models.visual_codebook import VisualCodebook
from mhmoe_vl.tasks.pretrain import PretrainConfig, PretrainTask
from tests.unit.models.builders import make_config

KINDS = ("dense", "smoe", "xmoe", "fine_grained", "mhmoe", "mhmoe_head_parallel")


def weights(kind: str, seed: int = 0, **moe: Any) -> dict[str, Tensor]:
    """Of encoder and heads."""
    torch.manual_seed(seed)
    model = make_config(kind, moe=moe)
    codes = torch.zeros(model.num_visual_codes, 3 * model.patch_size**2)
    options = PretrainConfig(visual_codebook="unused")
    return PretrainTask(model, options, VisualCodebook(codes, model.patch_size)).state_dict()


@pytest.mark.parametrize(("one", "other"), list(combinations(KINDS, 2)))
def test_kinds_start_from_the_same_shared_weights(one: str, other: str) -> None:
    a, b = weights(one), weights(other)
    shared = [name for name in a if name in b and ".ffn.pools." not in name]
    dense_blocks = [name for name in a if name in b and name.startswith("encoder.blocks.0.ffn.pools.")]
    assert {"encoder.text_embedding.tokens.weight", "encoder.vision_embedding.positions"} <= set(shared)
    assert {"mim_head.linear.weight", "encoder.blocks.1.attention.qkv.text.weight"} <= set(shared)
    assert dense_blocks
    for name in [*shared, *dense_blocks]:
        assert torch.equal(a[name], b[name]), name


def test_one_head_without_layers_starts_as_the_smoe_that_it_is() -> None:
    smoe = weights("smoe")
    mhmoe = weights("mhmoe", num_heads=1, num_head_layers=0, num_merge_layers=0)
    renamed = {name.replace(".moe.", "."): tensor for name, tensor in mhmoe.items()}
    assert renamed.keys() == smoe.keys()
    for name, tensor in smoe.items():
        assert torch.equal(renamed[name], tensor), name


def test_other_seeds_and_other_parts_are_other_numbers() -> None:
    a, b = weights("smoe"), weights("smoe", seed=1)
    for name in (
        "encoder.text_embedding.tokens.weight",
        "mim_head.linear.weight",
        "encoder.blocks.1.ffn.pools.text.experts.w1_EDF",
    ):
        assert not torch.equal(a[name], b[name]), name
    of_parts = [
        f"encoder.blocks.{layer}.attention.qkv.{modality}.weight" for layer in (0, 1) for modality in ("vision", "text")
    ]
    for one, other in combinations(of_parts, 2):
        assert not torch.equal(a[one], a[other])


def test_two_encoders_in_a_row_differ() -> None:
    torch.manual_seed(0)
    one, other = MultiwayEncoder(make_config()), MultiwayEncoder(make_config())
    assert not torch.equal(one.text_embedding.tokens.weight, other.text_embedding.tokens.weight)


def test_a_part_leaves_the_generator_as_it_was() -> None:
    torch.manual_seed(0)
    key = draw_key()
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert draw_key() == key
    with random_numbers_of(key, "part"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with random_numbers_of(key, "part"):
        assert torch.equal(torch.rand(3), first)
    with torch.device("meta"):
        assert isinstance(draw_key(), int)
