"""What a rank computes, against batches, counters, and the order of the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhmoe_vl.data.plan import MixturePlan
from mhmoe_vl.data.samples import PatchMasking
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.moe import count_flops
from mhmoe_vl.plan.memory import parts_of
from mhmoe_vl.plan.plan import make_plan
from mhmoe_vl.plan.report import describe
from mhmoe_vl.plan.trace import Tracer
from mhmoe_vl.plan.workload import (
    NUM_IMAGENET_CLASSES,
    NUM_VQA_ANSWERS,
    build_task_without_files,
    busiest_share,
    matrix_flops,
    sample_cost,
    samples_of,
    synthetic_batch,
)
from tests.unit.models.builders import make_visual_tokenizer
from tests.unit.plan.builders import TASKS, make_device, make_run


def test_samples_by_hand() -> None:
    samples = samples_of(make_run())
    assert (samples["image"].num_tokens, samples["text"].num_tokens, samples["pair"].num_tokens) == (17, 14, 31)
    # 0.4 of 16 patches; 0.15 and 0.5 of the 12 tokens between <s> and </s>.
    assert [samples[kind].num_masked_patches for kind in ("image", "text", "pair")] == [6, 0, 6]
    assert [samples[kind].num_masked_tokens for kind in ("image", "text", "pair")] == [0, 2, 6]
    assert samples_of(make_run("nlvr2"))["nlvr2"].num_tokens == 2 * 31
    # All tokens of a packed row have a next one.
    assert samples_of(make_run("language_modeling"))["text"].num_masked_tokens == 14
    # 0.7 of 13: the end token may be hidden too.
    assert samples_of(make_run("captioning"))["pair"].num_masked_tokens == 9
    assert samples_of(make_run("classification"))["class"].num_tokens == 17
    image, text = samples_of(make_run("retrieval"))["pair"].passes
    assert (image.num_image_tokens, image.num_text_tokens) == (17, 0)
    assert (text.num_image_tokens, text.num_text_tokens) == (0, 14)


def test_nobody_computes_codes_that_are_stored() -> None:
    config = make_run(data={"train": {"image": {"kind": "image", "shards": "absent", "codes": True}}})
    task, stored = build_task_without_files(config), samples_of(config)["image"]
    computed = replace(stored, has_codes=False)
    # 16 patches of 192 values against 24 codes.
    assert sample_cost(task, computed).target_flops == 2 * 16 * 192 * 24
    assert sample_cost(task, stored) == replace(sample_cost(task, computed), target_flops=0)
    for sample, expected in ((stored, False), (computed, True)):
        tracer = Tracer(config.model, torch.float32, make_device())
        parts = parts_of(task, tracer, {"image": sample}, {"image": 2}, checkpointed=False)
        assert ("codes" in {part.name for part in parts}) == expected


@pytest.mark.parametrize("ffn", ["dense", "mhmoe"])
def test_targets_of_a_network_are_planned_where_it_is(tmp_path: Path, ffn: str) -> None:
    """A trained tokenizer, on images twice as wide as its own; its products, weights and time are in the plan."""
    path, tokenizer = tmp_path / "tokenizer.safetensors", make_visual_tokenizer(ffn)
    path.write_bytes(tokenizer.serialized())
    model = {"patch_size": 4, "image_size": 2 * tokenizer.encoder.config.image_size, "num_visual_codes": 7}
    config = make_run(model=model, options={"visual_codebook": str(path)})
    image = torch.zeros(1, 3, model["image_size"], model["image_size"], dtype=torch.uint8)
    with sdpa_kernel(SDPBackend.MATH):
        counted = count_flops(lambda: tokenizer.encode(image))
    task, sample = build_task_without_files(config), samples_of(config)["image"]
    assert sample_cost(task, sample).target_flops == counted
    tracer = Tracer(config.model, torch.float32, make_device())
    parts = {
        part.name: part.trace for part in parts_of(task, tracer, {"image": sample}, {"image": 3}, checkpointed=False)
    }
    assert parts["codes"].forward.flops == 3 * counted
    assert (parts["codes"].kept, parts["codes"].backward.flops) == (3 * 8 * config.model.num_patches, 0)
    plan = make_plan(config, make_device(), world_size=1)
    assert plan.memory.tokenizer == sum(t.nbytes for t in tokenizer.state_dict().values())
    text = describe(plan, config)
    assert f"of each image are its targets: {path}\n" in text
    path.unlink()
    plan = make_plan(config, make_device(), world_size=1)
    assert plan.memory.tokenizer == 7 * 48 * 4
    assert f"its targets: k-means patches, assumed because {path} does not exist\n" in describe(plan, config)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.safetensors"
    path.write_bytes(make_visual_tokenizer().serialized())
    with pytest.raises(ConfigError, match=r"num_visual_codes: 24, but .* has 7; set model\.num_visual_codes=7"):
        build_task_without_files(make_run(options={"visual_codebook": str(path)}))


def test_patches_are_masked_as_in_training() -> None:
    masks = PatchMasking(4, 0.4)(np.random.default_rng(0))
    assert int(masks.sum()) == samples_of(make_run())["image"].num_masked_patches


@pytest.mark.parametrize("task_kind", TASKS)
@pytest.mark.parametrize("ffn", ["dense", "xmoe", "mhmoe"])
def test_flops_are_what_a_counter_sees(task_kind: str, ffn: str) -> None:
    """The whole forward pass on random batches; on CPU the fused attention is invisible to the counter."""
    config = make_run(task_kind, model={"ffn": ffn})
    task = build_task_without_files(config, device="cpu")
    for source, sample in samples_of(config).items():
        batch = synthetic_batch(config, source, 3)
        totals = task.num_targets([{source: batch}])
        with sdpa_kernel(SDPBackend.MATH):
            counted = count_flops(lambda batch=batch, source=source, totals=totals: task({source: batch}, totals))
        cost = sample_cost(task, sample)
        # Retrieval: three images by three texts, and the other way round, 32 wide.
        similarities = 2 * 2 * 3 * 3 * 32 if task_kind == "retrieval" else 0
        assert counted == 3 * (cost.forward_flops + cost.target_flops) + similarities
        assert cost.training_flops == 3 * cost.forward_flops + cost.target_flops


def test_the_encoder_of_a_linear_probe_has_no_backward_pass() -> None:
    config = make_run("classification")
    probe = make_run("classification", options={"linear_probe": True})
    whole, frozen = (sample_cost(build_task_without_files(run), samples_of(run)["class"]) for run in (config, probe))
    # Norm and linear layer of 1,000 classes.
    assert frozen.trained_flops == 2 * 32 * NUM_IMAGENET_CLASSES
    assert frozen.forward_flops == whole.forward_flops == whole.trained_flops
    assert frozen.training_flops == whole.forward_flops + 2 * frozen.trained_flops


@pytest.mark.parametrize("task_kind", TASKS)
def test_random_batches_ask_for_the_predictions_of_a_sample(task_kind: str) -> None:
    config = make_run(task_kind)
    task = build_task_without_files(config, device="cpu")
    for source, sample in samples_of(config).items():
        targets = sum(task.num_targets([{source: synthetic_batch(config, source, 5)}]).values())
        per_sample = sample.num_masked_patches + sample.num_masked_tokens
        assert targets == 5 * (per_sample or 1)


@pytest.mark.parametrize(
    ("world_size", "num_micro_batches", "batch_size"),
    [(1, 1, 30), (2, 1, 30), (3, 2, 30), (5, 1, 30), (7, 2, 20), (16, 1, 24)],
)
def test_the_busiest_rank(world_size: int, num_micro_batches: int, batch_size: int) -> None:
    """Against the order of the data, rank by rank."""
    config = make_run(data={"batch_size": batch_size})
    plan = MixturePlan(dict.fromkeys(config.data.train), dict.fromkeys(config.data.train, 1.0), batch_size, 0)
    task = build_task_without_files(config)
    costs = {source: sample_cost(task, sample) for source, sample in samples_of(config).items()}

    def work(share: dict[str, int]) -> int:
        return sum(costs[source].training_flops * number for source, number in share.items())

    shares = [
        {
            source: len(refs)
            for source, refs in plan.micro_batch(
                0, index=index, num_micro_batches=num_micro_batches, rank=rank, world_size=world_size
            ).items()
        }
        for index in range(num_micro_batches)
        for rank in range(world_size)
    ]
    found = busiest_share(config, costs, world_size=world_size, num_micro_batches=num_micro_batches)
    assert found in shares
    assert work(found) == max(map(work, shares))


def test_no_file_is_needed() -> None:
    task = build_task_without_files(make_run("vqa"))
    assert {parameter.device for parameter in task.parameters()} == {torch.device("meta")}
    # Class token: pooler 32 x 32, 32 x 64, and the answers.
    assert matrix_flops(task.vqa_head) == 2 * (32 * 32 + 32 * 64 + 64 * NUM_VQA_ANSWERS)  # type: ignore[arg-type]
