"""Expert layers that start as a trained dense layer (sparse upcycling, arXiv 2212.05055).

Experts on whole tokens are copies of the dense layer. Experts on sub-tokens cannot be: each sees a part of the token,
and a hidden unit of the dense layer needs all of it. There the layer starts as the best *linear* approximation, which
heads, identity experts and merge layer express exactly, and is then fitted to what the dense layer does on its own
inputs.

Shape suffixes: N tokens, D width, F hidden width, E experts, W width of a sub-token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhmoe_vl.moe import FeedForward, MoE, MultiHeadMoE
from mhmoe_vl.moe.layer import linear_layers
from mhmoe_vl.moe.routing import CosineRouter, PerHeadRouter

#: Spread of a router's logits for which experts are all but equally weighted.
_INDIFFERENCE = 1e-3
#: Tokens per step of a fit, and Adam's usual rate.
_FIT_ROWS, _FIT_RATE = 1024, 1e-3


@torch.no_grad()
def copy_into_experts(dense: FeedForward, layer: MoE, inputs_ND: Tensor | None = None) -> None:
    """Make every expert of ``layer`` the dense layer.

    Exact if the weights of a token's choices sum to one (``renormalize``). Otherwise the router starts all but
    indifferent and experts make up for their weight, which leaves an error below a percent. Norms of the dense layer
    are copied into experts that have them; else they are folded into the second matrix but for the scale of each
    token, of which there remains the mean over ``inputs_ND``.

    Args:
        inputs_ND: tokens that the dense layer works on; needed where a norm is folded.

    Raises:
        ValueError: experts that cannot be the dense layer, or weights that they cannot make up for, naming the setting.
    """
    experts = layer.experts
    hidden_dim = dense.w2.in_features
    if experts.ffn_dim != hidden_dim:
        raise ValueError(f"experts are {experts.ffn_dim} wide, and the dense layer is {hidden_dim}")
    if experts.glu != dense.glu:
        raise ValueError(f"glu={experts.glu}, and the dense layer has glu={dense.glu}")
    if layer.inner_residual:
        raise ValueError("inner_residual adds the input, which the dense layer does not")
    w2_FD: Tensor = dense.w2.weight.T
    b2_D: Tensor = dense.w2.bias
    norm = dense.norm if isinstance(dense.norm, nn.LayerNorm) else None
    if experts.norm_weight_EF is not None and experts.norm_bias_EF is not None:
        if norm is None:
            raise ValueError("sub_ln=True, and the dense layer has no norm")
        experts.norm_weight_EF.copy_(norm.weight)
        experts.norm_bias_EF.copy_(norm.bias)
    elif norm is not None:
        if inputs_ND is None:
            raise ValueError("to fold the norm of the dense layer, its inputs are needed")
        w2_FD, b2_D = _folded(dense, norm, inputs_ND)
    scale = 1.0
    if not layer.router.renormalize:
        _make_indifferent(layer)
        scale = 1 / _expected_weight(layer)
    for stack, value in (
        (experts.w1_EDF, dense.w1.weight.T),
        (experts.b1_EF, dense.w1.bias),
        (experts.w2_EFD, w2_FD * scale),
        (experts.b2_ED, b2_D * scale),
    ):
        if stack is not None:
            stack.copy_(value.expand_as(stack))


def start_linear(dense: FeedForward, layer: MultiHeadMoE, inputs_ND: Tensor) -> bool:
    """Make ``layer`` the affine map that is nearest to the dense layer on ``inputs_ND``.

    Since ``gelu(u) - gelu(-u) = u``, 2 W hidden units make an expert the identity; the merge layer then is the map.

    Returns:
        Whether that can be expressed; if not, the layer is left as it was.
    """
    experts, heads, merges = layer.moe.experts, linear_layers(layer.head), linear_layers(layer.merge)
    width, hidden_dim = experts.dim, experts.ffn_dim
    has_room = hidden_dim >= 2 * width or layer.moe.inner_residual
    if len(merges) != 1 or len(heads) > 1 or experts.glu or experts.norm_weight_EF is not None or not has_room:
        return False
    with torch.no_grad():
        ones_N1 = inputs_ND.new_ones(inputs_ND.shape[0], 1)
        # In float64: activations of neighbouring tokens are nearly collinear.
        augmented, targets = torch.cat([inputs_ND, ones_N1], dim=1).double(), dense(inputs_ND)[0].double()
        gram = augmented.T @ augmented
        gram += 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        solution = torch.linalg.solve(gram, augmented.T @ targets)
        merges[0].weight.copy_(solution[:-1].T)
        merges[0].bias.copy_(solution[-1])
        for head in heads:
            nn.init.eye_(head.weight)
            nn.init.zeros_(head.bias)
        if not layer.moe.router.renormalize:
            _make_indifferent(layer.moe)
        experts.w2_EFD.zero_()
        for bias in (experts.b1_EF, experts.b2_ED):
            if bias is not None:
                bias.zero_()
        if not layer.moe.inner_residual:
            eye = torch.eye(width, dtype=experts.w1_EDF.dtype, device=experts.w1_EDF.device)
            scale = 1.0 if layer.moe.router.renormalize else 1 / _expected_weight(layer.moe)
            experts.w1_EDF[:, :, :width], experts.w1_EDF[:, :, width : 2 * width] = eye, -eye
            experts.w2_EFD[:, :width], experts.w2_EFD[:, width : 2 * width] = eye * scale, -eye * scale
    return True


def fit(dense: FeedForward, layer: MultiHeadMoE, inputs_ND: Tensor, *, num_steps: int, seed: int = 0) -> None:
    """Bring ``layer`` nearer to the dense layer by AdamW on ``inputs_ND``.

    The router stays as it is, so that the fit cannot collapse it; experts become specialists of what is sent to them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        targets_ND = dense(inputs_ND)[0]
        variance = targets_ND.var(0).sum()
    experts = layer.moe.experts
    second = {parameter for parameter in (experts.w2_EFD, experts.b2_ED) if parameter is not None}
    others = [p for p in layer.parameters() if p not in second and p not in set(layer.moe.router.parameters())]
    # What makes up for small weights is large, and has as far to go.
    scale = 1.0 if layer.moe.router.renormalize else 1 / _expected_weight(layer.moe)
    groups: list[dict[str, Any]] = [{"params": others}, {"params": list(second), "lr": _FIT_RATE * scale}]
    optimizer = torch.optim.Adam(groups, lr=_FIT_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, num_steps))
    for _ in range(num_steps):
        rows = torch.randint(len(inputs_ND), (min(_FIT_ROWS, len(inputs_ND)),), generator=generator)
        rows = rows.to(inputs_ND.device)
        optimizer.zero_grad()
        error = layer(inputs_ND[rows])[0] - targets_ND[rows]
        (error.square().sum(-1).mean() / variance).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def missed_share(dense: FeedForward, layer: nn.Module, inputs_ND: Tensor) -> float:
    """Share of the variance of the dense layer's output that ``layer`` does not reproduce on ``inputs_ND``: 0 is the
    same function, 1 as good as a constant."""
    targets_ND = dense(inputs_ND)[0]
    error = layer(inputs_ND)[0] - targets_ND
    return float(error.square().sum() / (targets_ND - targets_ND.mean(0)).square().sum())


def _folded(dense: FeedForward, norm: nn.LayerNorm, inputs_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Second matrix ``[F, D]`` and bias that need no norm: its mean and weights are linear, its scale is taken to be
    the same for all tokens."""
    w2_FD = dense.w2.weight.T
    weighted_FD = norm.weight[:, None] * w2_FD
    centred_FD = weighted_FD - weighted_FD.mean(0)
    hidden_NF = dense.w1(inputs_ND)
    hidden_NF = F.gelu(hidden_NF) if not dense.glu else F.silu(hidden_NF.chunk(2, -1)[0]) * hidden_NF.chunk(2, -1)[1]
    inverse_N1 = (hidden_NF.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()
    plain_ND = hidden_NF @ centred_FD
    # The factor with the least squared error.
    scale = (plain_ND.square() * inverse_N1).sum() / plain_ND.square().sum()
    return centred_FD * scale, dense.w2.bias + norm.bias @ w2_FD


def _make_indifferent(layer: MoE) -> None:
    """Choices stay as different as they were, and weights become all but equal."""
    router = layer.router
    if isinstance(router, CosineRouter):
        if router.gate == "sigmoid":
            raise ValueError(
                "gate='sigmoid' of a cosine router weights tokens too differently for experts to make up for it; set "
                "renormalize=True"
            )
        # Unit vectors that differ little have cosines that differ little.
        step = _INDIFFERENCE * float(router.log_temperature.exp())
        common = nn.functional.normalize(router.embedding_ER.mean(0, keepdim=True), dim=-1)
        router.embedding_ER.copy_(common + step * nn.functional.normalize(router.embedding_ER, dim=-1))
        return
    weight = router.weight_HDE if isinstance(router, PerHeadRouter) else router.weight_DE
    # Normalised tokens are as long as the square root of their width.
    weight.mul_(_INDIFFERENCE / (weight.std() * layer.dim**0.5))


def _expected_weight(layer: MoE) -> float:
    """Sum of a token's weights where the router is indifferent."""
    if layer.router.gate == "sigmoid":
        return 0.5 * layer.router.top_k
    num_pools = layer.router.num_heads if isinstance(layer.router, PerHeadRouter) else 1
    return layer.router.top_k * num_pools / layer.experts.num_experts
