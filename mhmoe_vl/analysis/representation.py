"""Representation collapse: do rows that go to one expert all look alike?

Shape suffixes: N rows, E experts, D width of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Directions in which the experts' means spread less than this share of the widest are left out of the pseudo-inverse.
_SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True)
class Collapse:
    """Scatter of the rows within and between experts; the smaller the ratio, the more collapsed.

    Attributes:
        num_rows: rows behind it.
        within, between: ``Tr(Sigma_W)`` and ``Tr(Sigma_B)``.
        ratio: ``Tr(Sigma_W) / Tr(Sigma_B)``; None if the experts' means do not differ.
        with_inverse: ``Tr(Sigma_W Sigma_B^+)``, the paper's own form, which weighs every direction in which the means
            differ by how little they differ in it; None as before.
    """

    num_rows: int
    within: float
    between: float
    ratio: float | None
    with_inverse: float | None


class ExpertScatter:
    """Running sums from which the representation collapse of one pool follows (X-MoE, arXiv 2204.09179).

    With ``x_i`` the input of the router, ``e(i)`` its first choice, ``mu_e`` the mean of the ``n_e`` rows of expert e,
    and ``mu`` the mean of all N rows::

        Sigma_W = 1/N sum_i (x_i - mu_e(i)) (x_i - mu_e(i))^T
        Sigma_B = 1/N sum_e n_e (mu_e - mu) (mu_e - mu)^T
        RC      = Tr(Sigma_W) / Tr(Sigma_B)      and, as in the paper,      Tr(Sigma_W Sigma_B^+)

    Both are weighted by rows, so that ``Sigma_W + Sigma_B`` is the covariance of all rows, whatever the loads are.
    Under MH-MoE a row is a sub-token behind the head layer. If each head has experts of its own, ``mu`` is the mean of
    the head, whose rows no expert of another head could have got.

    Memory is ``E D + D^2``, whatever the number of rows.

    Args:
        num_pools: sets of experts that take turns over the rows, as in :class:`mhmoe_vl.moe.Routing`.
    """

    def __init__(self, num_experts: int, dim: int, num_pools: int = 1) -> None:
        self.num_pools = num_pools
        self.counts_E = torch.zeros(num_experts, dtype=torch.float64)
        self.sums_ED = torch.zeros(num_experts, dim, dtype=torch.float64)
        self.second_DD = torch.zeros(dim, dim, dtype=torch.float64)
        self._origin_D: Tensor | None = None

    def add(self, x_ND: Tensor, experts_N: Tensor) -> None:
        """Take up rows and the expert of each."""
        if x_ND.shape[0] == 0:
            return
        if self._origin_D is None:
            # Scatter does not depend on the origin; one amid the rows keeps differences of large sums out of it.
            self._origin_D = x_ND.mean(0)
        x_ND = x_ND - self._origin_D
        self.counts_E += torch.bincount(experts_N, minlength=self.counts_E.numel()).double().cpu()
        sums_ED = torch.zeros(self.sums_ED.shape, dtype=x_ND.dtype, device=x_ND.device)
        self.sums_ED += sums_ED.index_add_(0, experts_N, x_ND).double().cpu()
        self.second_DD += (x_ND.T @ x_ND).double().cpu()

    def collapse(self) -> Collapse | None:
        """The figures of all rows so far; None without rows."""
        num_rows = self.counts_E.sum()
        if num_rows == 0:
            return None
        counts_E1 = self.counts_E[:, None]
        means_ED = self.sums_ED / counts_E1.clamp_min(1)
        # Experts of one pool are neighbours.
        pool_sums_PD = self.sums_ED.unflatten(0, (self.num_pools, -1)).sum(1)
        pool_counts_P1 = self.counts_E.unflatten(0, (self.num_pools, -1)).sum(1)[:, None]
        pool_means_PD = pool_sums_PD / pool_counts_P1.clamp_min(1)
        num_of_pool = self.counts_E.numel() // self.num_pools
        centred_ED = means_ED - pool_means_PD.repeat_interleave(num_of_pool, 0)
        weighted_ED = centred_ED * (counts_E1 / num_rows).sqrt()  # Sigma_B is its square
        within_DD = (self.second_DD - (means_ED * counts_E1).T @ means_ED) / num_rows
        within, between = float(within_DD.trace().clamp_min(0)), float(weighted_ED.square().sum())
        total = within + between
        if between <= 1e-12 * total or between == 0:
            return Collapse(int(num_rows), within, between, None, None)
        _, spread_S, directions_SD = torch.linalg.svd(weighted_ED, full_matrices=False)
        kept = spread_S > _SMALLEST_SPREAD * spread_S[0]
        directions_SD = directions_SD[kept]
        within_S = ((directions_SD @ within_DD) * directions_SD).sum(-1).clamp_min(0)
        return Collapse(
            int(num_rows), within, between, within / between, float((within_S / spread_S[kept].square()).sum())
        )
