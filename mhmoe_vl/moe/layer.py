"""MoE and Multi-Head MoE layers.

Shape suffixes: T tokens, N routed rows (T tokens, or T * num_heads sub-tokens), D width of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mhmoe_vl.moe.dispatch import CapacityDispatcher, Dispatcher, DroplessDispatcher
from mhmoe_vl.moe.experts import BackendChoice, Experts
from mhmoe_vl.moe.routing import ROUTERS, CosineRouter, LinearRouter, PerHeadRouter, Routing

POOLS = ("shared", "per_head")


class MoE(nn.Module):
    """Sparse mixture of experts: router, dispatcher, experts.

    Args:
        dim: width of a token.
        ffn_dim: hidden width of one expert.
        num_experts: size of the expert pool.
        top_k: experts per token.
        router: ``linear`` (softmax of a linear map), ``cosine`` (X-MoE), or a router of your own for ``num_experts``.
        gate: ``softmax`` or ``sigmoid`` over the router's scores.
        renormalize: make the k weights of a token sum to 1 (off in the MH-MoE papers).
        inner_residual: add the input of the experts to their output (arXiv 2404.15045, equation 6; the official code
            and arXiv 2411.16205 do not).
        capacity_factor: None serves every choice; a number drops what exceeds each expert's capacity.
        glu: SwiGLU experts with three matrices.
        sub_ln: experts normalise their hidden activation.
        backend: see :class:`~mhmoe_vl.moe.experts.Experts`.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        top_k: int = 1,
        *,
        router: str | LinearRouter | CosineRouter | PerHeadRouter = "linear",
        gate: str = "softmax",
        renormalize: bool = False,
        inner_residual: bool = False,
        capacity_factor: float | None = None,
        glu: bool = False,
        bias: bool = True,
        sub_ln: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.inner_residual = inner_residual
        if isinstance(router, str):
            if router not in ROUTERS:
                raise ValueError(f"router={router!r} must be one of {', '.join(ROUTERS)}")
            make_router = LinearRouter if router == "linear" else CosineRouter
            router = make_router(dim, num_experts, top_k, gate=gate, renormalize=renormalize)
        self.router = router
        self.experts = Experts(num_experts, dim, ffn_dim, glu=glu, bias=bias, sub_ln=sub_ln, backend=backend)
        self.dispatcher: Dispatcher = (
            DroplessDispatcher() if capacity_factor is None else CapacityDispatcher(capacity_factor)
        )

    def reset_parameters(self) -> None:
        self.router.reset_parameters()
        self.experts.reset_parameters()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Mix experts for each token.

        Args:
            x: ``[..., dim]``.
            valid: bool ``[...]``; False marks padding, which is neither routed nor counted and gives zeros.

        Returns:
            ``y`` like ``x``, and the routing (rows in the order of ``x`` flattened).
        """
        x_ND = _zero_padding(x, valid).reshape(-1, self.dim)
        routing = self.router(x_ND)
        if valid is not None:
            routing = routing.replace(valid_N=valid.reshape(-1))
        assignment = self.dispatcher.assign(routing)
        if self.dispatcher.is_local and self.experts.mixes(x_ND):
            y_ND = self.experts.mix(x_ND, assignment)
        else:
            rows_AD = self.dispatcher.dispatch(x_ND, assignment)
            y_ND = self.dispatcher.combine(self.experts(rows_AD, assignment.counts_E), assignment)
        if self.inner_residual:
            y_ND = y_ND + x_ND
        return y_ND.reshape(x.shape), assignment.routing

    def explain(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> BackendChoice:
        """Which backend tokens on ``device`` of ``dtype`` take, and why."""
        backend, reason = self.experts.explain(device, dtype)
        if backend == "fused" and not self.dispatcher.is_local:
            reason += "; rows come from other ranks, so gather, weights and scatter stay outside the kernel"
        return BackendChoice(backend, reason)

    def extra_repr(self) -> str:
        return f"dispatcher={self.dispatcher!r}, inner_residual={self.inner_residual}"


class MultiHeadMoE(nn.Module):
    """Multi-Head Mixture-of-Experts (arXiv 2404.15045; at equal FLOPs, 2411.16205).

    A head layer mixes each token, which is then cut into ``num_heads`` sub-tokens; each is routed on its own through
    one pool of experts shared by all heads; a merge layer mixes the results. This class only wraps :class:`MoE`: with
    one head and identity head and merge layers it *is* that layer.

    Args:
        dim: width of a token; ``num_heads`` must divide it. Experts work on ``dim / num_heads``.
        num_heads: sub-tokens per token; unrelated to attention heads.
        pools: ``shared``, or ``per_head``: each head has a linear router and ``num_experts / num_heads`` experts of its
            own (Multi-Head LatentMoE, arXiv 2602.04870), so that heads can be spread over ranks before they are routed.
        num_head_layers, num_merge_layers: depth of the head and merge layers, with ReLU between linear layers
            (arXiv 2404.15045, section 5); 0 is the identity.
        Other arguments as for :class:`MoE`.

    Attributes:
        exchange_heads: how rows reach the ranks that own their heads and come back; None if all heads are here. Called
            with ``(moe, rows, valid)``, returns what ``moe(rows, valid)`` would.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        num_heads: int,
        top_k: int = 1,
        *,
        pools: str = "shared",
        num_head_layers: int = 1,
        num_merge_layers: int = 1,
        router: str = "linear",
        gate: str = "softmax",
        renormalize: bool = False,
        inner_residual: bool = False,
        capacity_factor: float | None = None,
        glu: bool = False,
        bias: bool = True,
        sub_ln: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if pools not in POOLS:
            raise ValueError(f"pools={pools!r} must be one of {', '.join(POOLS)}")
        if pools == "per_head" and router != "linear":
            raise ValueError(f"router={router!r}: with pools='per_head' only 'linear' is known")
        self.dim = dim
        self.num_heads = num_heads
        self.pools = pools
        self.exchange_heads: Callable[[MoE, Tensor, Tensor | None], tuple[Tensor, Routing]] | None = None
        self.head = _projection(dim, num_head_layers)
        width = dim // num_heads
        self.moe = MoE(
            width,
            ffn_dim,
            num_experts,
            top_k,
            router=router
            if pools == "shared"
            else PerHeadRouter(width, num_experts, num_heads, top_k, gate=gate, renormalize=renormalize),
            gate=gate,
            renormalize=renormalize,
            inner_residual=inner_residual,
            capacity_factor=capacity_factor,
            glu=glu,
            bias=bias,
            sub_ln=sub_ln,
            backend=backend,
        )
        self.merge = _projection(dim, num_merge_layers)
        self._reset_projections()  # experts and router have reset themselves

    def reset_parameters(self) -> None:
        """Xavier-uniform head (gain 1/sqrt(2)) and merge layers, biases zero (arXiv 2404.15045, appendix)."""
        self._reset_projections()
        self.moe.reset_parameters()

    def _reset_projections(self) -> None:
        for projection, gain in ((self.head, 2**-0.5), (self.merge, 1.0)):
            for linear in linear_layers(projection):
                nn.init.xavier_uniform_(linear.weight, gain=gain)
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Routing]:
        """As :meth:`MoE.forward`; the routing has ``num_heads`` rows per token, neighbours in memory."""
        sub_ND = self.head(_zero_padding(x, valid)).reshape(-1, self.dim // self.num_heads)
        valid_N = None if valid is None else valid.reshape(-1).repeat_interleave(self.num_heads)
        if self.exchange_heads is None:
            y_ND, routing = self.moe(sub_ND, valid_N)
        else:
            y_ND, routing = self.exchange_heads(self.moe, sub_ND, valid_N)
        y = _zero_padding(self.merge(y_ND.reshape(x.shape)), valid)
        return y, routing.replace(num_heads=self.num_heads)

    def explain(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> BackendChoice:
        """Which backend tokens on ``device`` of ``dtype`` take, and why."""
        return self.moe.explain(device, dtype)


def linear_layers(projection: nn.Module) -> list[nn.Linear]:
    """Of a head or merge layer, in the order of computation; none if it is the identity."""
    return [module for module in projection.modules() if isinstance(module, nn.Linear)]


def _projection(dim: int, num_layers: int) -> nn.Module:
    if num_layers < 0:
        raise ValueError(f"num_head_layers and num_merge_layers must be 0 or more, got {num_layers}")
    if num_layers < 2:
        return nn.Linear(dim, dim) if num_layers else nn.Identity()
    layers: list[nn.Module] = [nn.Linear(dim, dim)]
    for _ in range(num_layers - 1):
        layers += [nn.ReLU(), nn.Linear(dim, dim)]
    return nn.Sequential(*layers)


def _zero_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """``x`` with zeros where ``valid`` is False: whatever padding holds, NaN included, stays out of all gradients."""
    if valid is None:
        return x
    if valid.shape != x.shape[:-1]:
        raise ValueError(f"valid has shape {tuple(valid.shape)}, tokens have {tuple(x.shape[:-1])}")
    return torch.where(valid[..., None], x, 0.0)
