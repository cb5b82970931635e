"""Distillation of a visual tokenizer: its loss, its gradient, and a codebook that does not know of ranks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from mhmoe_vl.distributed.world import World
from mhmoe_vl.models.frozen import Frozen
from mhmoe_vl.models.teachers import PixelTeacher
from mhmoe_vl.tasks.visual_tokenizer import (
    FirstLook,
    TokenizedPatches,
    TokenizerOutput,
    VisualTokenizerTask,
    _draws,
    _sum_of,
)
from mhmoe_vl.train.step import Figures, train_step
from tests.distributed.fork_harness import run_ranks
from tests.unit.tasks.builders import make_micro_batch, make_task


def make_tokenizer_task(**options: float) -> VisualTokenizerTask:
    return cast(VisualTokenizerTask, make_task("visual_tokenizer", "dense", options=options))


def unit_vectors(num: int, *, seed: int) -> Tensor:
    return F.normalize(torch.randn(num, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_loss_by_hand() -> None:
    """One patch after the other, with the figures that go with it."""
    task = make_tokenizer_task(commitment_weight=0.5)
    batches = make_micro_batch("visual_tokenizer", 3)
    image = batches["visual_tokenizer"].image
    assert image is not None
    vectors = task.code_head(task.encoder(image).vision[:, 1:]).detach()
    nearest = torch.stack([task.codebook.codes_KC[max(range(6), key=lambda k: float(v @ task.codebook.codes_KC[k]))]
                           for v in vectors.flatten(0, 1)]).view_as(vectors)  # fmt: skip
    predicted, target = task.decoder(nearest).detach(), PixelTeacher(4)(image).double()
    cosines, distances = [], []
    for i, j in ((i, j) for i in range(3) for j in range(16)):
        o, t = predicted[i, j], target[i, j]
        cosines.append(float(o @ t / (o.norm() * t.norm())))
        distances.append(float(((vectors[i, j] - nearest[i, j]) ** 2).sum()))
    output = task(batches, task.num_targets([batches, batches]))
    # Half of the step: the other half is somebody else's.
    assert output.loss.item() == pytest.approx(
        sum(1 - c + 0.5 * d for c, d in zip(cosines, distances, strict=True)) / 96
    )
    assert output.sums["cosine"] / output.counts["cosine"] == pytest.approx(sum(cosines) / 48)
    assert output.sums["commitment"] / output.counts["commitment"] == pytest.approx(sum(distances) / 48)


def test_the_gradient_passes_straight_through() -> None:
    """What the decoder's input would like to be different, and the way back to the code, is what the encoder hears."""
    task = make_tokenizer_task(commitment_weight=0.5)
    batches = make_micro_batch("visual_tokenizer", 2)
    seen: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        tensor.retain_grad()
        seen[name] = tensor

    task.code_head.register_forward_hook(lambda _, __, output: keep("vectors", output))
    task.decoder.register_forward_pre_hook(lambda _, inputs: keep("input", inputs[0]))
    task(batches, {"patches": 32}).loss.backward()
    codes = task.codebook.codes_KC[task.codebook.assign(seen["vectors"].flatten(0, 1))].view_as(seen["vectors"])
    assert_close(seen["input"], codes)
    assert seen["input"].grad is not None
    assert_close(seen["vectors"].grad, seen["input"].grad + 0.5 * 2 * (seen["vectors"] - codes) / 32)


def test_draws_depend_on_the_sample_and_the_place_alone() -> None:
    seeds = torch.tensor([3, 2**62, 7])
    draws = _draws(seeds, 4).view(3, 4)
    assert torch.equal(_draws(seeds[1:2], 4), draws[1])
    many = _draws(torch.arange(10_000), 100)
    assert len(many.unique()) == 1_000_000
    assert (float(many.min()), float(many.max())) == pytest.approx((0, 1), abs=1e-4)
    assert torch.histc(many, 10, 0, 1).tolist() == pytest.approx([100_000] * 10, rel=0.02)


#: How 40 patches are dealt to micro-batches of ranks.
LAYOUTS = {1: [[40]], 2: [[7, 13], [20, 0]], 3: [[0, 0], [25, 1], [6, 8]]}


def state_after(layout: list[list[int]], rank: int) -> tuple[dict[str, Tensor], list[float]]:
    """Buffers after a start and three steps, and the figures of the last, on one rank."""
    task = make_tokenizer_task(codebook_decay=0.4, revival_share=0.45).float()
    task.codebook.num_updates.zero_()
    first = sum(sum(sizes) for sizes in layout[:rank])

    def parts(tensor: Tensor) -> list[Tensor]:
        return list(tensor[first : first + sum(layout[rank])].split(layout[rank]))

    raw, targets = (
        3 * unit_vectors(40, seed=0) + 1,
        F.normalize(torch.rand(40, 49, generator=torch.Generator().manual_seed(1))),
    )
    draws = [_draws(torch.arange(10 * step, 10 * step + 10), 4) for step in range(4)]
    looks = [
        FirstLook(r, d, _sum_of(t), torch.tensor(True))
        for r, d, t in zip(parts(raw), parts(draws[0]), parts(targets), strict=True)
    ]
    task.start([TokenizerOutput(torch.zeros(()), first_looks=[look]) for look in looks])
    figures = Figures()
    for step in (1, 2, 3):
        # Two thirds of the patches are alike, so that codes die.
        vectors = torch.where(torch.arange(40)[:, None] % 3 > 0, unit_vectors(1, seed=9), unit_vectors(40, seed=step))
        codes = task.codebook.assign(vectors)
        outputs = [
            TokenizerOutput(torch.zeros(()), patches={"x": TokenizedPatches(v, c, d)})
            for v, c, d in zip(parts(vectors), parts(codes), parts(draws[step]), strict=True)
        ]
        task.after_step(outputs)
        for output in outputs:
            figures.add(output)
    figures.num_steps = 3
    reduced = figures.reduced()
    names = ("codes_used", "codes_perplexity", "codes_average_perplexity", "codes_revived")
    return dict(task.named_buffers()), [reduced[name] for name in names]


def test_ranks_and_micro_batches_do_not_matter() -> None:
    """Bit for bit: start, steps and revivals."""
    expected, figures = state_after(LAYOUTS[1], 0)
    assert figures[3] > 0
    for world_size in (2, 3):

        def on_rank(world: World) -> tuple[dict[str, Tensor], list[float]]:
            return state_after(LAYOUTS[world.world_size], world.rank)

        for found, of_rank in run_ranks(on_rank, world_size):
            assert of_rank == pytest.approx(figures)
            assert found.keys() == expected.keys()
            for name, buffer in expected.items():
                assert torch.equal(found[name], buffer), name


def test_the_start_by_hand() -> None:
    """Raw vectors are centred before they are normalised, and the decoder begins at the teacher's mean."""
    state, _ = state_after(LAYOUTS[1], 0)
    raw = 3 * unit_vectors(40, seed=0) + 1
    assert_close(state["code_head.center_C"], raw.mean(0))
    targets = F.normalize(torch.rand(40, 49, generator=torch.Generator().manual_seed(1)))
    assert_close(state["decoder.mean_F"], targets.mean(0))


def test_a_step_over_two_ranks_by_hand() -> None:
    """Both pull at the same code, which only the average of all their vectors explains."""

    def codes_after(world: World) -> Tensor:
        task = make_tokenizer_task(codebook_decay=0.9).float()
        own = unit_vectors(3 + world.rank, seed=world.rank)
        patches = TokenizedPatches(own, torch.full((len(own),), 2), torch.rand(len(own)).double())
        task.after_step([TokenizerOutput(torch.zeros(()), patches={"x": patches})])
        return task.codebook.codes_KC

    mean = F.normalize(torch.cat([unit_vectors(3, seed=0), unit_vectors(4, seed=1)]).mean(0), dim=0)
    expected = make_tokenizer_task().float().codebook.codes_KC.clone()
    expected[2] = F.normalize(0.9 * expected[2] + 0.1 * mean, dim=0)
    for found in run_ranks(codes_after, 2):
        assert_close(found, expected, atol=1e-6, rtol=0)


class NanTeacher(PixelTeacher):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) * float("nan")


def test_a_step_that_is_not_finite_changes_no_buffer() -> None:
    """Neither the first one, which the codebook would begin with, nor a later one."""
    for num_updates in (0, 9):
        task = make_tokenizer_task().float().train()
        task.codebook.num_updates.fill_(num_updates)
        task.teacher = Frozen(NanTeacher(4))
        before = {name: buffer.clone() for name, buffer in task.named_buffers()}
        batches = [make_micro_batch("visual_tokenizer", 2)]
        options = {"clip_norm": None, "autocast": nullcontext(), "figures": Figures()}
        assert not train_step(task, torch.optim.SGD(task.parameters()), batches, **options).is_good  # type: ignore[arg-type]
        assert all(torch.equal(buffer, before[name]) for name, buffer in task.named_buffers())
        task.teacher = Frozen(PixelTeacher(4))
        assert train_step(task, torch.optim.SGD(task.parameters()), batches, **options).is_good  # type: ignore[arg-type]
        assert int(task.codebook.num_updates) == max(2, num_updates + 1)


def test_the_teacher_is_no_part_of_the_task() -> None:
    task = make_tokenizer_task()
    teacher = task.teacher.on(torch.device("cpu"))
    task.teacher = Frozen(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    frozen = task.teacher.on(torch.device("cpu"))
    assert not any("teacher" in name for name in (*task.state_dict(), *dict(task.named_modules())))
    task.train()
    assert not teacher.training
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
