# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false
"""Triton kernels of ssd_scan: forward, backward and one step.

A program has BLOCK_P channels of one head of one sequence and walks through time in chunks of
BLOCK_T, with the state [BLOCK_P, BLOCK_S] (backward: its gradient) in registers. Within a chunk all
is matrix products: y = M x + e^a C h with M_ts = C_t.B_s e^(a_t - a_s) dt_s for s <= t, where a are
the sums of dt A from the chunk's start. Steps past T have dt = 0 and change nothing.

The last dimension of x, B, C and of the gradients is dense; states and what backward returns are
contiguous. a is summed in fp64 and kept as two fp32 numbers, so that differences of large sums stay
exact; exponents are never positive.
"""

import triton
import triton.language as tl

__all__ = ["ssd_scan_bwd_kernel", "ssd_scan_fwd_kernel", "ssd_state_update_kernel"]


@triton.jit
def _softplus(x):
    """log(1 + e^x), exact too where e^x is small and 1 + e^x has rounded it: log(w) e / (w - 1)."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    rest = tl.where(w == 1.0, e, tl.log(w) * e / tl.where(w == 1.0, 1.0, w - 1.0))
    return tl.maximum(x, 0.0) + rest


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _of_head(ptr, head, GIVEN: tl.constexpr):
    """The head's number of D or dt_bias, 0 where there is none."""
    if GIVEN:
        return tl.load(ptr + head).to(tl.float32)
    else:
        return 0.0


@triton.jit
def _step_sizes(raw, low, high, SOFTPLUS: tl.constexpr):
    """dt before and after it is limited; NaN stays NaN."""
    free = _softplus(raw) if SOFTPLUS else raw
    return free, tl.where(free < low, low, tl.where(free > high, high, free))


@triton.jit
def _rows(ptr, offs_t, offs_c, stride, mask, kind):
    """[BLOCK_T, BLOCK_P or BLOCK_S] at offs_t, in the dtype of the products."""
    return tl.load(ptr + offs_t[:, None] * stride + offs_c[None, :], mask=mask, other=0.0).to(kind)


@triton.jit
def _decays(dt, rate, offs):
    """e^(a_t - a_s) [BLOCK_T, BLOCK_T] for s <= t, else 0; e^a_t; e^(a_end - a_s); e^a_end."""
    log = dt.to(tl.float64) * rate.to(tl.float64)
    total = tl.cumsum(log, axis=0)
    end = tl.sum(log, axis=0)
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    since = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    between = tl.exp(tl.where(offs[:, None] >= offs[None, :], since, float("-inf")))
    until_end = tl.exp((end - total).to(tl.float32))
    return between, tl.exp(high), until_end, tl.exp(end.to(tl.float32))


@triton.jit
def _place(heads, P, BLOCK_P: tl.constexpr):
    """Batch, head, slice of P and its channels: heads of a batch are neighbours, they share B, C."""
    program = tl.program_id(0)
    slices = tl.cdiv(P, BLOCK_P)
    part = program % slices
    rest = program // slices
    offs_p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    return (rest // heads).to(tl.int64), (rest % heads).to(tl.int64), part.to(tl.int64), offs_p


@triton.jit(do_not_specialize=["T", "dt_sb", "low", "high"])
def ssd_scan_fwd_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, first_ptr, y_ptr, last_ptr, border_ptr,
    T, heads, per_group, P, S, x_sb, x_st, x_sh, dt_sb, dt_st, dt_sh, b_sb, b_st, b_sg,
    c_sb, c_st, c_sg, low, high,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    kind = x_ptr.dtype.element_ty
    batch, head, _, offs_p = _place(heads, P, BLOCK_P)
    group = head // per_group
    offs, offs_s = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    mask_p, mask_s = (offs_p < P)[None, :], (offs_s < S)[None, :]
    mask_h = (offs_p < P)[:, None] & mask_s
    x_ptr += batch * x_sb + head * x_sh
    dt_ptr += batch * dt_sb + head * dt_sh
    b_ptr += batch * b_sb + group * b_sg
    c_ptr += batch * c_sb + group * c_sg
    y_ptr += (batch * T * heads + head) * P
    chunks = tl.cdiv(T, BLOCK_T)
    of_state = offs_p[:, None] * S + offs_s[None, :]
    state = (batch * heads + head) * P * S + of_state
    border_ptr += (batch * chunks * heads + head) * P * S
    rate = tl.load(a_ptr + head).to(tl.float32)
    bias = _of_head(bias_ptr, head, HAS_BIAS)
    skip = _of_head(d_ptr, head, HAS_D)
    h = tl.zeros((BLOCK_P, BLOCK_S), dtype=tl.float32)
    if HAS_FIRST:
        h = tl.load(first_ptr + state, mask=mask_h, other=0.0).to(tl.float32)
    for chunk in range(chunks):
        offs_t = (chunk * BLOCK_T + offs).to(tl.int64)
        mask_t = offs_t < T
        x = _rows(x_ptr, offs_t, offs_p, x_st, mask_t[:, None] & mask_p, kind)
        B = _rows(b_ptr, offs_t, offs_s, b_st, mask_t[:, None] & mask_s, kind)
        C = _rows(c_ptr, offs_t, offs_s, c_st, mask_t[:, None] & mask_s, kind)
        raw = tl.load(dt_ptr + offs_t * dt_st, mask=mask_t, other=0.0).to(tl.float32) + bias
        free, dt = _step_sizes(raw, low, high, SOFTPLUS)
        dt = tl.where(mask_t, dt, 0.0)
        between, since_start, until_end, whole = _decays(dt, rate, offs)
        if SAVE:
            tl.store(border_ptr + of_state, h, mask=mask_h)
            border_ptr += heads * P * S
        # dt goes into M and B, not x: one rounding a product in 16 bits
        scores = _dot(C, tl.trans(B)) * between * dt[None, :]
        y = _dot(C, tl.trans(h).to(kind)) * since_start[:, None]
        y += _dot(scores.to(kind), x)
        y += skip * x.to(tl.float32)
        out = y_ptr + offs_t[:, None] * heads * P + offs_p[None, :]
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_p)
        weighted = (B.to(tl.float32) * (until_end * dt)[:, None]).to(kind)
        h = h * whole + _dot(tl.trans(x), weighted)
    tl.store(last_ptr + state, h, mask=mask_h)


@triton.jit
def _step_gradients(
    scores, of_carry, of_entry, of_whole, dt, rate, until_end, offs,
):  # fmt: skip
    """Gradients of dt, without and with A's factor, from those of the products in e^a.

    scores: gradient times value of M without dt, [BLOCK_T, BLOCK_T]. of_carry: of e^a C h. of_entry:
    of x (x) B. of_whole: of e^a_end h, one number. a_r is in every decay from s < r to t >= r.
    """
    direct = tl.sum(scores, axis=0) + of_entry * until_end
    strict = tl.where(offs[:, None] > offs[None, :], scores * dt[None, :], 0.0)
    later = (tl.sum(strict, axis=1) - tl.sum(strict, axis=0) + of_carry).to(tl.float64)
    entered = (of_entry * until_end * dt).to(tl.float64)
    log = tl.cumsum(later, axis=0, reverse=True) + tl.cumsum(entered, axis=0) - entered
    log = log.to(tl.float32) + of_whole
    return direct + rate * log, log


@triton.jit(do_not_specialize=["T", "dt_sb", "low", "high"])
def ssd_scan_bwd_kernel(
    grad_ptr, grad_last_ptr, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, border_ptr,
    dx_ptr, ddt_ptr, da_ptr, db_ptr, dc_ptr, dd_ptr, dfirst_ptr,
    T, batches, heads, per_group, P, S, grad_sb, grad_st, grad_sh, x_sb, x_st, x_sh, dt_sb, dt_st,
    dt_sh, b_sb, b_st, b_sg, c_sb, c_st, c_sg, low, high,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    kind = x_ptr.dtype.element_ty
    batch, head, part, offs_p = _place(heads, P, BLOCK_P)
    group = head // per_group
    offs, offs_s = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    mask_p, mask_s = (offs_p < P)[None, :], (offs_s < S)[None, :]
    mask_h = (offs_p < P)[:, None] & mask_s
    grad_ptr += batch * grad_sb + head * grad_sh
    x_ptr += batch * x_sb + head * x_sh
    dt_ptr += batch * dt_sb + head * dt_sh
    b_ptr += batch * b_sb + group * b_sg
    c_ptr += batch * c_sb + group * c_sg
    chunks = tl.cdiv(T, BLOCK_T)
    of_state = offs_p[:, None] * S + offs_s[None, :]
    state = (batch * heads + head) * P * S + of_state
    border_ptr += (((batch + 1) * chunks - 1) * heads + head) * P * S  # the last one
    dx_ptr += (batch * T * heads + head) * P
    # of this slice of P: [T] at stride heads, and [T, S] at stride heads S
    partial = (part * batches + batch) * T * heads + head
    ddt_ptr += partial
    db_ptr += partial * S
    dc_ptr += partial * S
    rate = tl.load(a_ptr + head).to(tl.float32)
    bias = _of_head(bias_ptr, head, HAS_BIAS)
    skip = _of_head(d_ptr, head, HAS_D)
    of_rate, of_skip = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    g = tl.zeros((BLOCK_P, BLOCK_S), dtype=tl.float32)  # gradient of the state after the chunk
    if HAS_LAST:
        g = tl.load(grad_last_ptr + state, mask=mask_h, other=0.0).to(tl.float32)
    for index in range(chunks):
        offs_t = ((chunks - 1 - index) * BLOCK_T + offs).to(tl.int64)
        mask_t = offs_t < T
        mask_x, mask_b = mask_t[:, None] & mask_p, mask_t[:, None] & mask_s
        x = _rows(x_ptr, offs_t, offs_p, x_st, mask_x, kind)
        dy = _rows(grad_ptr, offs_t, offs_p, grad_st, mask_x, kind)
        B = _rows(b_ptr, offs_t, offs_s, b_st, mask_b, kind)
        C = _rows(c_ptr, offs_t, offs_s, c_st, mask_b, kind)
        raw = tl.load(dt_ptr + offs_t * dt_st, mask=mask_t, other=0.0).to(tl.float32) + bias
        free, dt = _step_sizes(raw, low, high, SOFTPLUS)
        dt = tl.where(mask_t, dt, 0.0)
        between, since_start, until_end, whole = _decays(dt, rate, offs)
        weight = until_end * dt
        # x: M^T dy, what it entered the state with, D
        scores = _dot(C, tl.trans(B)) * between
        entry = _dot(B, tl.trans(g).to(kind))  # [BLOCK_T, BLOCK_P]
        dx = entry * weight[:, None] + skip * dy.to(tl.float32)
        dx += _dot(tl.trans((scores * dt[None, :]).to(kind)), dy)
        out = dx_ptr + offs_t[:, None] * heads * P + offs_p[None, :]
        tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=mask_x)
        of_entry = tl.sum(entry * x.to(tl.float32), axis=1)
        if HAS_D:
            of_skip += tl.sum(dy.to(tl.float32) * x.to(tl.float32), axis=1)
        # B and C: through M, and through the state
        of_scores = _dot(dy, tl.trans(x))
        scores *= of_scores
        of_products = (of_scores * between * dt[None, :]).to(kind)
        rows = offs_t[:, None] * heads * S + offs_s[None, :]
        dB = _dot(x, g.to(kind)) * weight[:, None] + _dot(tl.trans(of_products), C)
        tl.store(db_ptr + rows, dB, mask=mask_b)
        h = tl.load(border_ptr + of_state, mask=mask_h, other=0.0)
        border_ptr -= heads * P * S
        of_whole = tl.sum(tl.sum(g * h, axis=1), axis=0) * whole
        carry = _dot(dy, h.to(kind)) * since_start[:, None]
        of_carry = tl.sum(carry * C.to(tl.float32), axis=1)
        tl.store(dc_ptr + rows, carry + _dot(of_products, B), mask=mask_b)
        # dt and A
        ddt, of_log = _step_gradients(
            scores, of_carry, of_entry, of_whole, dt, rate, until_end, offs
        )  # fmt: skip
        of_rate += of_log * dt
        ddt = tl.where((free < low) | (free > high), 0.0, ddt)
        if SOFTPLUS:
            ddt *= _sigmoid(raw)
        tl.store(ddt_ptr + offs_t * heads, ddt, mask=mask_t)
        weighted = (C.to(tl.float32) * since_start[:, None]).to(kind)
        g = g * whole + _dot(tl.trans(dy), weighted)
    tl.store(dfirst_ptr + state, g, mask=mask_h)
    once = (part * batches + batch) * heads + head
    tl.store(da_ptr + once, tl.sum(of_rate, axis=0))
    if HAS_D:
        tl.store(dd_ptr + once, tl.sum(of_skip, axis=0))


@triton.jit(do_not_specialize=["low", "high"])
def ssd_state_update_kernel(
    state_ptr, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, y_ptr,
    heads, per_group, P, S, h_sb, h_sh, h_sp, h_ss, x_sb, x_sh, dt_sb, dt_sh, b_sb, b_sg,
    c_sb, c_sg, low, high,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    batch, head, _, offs_p = _place(heads, P, BLOCK_P)
    group = head // per_group
    offs_s = tl.arange(0, BLOCK_S)
    mask_p, mask_s = offs_p < P, offs_s < S
    mask = mask_p[:, None] & mask_s[None, :]
    raw = tl.load(dt_ptr + batch * dt_sb + head * dt_sh).to(tl.float32)
    _, dt = _step_sizes(raw + _of_head(bias_ptr, head, HAS_BIAS), low, high, SOFTPLUS)
    rate = tl.load(a_ptr + head).to(tl.float32)
    x = tl.load(x_ptr + batch * x_sb + head * x_sh + offs_p, mask=mask_p, other=0.0)
    B = tl.load(b_ptr + batch * b_sb + group * b_sg + offs_s, mask=mask_s, other=0.0)
    C = tl.load(c_ptr + batch * c_sb + group * c_sg + offs_s, mask=mask_s, other=0.0)
    x = x.to(tl.float32)
    place = state_ptr + batch * h_sb + head * h_sh
    place = place + offs_p.to(tl.int64)[:, None] * h_sp + offs_s.to(tl.int64)[None, :] * h_ss
    h = tl.load(place, mask=mask, other=0.0).to(tl.float32) * tl.exp(dt * rate)
    h += (dt * x)[:, None] * B.to(tl.float32)[None, :]
    tl.store(place, h.to(state_ptr.dtype.element_ty), mask=mask)
    y = tl.sum(h * C.to(tl.float32)[None, :], axis=1) + _of_head(d_ptr, head, HAS_D) * x
    out = y_ptr + (batch * heads + head) * P + offs_p
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask_p)
