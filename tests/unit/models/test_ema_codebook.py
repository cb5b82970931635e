"""The codebook against hand-worked steps, a plain loop, and vector-quantize-pytorch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from mhmoe_vl.models import ema_codebook
from mhmoe_vl.models.ema_codebook import CodeStatistics, EmaCodebook, nearest_codes, perplexity, race


def unit_vectors(num: int, dim: int, *, seed: int) -> Tensor:
    return F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def at_angles(*degrees: float) -> Tensor:
    """Unit vectors of the plane."""
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def codebook_of(codes: Tensor, **options: Any) -> EmaCodebook:
    """A codebook with these codes, in the middle of training."""
    codebook = EmaCodebook(*codes.shape, **({"decay": 0.5, "revival_share": 0.0} | options))
    codebook.codes_KC.copy_(codes)
    codebook.usage_K.fill_(1.0)
    codebook.num_updates.fill_(9)
    return codebook


def step(codebook: EmaCodebook, vectors: Tensor) -> None:
    codebook.update(CodeStatistics.of(vectors, codebook.assign(vectors), codebook.num_codes))


def test_a_step_by_hand() -> None:
    """Two vectors 20 degrees from each other pull a code half way to their middle, one pulls as strongly, and the third
    code stays."""
    codebook = codebook_of(at_angles(0, 90, 200))
    step(codebook, at_angles(10, 30, 100))
    assert_close(codebook.codes_KC, at_angles(10, 95, 200))
    assert_close(codebook.usage_K, torch.tensor([1.5, 1.0, 0.5]))
    assert int(codebook.num_updates) == 10


def test_vectors_that_cancel_out_move_nothing() -> None:
    codebook = codebook_of(at_angles(0, 180))
    codebook.update(CodeStatistics.of(at_angles(90, 270), torch.tensor([0, 0]), 2))
    assert torch.equal(codebook.codes_KC, at_angles(0, 180))


def test_a_step_as_the_library_does_it() -> None:
    """It averages sums, and BEiT v2 directions, which is the same if the sum so far is as long as that of the step."""
    library = pytest.importorskip("vector_quantize_pytorch")
    codes, vectors = unit_vectors(5, 8, seed=0), unit_vectors(40, 8, seed=1)
    quantizer = library.VectorQuantize(
        dim=8,
        codebook_size=5,
        decay=0.9,
        use_cosine_sim=True,
        threshold_ema_dead_code=0,
        commitment_weight=1.0,
        sync_codebook=False,
    ).train()
    state = quantizer._codebook
    nearest = (vectors @ codes.T).argmax(-1)
    length = torch.stack([vectors[nearest == code].sum(0).norm() for code in range(5)])
    assert (torch.bincount(nearest, minlength=5) > 0).all()
    state.embed.data.copy_(codes[None])
    state.embed_avg.data.copy_((codes * length[:, None])[None])
    quantized, indices, _ = quantizer(vectors[None])
    ours = codebook_of(codes, decay=0.9)
    assert torch.equal(indices[0], ours.assign(vectors))
    assert_close(quantized[0], codes[nearest])
    step(ours, vectors)
    assert_close(ours.codes_KC, state.embed[0])
    assert_close(ours.usage_K, state.cluster_size[0])


def test_statistics_do_not_depend_on_how_they_are_summed() -> None:
    """Bit for bit, where sums of floats would."""
    vectors = unit_vectors(1000, 3, seed=0)
    codes = torch.randint(0, 4, (1000,), generator=torch.Generator().manual_seed(1))
    whole = CodeStatistics.of(vectors, codes, 4)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(2))
    parts = [CodeStatistics.of(vectors[part], codes[part], 4) for part in order.split(7)]
    for name in ("counts_K", "sums_KC"):
        assert torch.equal(sum(getattr(part, name) for part in parts), getattr(whole, name))
    expected = torch.stack([vectors.double()[codes == code].mean(0) for code in range(4)])
    assert_close(whole.means_KC().double(), expected, atol=1e-7, rtol=0)


def test_similarities_are_never_all_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, codes = unit_vectors(50, 4, seed=0), unit_vectors(9, 4, seed=1)
    expected = (vectors @ codes.T).argmax(-1)
    sizes = []
    whole_split = Tensor.split
    monkeypatch.setattr(Tensor, "split", lambda self, size: sizes.append(size) or whole_split(self, size))
    monkeypatch.setattr(ema_codebook, "_MAX_COSINES", 64)
    assert torch.equal(nearest_codes(vectors, codes), expected)
    assert sizes == [7]


def spherical_kmeans(vectors: NDArray[np.float64], codes: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """Lloyd's algorithm with cosines, as plainly as it can be written."""
    codes = codes.copy()
    for _ in range(steps):
        members: list[list[NDArray[np.float64]]] = [[] for _ in codes]
        for vector in vectors:
            members[max(range(len(codes)), key=lambda code: vector @ codes[code])].append(vector)
        for code, of_code in enumerate(members):
            if of_code:
                total = np.sum(of_code, axis=0)
                codes[code] = total / np.linalg.norm(total)
    return codes


def test_the_start_is_spherical_kmeans(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_vectors(60, 3, seed=0)
    monkeypatch.setattr(ema_codebook, "_spread", lambda vectors, num_codes: vectors[:num_codes])
    codebook = EmaCodebook(7, 3, decay=0.9, revival_share=0.1)
    assert not codebook.has_started
    codebook.start(vectors)
    expected = spherical_kmeans(vectors.double().numpy(), vectors[:7].double().numpy(), 10)
    assert_close(codebook.codes_KC.double(), torch.from_numpy(expected), atol=1e-6, rtol=0)
    assert codebook.has_started
    assert torch.equal(codebook.usage_K, torch.bincount(codebook.assign(vectors), minlength=7).float())


def test_the_start_finds_clusters_of_any_size() -> None:
    """One of 500 vectors, five of 2: drawn at random alone, all would be of the large one."""
    centers = F.one_hot(torch.arange(6), 6).float()
    noise = 0.003 * torch.randn(510, 6, generator=torch.Generator().manual_seed(0))
    cluster = torch.tensor([0] * 500 + [1, 2, 3, 4, 5] * 2)
    vectors = F.normalize(centers[cluster] + noise, dim=-1)
    for seed in range(5):
        order = torch.randperm(510, generator=torch.Generator().manual_seed(seed))
        codebook = EmaCodebook(6, 6, decay=0.9, revival_share=0.1)
        codebook.start(vectors[order])
        found = codebook.codes_KC[(centers @ codebook.codes_KC.T).argmax(-1)]
        expected = torch.stack([F.normalize(vectors[cluster == c].sum(0), dim=0) for c in range(6)])
        assert_close(found, expected, atol=1e-5, rtol=0)


def test_fewer_different_vectors_than_codes() -> None:
    codebook = EmaCodebook(4, 2, decay=0.9, revival_share=0.1)
    codebook.start(at_angles(0, 0, 90, 90, 0))
    assert codebook.codes_KC.isfinite().all()
    assert sorted(codebook.usage_K.tolist()) == [0, 0, 2, 3]


def test_the_first_update_counts_vectors_of_a_step() -> None:
    codebook = EmaCodebook(2, 2, decay=0.5, revival_share=0.1)
    codebook.start(at_angles(0, 1, 90))
    step(codebook, at_angles(0, 1, 0, 1, 90, 90))
    assert sorted(codebook.usage_K.tolist()) == [2, 4]


def test_dead_codes_and_their_revival() -> None:
    codebook = codebook_of(at_angles(0, 90, 180, 270), revival_share=0.2)
    codebook.usage_K.copy_(torch.tensor([10.0, 0.9, 7.9, 1.2]))  # a fifth of the mean is 1
    assert codebook.dead_codes().tolist() == [1]
    codebook.revive(torch.tensor([1]), at_angles(45))
    assert_close(codebook.codes_KC, at_angles(0, 45, 180, 270))
    # Twice the limit, so that it has time.
    assert_close(codebook.usage_K, torch.tensor([10.0, 2.0, 7.9, 1.2]))
    assert not codebook.dead_codes().numel()
    assert not codebook_of(at_angles(0, 90)).dead_codes().numel()


def test_a_race_draws_by_weight() -> None:
    """20,000 races of four; five standard deviations."""
    draws = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([0.0, 1.0, 2.0, 5.0])
    winners = torch.bincount(race(draws, weights).argmin(-1), minlength=4) / 20_000
    for share, weight in zip(winners.tolist(), weights.tolist(), strict=True):
        expected = weight / 8
        assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / 20_000)
    assert race(torch.zeros(1), torch.zeros(1)).isinf().all()


def test_perplexity() -> None:
    assert float(perplexity(torch.tensor([3, 3, 3, 0]))) == pytest.approx(3)
    assert float(perplexity(torch.tensor([1, 3]))) == pytest.approx(
        math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    )
    assert float(perplexity(torch.zeros(3))) == 0
