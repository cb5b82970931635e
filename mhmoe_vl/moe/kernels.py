"""Triton kernels of :mod:`mhmoe_vl.moe.fused`, which explains them.

Names as there. A row of D values is held in two parts of D0 and D1 values, powers of two: 192 is 128 + 64, because one
block of 256 would waste a quarter of the products. A block has BLOCK_ROWS rows of one expert; hidden columns are taken
BLOCK_F at a time.
"""

# Arguments of kernels are pointers and blocks, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gelu(h):
    return 0.5 * h * (1 + tl.math.erf(h * 0.7071067811865476))


@triton.jit
def _gelu_gradient(h):
    return 0.5 * (1 + tl.math.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)


@triton.jit
def _load_rows(base, rows, inside, first, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns ``first`` to ``first + WIDTH`` of the given rows ``[BLOCK_ROWS, WIDTH]``, zero outside."""
    columns = first + tl.arange(0, WIDTH)
    return tl.load(
        base + rows[:, None] * D + columns[None, :], mask=inside[:, None] & (columns < D)[None, :], other=0.0
    )


@triton.jit
def _load_tile(base, d_first, h_columns, h_inside, d_stride, h_stride, WIDTH: tl.constexpr, D: tl.constexpr):
    """A slice of a weight matrix as ``[WIDTH, BLOCK_F]``, whichever way it lies in memory, zero outside."""
    d = d_first + tl.arange(0, WIDTH)
    mask = (d < D)[:, None] & h_inside[None, :]
    return tl.load(base + d[:, None] * d_stride + h_columns[None, :] * h_stride, mask=mask, other=0.0)


@triton.jit
def _product(x0, x1, w0, w1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """``[x0 x1] @ [w0; w1]`` in float32."""
    total = tl.dot(x0, w0, input_precision=PRECISION)
    if D1 > 0:
        total = tl.dot(x1, w1, total, input_precision=PRECISION)
    return total


@triton.jit
def forward_kernel(
    x_ptr, order_ptr, weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr, expert_ptr, start_ptr, end_ptr,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, H: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_F: tl.constexpr, GLU: tl.constexpr, BIAS1: tl.constexpr,
    BIAS2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    expert = tl.load(expert_ptr + block)
    if expert < E:
        positions = tl.load(start_ptr + block) + tl.arange(0, BLOCK_ROWS)
        inside = positions < tl.load(end_ptr + block)
        assignment = tl.load(order_ptr + positions, mask=inside, other=0)
        row = assignment // K
        x0 = _load_rows(x_ptr, row, inside, 0, D0, D)
        x1 = x0
        y0 = tl.zeros([BLOCK_ROWS, D0], tl.float32)
        y1 = y0
        if D1 > 0:
            x1 = _load_rows(x_ptr, row, inside, D0, D1, D)
            y1 = tl.zeros([BLOCK_ROWS, D1], tl.float32)
        w1_ptr += expert * D * H
        w2_ptr += expert * F * D
        for first in range(0, F, BLOCK_F):
            f = first + tl.arange(0, BLOCK_F)
            f_inside = f < F
            hidden = _hidden(x0, x1, w1_ptr, b1_ptr, expert, f, f_inside, D, H, D0, D1, BIAS1, PRECISION)
            if GLU:
                up = _hidden(x0, x1, w1_ptr, b1_ptr, expert, F + f, f_inside, D, H, D0, D1, BIAS1, PRECISION)
                activation = hidden * tl.sigmoid(hidden) * up
            else:
                activation = _gelu(hidden)
            activation = activation.to(x0.dtype)
            w2_0 = tl.trans(_load_tile(w2_ptr, 0, f, f_inside, 1, D, D0, D))
            y0 = tl.dot(activation, w2_0, y0, input_precision=PRECISION)
            if D1 > 0:
                w2_1 = tl.trans(_load_tile(w2_ptr, D0, f, f_inside, 1, D, D1, D))
                y1 = tl.dot(activation, w2_1, y1, input_precision=PRECISION)
        weight = tl.load(weight_ptr + assignment, mask=inside, other=0.0).to(tl.float32)[:, None]
        _store_output(y_ptr, y0, assignment, inside, weight, b2_ptr, expert, 0, D0, D, BIAS2)
        if D1 > 0:
            _store_output(y_ptr, y1, assignment, inside, weight, b2_ptr, expert, D0, D1, D, BIAS2)


@triton.jit
def _hidden(
    x0, x1, w1_ptr, b1_ptr, expert, columns, inside, D: tl.constexpr, H: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, BIAS1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pre-activations ``[BLOCK_ROWS, BLOCK_F]`` of some hidden columns."""
    w1_0 = _load_tile(w1_ptr, 0, columns, inside, H, 1, D0, D)
    w1_1 = w1_0
    if D1 > 0:
        w1_1 = _load_tile(w1_ptr, D0, columns, inside, H, 1, D1, D)
    hidden = _product(x0, x1, w1_0, w1_1, D1, PRECISION)
    if BIAS1:
        hidden += tl.load(b1_ptr + expert * H + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return hidden


@triton.jit
def _store_output(
    y_ptr, y, assignment, inside, weight, b2_ptr, expert, first, WIDTH: tl.constexpr, D: tl.constexpr,
    BIAS2: tl.constexpr,
):  # fmt: skip
    columns = first + tl.arange(0, WIDTH)
    if BIAS2:
        y += tl.load(b2_ptr + expert * D + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    mask = inside[:, None] & (columns < D)[None, :]
    tl.store(y_ptr + assignment[:, None] * D + columns[None, :], (y * weight).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_rows_kernel(
    dy_ptr, x_ptr, order_ptr, weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, dx_ptr, dweight_ptr, expert_ptr, start_ptr,
    end_ptr, E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, H: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_F: tl.constexpr, GLU: tl.constexpr, BIAS1: tl.constexpr,
    BIAS2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows, and of the combine weights: ``<dy W2^T, activation> + <dy, b2>``, without the outputs."""
    block = tl.program_id(0)
    expert = tl.load(expert_ptr + block)
    if expert < E:
        positions = tl.load(start_ptr + block) + tl.arange(0, BLOCK_ROWS)
        inside = positions < tl.load(end_ptr + block)
        assignment = tl.load(order_ptr + positions, mask=inside, other=0)
        row = assignment // K
        weight = tl.load(weight_ptr + assignment, mask=inside, other=0.0).to(tl.float32)[:, None]
        x0 = _load_rows(x_ptr, row, inside, 0, D0, D)
        dy0 = _load_rows(dy_ptr, assignment, inside, 0, D0, D)
        x1, dy1 = x0, dy0
        dx0 = tl.zeros([BLOCK_ROWS, D0], tl.float32)
        dx1 = dx0
        if D1 > 0:
            x1 = _load_rows(x_ptr, row, inside, D0, D1, D)
            dy1 = _load_rows(dy_ptr, assignment, inside, D0, D1, D)
            dx1 = tl.zeros([BLOCK_ROWS, D1], tl.float32)
        dweight = tl.zeros([BLOCK_ROWS], tl.float32)
        if BIAS2:
            dweight += _with_bias(dy0, b2_ptr, expert, 0, D0, D)
            if D1 > 0:
                dweight += _with_bias(dy1, b2_ptr, expert, D0, D1, D)
        w1_ptr += expert * D * H
        w2_ptr += expert * F * D
        for first in range(0, F, BLOCK_F):
            f = first + tl.arange(0, BLOCK_F)
            f_inside = f < F
            dactivation = _dactivation(dy0, dy1, w2_ptr, f, f_inside, D, D0, D1, PRECISION)
            hidden = _hidden(x0, x1, w1_ptr, b1_ptr, expert, f, f_inside, D, H, D0, D1, BIAS1, PRECISION)
            if GLU:
                up = _hidden(x0, x1, w1_ptr, b1_ptr, expert, F + f, f_inside, D, H, D0, D1, BIAS1, PRECISION)
                sigmoid = tl.sigmoid(hidden)
                silu = hidden * sigmoid
                dweight += tl.sum(silu * up * dactivation, axis=1)
                dactivation *= weight
                dup = (dactivation * silu).to(x0.dtype)
                dx0, dx1 = _add_dx(dx0, dx1, dup, w1_ptr, F + f, f_inside, D, H, D0, D1, PRECISION)
                dhidden = dactivation * up * (sigmoid + silu * (1 - sigmoid))
            else:
                dweight += tl.sum(_gelu(hidden) * dactivation, axis=1)
                dhidden = dactivation * weight * _gelu_gradient(hidden)
            dx0, dx1 = _add_dx(dx0, dx1, dhidden.to(x0.dtype), w1_ptr, f, f_inside, D, H, D0, D1, PRECISION)
        tl.store(dweight_ptr + assignment, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
        _store_rows(dx_ptr, dx0, assignment, inside, 0, D0, D)
        if D1 > 0:
            _store_rows(dx_ptr, dx1, assignment, inside, D0, D1, D)


@triton.jit
def _with_bias(dy, b2_ptr, expert, first, WIDTH: tl.constexpr, D: tl.constexpr):
    columns = first + tl.arange(0, WIDTH)
    bias = tl.load(b2_ptr + expert * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    return tl.sum(dy.to(tl.float32) * bias[None, :], axis=1)


@triton.jit
def _dactivation(
    dy0, dy1, w2_ptr, f, f_inside, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PRECISION: tl.constexpr
):
    """``dy W2^T`` for some hidden columns, before the combine weight."""
    w2_0 = _load_tile(w2_ptr, 0, f, f_inside, 1, D, D0, D)
    w2_1 = w2_0
    if D1 > 0:
        w2_1 = _load_tile(w2_ptr, D0, f, f_inside, 1, D, D1, D)
    return _product(dy0, dy1, w2_0, w2_1, D1, PRECISION)


@triton.jit
def _add_dx(
    dx0, dx1, dhidden, w1_ptr, columns, inside, D: tl.constexpr, H: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    w1_0 = _load_tile(w1_ptr, 0, columns, inside, H, 1, D0, D)
    dx0 = tl.dot(dhidden, tl.trans(w1_0), dx0, input_precision=PRECISION)
    if D1 > 0:
        w1_1 = _load_tile(w1_ptr, D0, columns, inside, H, 1, D1, D)
        dx1 = tl.dot(dhidden, tl.trans(w1_1), dx1, input_precision=PRECISION)
    return dx0, dx1


@triton.jit
def _store_rows(base, values, rows, inside, first, WIDTH: tl.constexpr, D: tl.constexpr):
    columns = first + tl.arange(0, WIDTH)
    mask = inside[:, None] & (columns < D)[None, :]
    tl.store(base + rows[:, None] * D + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def backward_weights_kernel(
    dy_ptr, x_ptr, order_ptr, weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
    starts_ptr, ends_ptr, E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_F: tl.constexpr, GLU: tl.constexpr,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of some hidden columns of one expert, over all its rows, always in the same order."""
    expert = tl.program_id(0)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    f_inside = f < F
    start = tl.load(starts_ptr + expert)
    end = tl.load(ends_ptr + expert)
    w1_ptr += expert * D * H
    w2_ptr += expert * F * D
    dw1_0 = tl.zeros([D0, BLOCK_F], tl.float32)
    dw2_0 = tl.zeros([D0, BLOCK_F], tl.float32)
    dw1_1, dw2_1, dup_0, dup_1 = dw1_0, dw2_0, dw1_0, dw1_0
    if D1 > 0:
        dw1_1 = tl.zeros([D1, BLOCK_F], tl.float32)
        dw2_1, dup_1 = dw1_1, dw1_1
    db1 = tl.zeros([BLOCK_F], tl.float32)
    dbup = db1
    for first in range(start, end, BLOCK_ROWS):
        positions = first + tl.arange(0, BLOCK_ROWS)
        inside = positions < end
        assignment = tl.load(order_ptr + positions, mask=inside, other=0)
        row = assignment // K
        weight = tl.load(weight_ptr + assignment, mask=inside, other=0.0).to(tl.float32)[:, None]
        x0 = _load_rows(x_ptr, row, inside, 0, D0, D)
        dy0 = _load_rows(dy_ptr, assignment, inside, 0, D0, D)
        x1, dy1 = x0, dy0
        if D1 > 0:
            x1 = _load_rows(x_ptr, row, inside, D0, D1, D)
            dy1 = _load_rows(dy_ptr, assignment, inside, D0, D1, D)
        dactivation = weight * _dactivation(dy0, dy1, w2_ptr, f, f_inside, D, D0, D1, PRECISION)
        hidden = _hidden(x0, x1, w1_ptr, b1_ptr, expert, f, f_inside, D, H, D0, D1, BIAS1, PRECISION)
        if GLU:
            up = _hidden(x0, x1, w1_ptr, b1_ptr, expert, F + f, f_inside, D, H, D0, D1, BIAS1, PRECISION)
            sigmoid = tl.sigmoid(hidden)
            silu = hidden * sigmoid
            activation = silu * up
            dup = dactivation * silu
            dhidden = dactivation * up * (sigmoid + silu * (1 - sigmoid))
            dbup += tl.sum(dup, axis=0)
            dup = dup.to(x0.dtype)
            dup_0 = tl.dot(tl.trans(x0), dup, dup_0, input_precision=PRECISION)
            if D1 > 0:
                dup_1 = tl.dot(tl.trans(x1), dup, dup_1, input_precision=PRECISION)
        else:
            activation = _gelu(hidden)
            dhidden = dactivation * _gelu_gradient(hidden)
        db1 += tl.sum(dhidden, axis=0)
        dhidden = dhidden.to(x0.dtype)
        activation = (activation * weight).to(x0.dtype)
        dw1_0 = tl.dot(tl.trans(x0), dhidden, dw1_0, input_precision=PRECISION)
        dw2_0 = tl.dot(tl.trans(dy0), activation, dw2_0, input_precision=PRECISION)
        if D1 > 0:
            dw1_1 = tl.dot(tl.trans(x1), dhidden, dw1_1, input_precision=PRECISION)
            dw2_1 = tl.dot(tl.trans(dy1), activation, dw2_1, input_precision=PRECISION)
    dw1_ptr += expert * D * H
    dw2_ptr += expert * F * D
    _store_tile(dw1_ptr, dw1_0, 0, f, f_inside, H, 1, D0, D)
    _store_tile(dw2_ptr, dw2_0, 0, f, f_inside, 1, D, D0, D)
    if D1 > 0:
        _store_tile(dw1_ptr, dw1_1, D0, f, f_inside, H, 1, D1, D)
        _store_tile(dw2_ptr, dw2_1, D0, f, f_inside, 1, D, D1, D)
    if GLU:
        _store_tile(dw1_ptr, dup_0, 0, F + f, f_inside, H, 1, D0, D)
        if D1 > 0:
            _store_tile(dw1_ptr, dup_1, D0, F + f, f_inside, H, 1, D1, D)
    if BIAS1:
        tl.store(db1_ptr + expert * H + f, db1.to(db1_ptr.dtype.element_ty), mask=f_inside)
        if GLU:
            tl.store(db1_ptr + expert * H + F + f, dbup.to(db1_ptr.dtype.element_ty), mask=f_inside)
    if BIAS2 and tl.program_id(1) == 0:
        _store_db2(dy_ptr, order_ptr, weight_ptr, db2_ptr, expert, start, end, 0, D0, D, BLOCK_ROWS)
        if D1 > 0:
            _store_db2(dy_ptr, order_ptr, weight_ptr, db2_ptr, expert, start, end, D0, D1, D, BLOCK_ROWS)


@triton.jit
def _store_tile(base, values, d_first, h_columns, h_inside, d_stride, h_stride, WIDTH: tl.constexpr, D: tl.constexpr):
    d = d_first + tl.arange(0, WIDTH)
    mask = (d < D)[:, None] & h_inside[None, :]
    target = base + d[:, None] * d_stride + h_columns[None, :] * h_stride
    tl.store(target, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _store_db2(
    dy_ptr, order_ptr, weight_ptr, db2_ptr, expert, start, end, d_first, WIDTH: tl.constexpr, D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient of the second bias: the weighted sum of the outputs' gradients."""
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(start, end, BLOCK_ROWS):
        positions = first + tl.arange(0, BLOCK_ROWS)
        inside = positions < end
        assignment = tl.load(order_ptr + positions, mask=inside, other=0)
        weight = tl.load(weight_ptr + assignment, mask=inside, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(weight * _load_rows(dy_ptr, assignment, inside, d_first, WIDTH, D).to(tl.float32), axis=0)
    columns = d_first + tl.arange(0, WIDTH)
    tl.store(db2_ptr + expert * D + columns, total.to(db2_ptr.dtype.element_ty), mask=columns < D)
