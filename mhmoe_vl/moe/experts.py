"""A bank of feed-forward experts with stacked weights, and its interchangeable backends.

Shape suffixes: E experts, A assignments (rows in expert order), D expert input width, F hidden width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhmoe_vl.moe.compiled import STATE
from mhmoe_vl.moe.dispatch import Assignment, served_weights
from mhmoe_vl.moe.local import local_part
from mhmoe_vl.moe.segments import segment_moe

BACKENDS = ("auto", "loop", "segments", "segments_recompute", "grouped_mm", "fused")
#: Backends that gather, weight and scatter rows themselves.
WHOLE_LAYER_BACKENDS = ("segments", "segments_recompute", "fused")


class BackendChoice(NamedTuple):
    """A backend and the reason for it."""

    backend: str
    reason: str


class Experts(nn.Module):
    """``E`` independent two-layer networks ``D -> F -> D`` over rows that are sorted by expert.

    GELU experts compute ``gelu(x W1 + b1) W2 + b2``; GLU experts ``(silu(x Wg) * (x W1)) W2`` (with biases if asked).

    Args:
        glu: gated experts with three matrices instead of two.
        sub_ln: normalise the hidden activation before ``W2``, as :class:`~mhmoe_vl.moe.FeedForward` does (Magneto,
            arXiv 2210.06423). Backends that do the whole layer cannot.
        backend: ``loop`` (one matmul per expert, plain autograd; the oracle), ``segments`` (the CPU engine of
            :mod:`~mhmoe_vl.moe.segments`), ``segments_recompute`` (the same, hidden activations made again instead of
            kept), ``grouped_mm`` (torch's grouped matmul), ``fused`` (the Triton kernels of
            :mod:`~mhmoe_vl.moe.fused`), or ``auto``, which :meth:`explain` explains.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        ffn_dim: int,
        *,
        glu: bool = False,
        bias: bool = True,
        sub_ln: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if min(num_experts, dim, ffn_dim) < 1:
            raise ValueError(f"num_experts={num_experts}, dim={dim} and ffn_dim={ffn_dim} must all be positive")
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
        if sub_ln and backend in WHOLE_LAYER_BACKENDS:
            raise ValueError(f"backend={backend!r} has no norm for sub_ln=True; use 'auto', 'loop' or 'grouped_mm'")
        self.num_experts, self.dim, self.ffn_dim = num_experts, dim, ffn_dim
        self.glu, self.backend = glu, backend
        # The gate and up projections of GLU experts share one matrix: one matmul instead of two.
        hidden_dim = 2 * ffn_dim if glu else ffn_dim
        self.w1_EDF = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w2_EFD = nn.Parameter(torch.empty(num_experts, ffn_dim, dim))
        self.b1_EF = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias else None
        self.b2_ED = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.norm_weight_EF = nn.Parameter(torch.empty(num_experts, ffn_dim)) if sub_ln else None
        self.norm_bias_EF = nn.Parameter(torch.empty(num_experts, ffn_dim)) if sub_ln else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every expert like a Xavier-uniform linear layer of its own size, biases zero."""
        for weight, fan_out in ((self.w1_EDF, self.ffn_dim), (self.w2_EFD, self.dim)):
            bound = math.sqrt(6.0 / (weight.shape[1] + fan_out))
            nn.init.uniform_(weight, -bound, bound)
        for bias in (self.b1_EF, self.b2_ED, self.norm_bias_EF):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.norm_weight_EF is not None:
            nn.init.ones_(self.norm_weight_EF)

    def forward(self, rows_AD: Tensor, counts_E: Tensor) -> Tensor:
        """Outputs in the order of ``rows_AD``; rows behind the last expert's segment give zeros.

        Args:
            rows_AD: rows sorted by expert.
            counts_E: int64, rows of each expert; may sum to less than A.
        """
        rows_AD = autocast_rows(rows_AD)
        backend = self.explain(rows_AD.device, rows_AD.dtype).backend
        if backend in WHOLE_LAYER_BACKENDS:
            order_A = torch.arange(rows_AD.shape[0], device=rows_AD.device)
            ones_A1 = torch.ones(rows_AD.shape[0], 1, device=rows_AD.device)
            return self._mix(backend, rows_AD, order_A, counts_E, ones_A1)
        if backend == "grouped_mm":
            return self._forward_grouped(rows_AD, counts_E)
        return self._forward_loop(rows_AD, counts_E)

    def mixes(self, x_ND: Tensor) -> bool:
        """Whether :meth:`mix` may be called for these rows."""
        return self.explain(x_ND.device, _autocast_dtype(x_ND)).backend in WHOLE_LAYER_BACKENDS

    def mix(self, x_ND: Tensor, assignment: Assignment) -> Tensor:
        """Dispatch, experts and combination in one: ``sum_k weight_k * expert_k(x)``."""
        x_ND = autocast_rows(x_ND)
        backend = self.explain(x_ND.device, x_ND.dtype).backend
        weights_NK = served_weights(assignment.routing)
        return self._mix(backend, x_ND, assignment.order_A, assignment.counts_E, weights_NK)

    def _mix(self, backend: str, x_ND: Tensor, order_A: Tensor, counts_E: Tensor, weights_NK: Tensor) -> Tensor:
        weights = self._weights(x_ND.dtype)
        if backend != "fused":
            recompute = backend == "segments_recompute"
            return segment_moe(x_ND, order_A, counts_E, weights_NK, *weights, glu=self.glu, recompute=recompute)
        try:
            from mhmoe_vl.moe.fused import fused_moe
        except ImportError as error:
            raise ImportError(f"backend='fused' needs triton, which comes with torch on Linux: {error}") from None
        return fused_moe(x_ND, order_A, counts_E, weights_NK, *weights, glu=self.glu)

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Matrices and biases of the experts that are on this rank."""
        b1_EF = None if self.b1_EF is None else local_part(self.b1_EF).to(dtype)
        b2_ED = None if self.b2_ED is None else local_part(self.b2_ED).to(dtype)
        return local_part(self.w1_EDF).to(dtype), b1_EF, local_part(self.w2_EFD).to(dtype), b2_ED

    def _norms(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Weights and biases of the norms of the experts that are on this rank; None without norms."""
        if self.norm_weight_EF is None or self.norm_bias_EF is None:
            return None
        return local_part(self.norm_weight_EF).to(dtype), local_part(self.norm_bias_EF).to(dtype)

    def explain(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> BackendChoice:
        """The backend that rows on ``device`` of ``dtype`` take, and why."""
        device = torch.device(device)
        if self.backend != "auto":
            return BackendChoice(self.backend, "asked for")
        if self.norm_weight_EF is not None and device.type in ("cpu", "meta"):
            if device.type == "cpu":
                return BackendChoice("loop", "on a CPU, only plain matmuls leave room for the norms of sub_ln")
            return BackendChoice("grouped_mm", "without memory, counts cannot be read, and segments have no norms")
        if device.type == "cpu":
            return BackendChoice("segments", f"on a CPU, hidden activations stay in cache and are kept once; {STATE}")
        if device.type == "meta":
            return BackendChoice("segments", "without memory, one operation that knows the shapes of its results")
        if device.type != "cuda":
            return BackendChoice("loop", f"on {device.type} only plain matmuls are known to work")
        if dtype != torch.bfloat16:
            return BackendChoice("loop", f"grouped matmuls on a GPU need bfloat16, not {_short(dtype)}")
        for name, size in (("dim", self.dim), ("ffn_dim", self.ffn_dim)):
            if size * dtype.itemsize % 16:
                return BackendChoice("loop", f"grouped matmuls need rows of a multiple of 16 bytes, and {name}={size}")
        return BackendChoice("grouped_mm", "on a GPU, one launch for all experts, and counts are not read back")

    def _activate(self, hidden_AF: Tensor) -> Tensor:
        if not self.glu:
            # Exact GELU: the tanh form is 3-5 times slower on CPU.
            return F.gelu(hidden_AF)
        gate_AF, up_AF = hidden_AF.chunk(2, dim=-1)
        return F.silu(gate_AF) * up_AF

    def _forward_loop(self, rows_AD: Tensor, counts_E: Tensor) -> Tensor:
        # unbind, not indexing: W[e] in a loop gives autograd one full-size zero gradient per expert.
        counts = counts_E.tolist()
        w1_EDF, b1_EF, w2_EFD, b2_ED = self._weights(rows_AD.dtype)
        w1, w2 = w1_EDF.unbind(0), w2_EFD.unbind(0)
        norms = self._norms(rows_AD.dtype)
        norm = None if norms is None else [weights.unbind(0) for weights in norms]
        b1 = [None] * len(counts) if b1_EF is None else b1_EF.unbind(0)
        b2 = [None] * len(counts) if b2_ED is None else b2_ED.unbind(0)
        tail = rows_AD.shape[0] - sum(counts)
        segments = rows_AD.split([*counts, tail])
        outputs = []
        # Experts without rows run too: their gradients are then zeros instead of None, on every rank alike.
        for e in range(len(counts)):
            hidden = self._activate(_linear(segments[e], w1[e], b1[e]))
            if norm is not None:
                hidden = F.layer_norm(hidden, hidden.shape[-1:], norm[0][e], norm[1][e]).to(hidden.dtype)
            outputs.append(_linear(hidden, w2[e], b2[e]))
        return torch.cat([*outputs, torch.zeros_like(segments[-1])])

    def _forward_grouped(self, rows_AD: Tensor, counts_E: Tensor) -> Tensor:
        dtype = rows_AD.dtype
        if dtype == torch.float64:
            raise ValueError("grouped_mm takes no float64: use float32, bfloat16 or backend='loop'")
        for name, size in (("dim", self.dim), ("ffn_dim", self.ffn_dim)):
            if size * rows_AD.element_size() % 16:
                raise ValueError(
                    f"grouped_mm needs rows of a multiple of 16 bytes, but {name}={size} in {dtype} is "
                    f"{size * rows_AD.element_size()} bytes: choose a multiple of {16 // rows_AD.element_size()} "
                    "or backend='loop'"
                )
        ends_E = counts_E.cumsum(0).to(torch.int32)
        row_A = torch.arange(rows_AD.shape[0], device=rows_AD.device)
        expert_A = torch.searchsorted(ends_E, row_A.to(torch.int32), right=True)
        # Behind the last segment grouped_mm leaves uninitialised memory, in its result and in its gradient.
        # where() keeps it out of what comes in and goes out, and a spare bias row E takes it from the biases.
        served_A1 = (row_A < ends_E[-1])[:, None]
        rows_AD = _row_major(torch.where(served_A1, rows_AD, 0.0))
        w1_EDF, b1_EF, w2_EFD, b2_ED = self._weights(dtype)
        hidden_AF = F.grouped_mm(rows_AD, w1_EDF, offs=ends_E)
        if b1_EF is not None:
            hidden_AF = hidden_AF + F.pad(b1_EF, (0, 0, 0, 1)).index_select(0, expert_A)
        hidden_AF = self._activate(hidden_AF)
        norms = self._norms(dtype)
        if norms is not None:
            weight_AF, bias_AF = (F.pad(table, (0, 0, 0, 1)).index_select(0, expert_A) for table in norms)
            normed_AF = F.layer_norm(hidden_AF, hidden_AF.shape[-1:]).to(dtype)
            hidden_AF = torch.addcmul(bias_AF, normed_AF, weight_AF)
        y_AD = _row_major_grad(F.grouped_mm(hidden_AF, w2_EFD, offs=ends_E))
        if b2_ED is not None:
            y_AD = y_AD + F.pad(b2_ED, (0, 0, 0, 1)).index_select(0, expert_A)
        return torch.where(served_A1, y_AD, 0.0)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, ffn_dim={self.ffn_dim}, glu={self.glu}, "
            f"bias={self.b1_EF is not None}, sub_ln={self.norm_weight_EF is not None}, backend={self.backend}"
        )


def autocast_rows(x: Tensor) -> Tensor:
    """In the dtype of the autocast region around, if there is one."""
    return x.to(_autocast_dtype(x))


def _autocast_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    is_enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_enabled else x.dtype


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _linear(x: Tensor, weight_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    return x @ weight_IO if bias_O is None else torch.addmm(bias_O, x, weight_IO)


class _RowMajorGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _row_major(grad)


def _row_major_grad(x: Tensor) -> Tensor:
    """Identity whose gradient has row-major strides: grouped_mm refuses others, such as those of a transposed use."""
    return _RowMajorGrad.apply(x)


def _row_major(x: Tensor) -> Tensor:
    """``x`` with row-major strides. Unlike ``contiguous()``, also where a single row leaves strides ambiguous."""
    return x.reshape(-1).view_as(x)
