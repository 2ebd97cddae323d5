# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false
"""Triton kernels of ssd_scan: forward, backward and one step.

A program of the main kernels has BLOCK_P channels of one head of one sequence and walks through time
in chunks of BLOCK_T, with the state [BLOCK_S, BLOCK_P] (backward: its gradient) in registers. Within
a chunk all is matrix products: y = M x + e^a C h with M_ts = C_t.B_s e^(a_t - a_s) dt_s for s <= t,
where a are the sums of dt A from the chunk's start. Steps past T have dt = 0 and change nothing.

The steps kernel in front of them writes dt and a; in the main kernels the layouts of the products
would compute them 16 times over. a is summed in fp64 and kept as two fp32 numbers, so that
differences of large sums stay exact; exponents are never positive. The one behind backward turns the
gradients of the products' factors into those of dt and A.

The last dimension of x, B, C and of the gradient of y is dense; all else but dt is contiguous.
Offsets within a chunk are 32-bit, its start's 64-bit.
"""

import triton
import triton.language as tl

__all__ = [
    "ssd_scan_bwd_kernel",
    "ssd_scan_fwd_kernel",
    "ssd_state_update_kernel",
    "ssd_steps_bwd_kernel",
    "ssd_steps_kernel",
]


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
def _raw_steps(
    dt_ptr, bias_ptr, program, T, heads, chunks, dt_sb, dt_st, dt_sh,
    BLOCK_T: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Of a program for one chunk of one head: dt with its bias, which of its steps are before T, its
    head, and where its first step lies in [B, nh, T]."""
    head = ((program // chunks) % heads).to(tl.int64)
    batch = (program // chunks // heads).to(tl.int64)
    start = (program % chunks).to(tl.int64) * BLOCK_T
    offs = tl.arange(0, BLOCK_T)
    mask = offs < T - start
    place = dt_ptr + batch * dt_sb + head * dt_sh + start * dt_st
    raw = tl.load(place + offs * dt_st, mask=mask, other=0.0).to(tl.float32)
    return raw + _of_head(bias_ptr, head, HAS_BIAS), mask, head, (batch * heads + head) * T + start


@triton.jit(do_not_specialize=["T", "chunks", "dt_sb", "low", "high"])
def ssd_steps_kernel(
    dt_ptr, a_ptr, bias_ptr, steps_ptr, T, heads, chunks, dt_sb, dt_st, dt_sh, low, high,
    BLOCK_T: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """dt, and the sums of dt A from the chunk's start as two numbers: [B, nh, chunks, 3, BLOCK_T]."""
    program = tl.program_id(0)
    raw, mask, head, _ = _raw_steps(
        dt_ptr, bias_ptr, program, T, heads, chunks, dt_sb, dt_st, dt_sh, BLOCK_T, HAS_BIAS
    )  # fmt: skip
    _, dt = _step_sizes(raw, low, high, SOFTPLUS)
    dt = tl.where(mask, dt, 0.0)
    rate = tl.load(a_ptr + head).to(tl.float64)
    total = tl.cumsum(dt.to(tl.float64) * rate, axis=0)
    rounded = total.to(tl.float32)
    place = steps_ptr + program.to(tl.int64) * (3 * BLOCK_T) + tl.arange(0, BLOCK_T)
    tl.store(place, dt)
    tl.store(place + BLOCK_T, rounded)
    tl.store(place + 2 * BLOCK_T, (total - rounded.to(tl.float64)).to(tl.float32))


@triton.jit
def _rows(ptr, offs_t, offs_c, stride, mask, kind):
    """[BLOCK_T, BLOCK_P or BLOCK_S] at offs_t, in the dtype of the products."""
    return tl.load(ptr + (offs_t[:, None] * stride + offs_c[None, :]), mask=mask, other=0.0).to(kind)


@triton.jit
def _decays(steps, offs, BLOCK_T: tl.constexpr):
    """dt; e^(a_t - a_s) [BLOCK_T, BLOCK_T] for s <= t, else 0; e^a_t; e^(a_end - a_s); e^a_end."""
    dt = tl.load(steps + offs)
    a, rest = tl.load(steps + BLOCK_T + offs), tl.load(steps + 2 * BLOCK_T + offs)
    end, end_rest = tl.load(steps + 2 * BLOCK_T - 1), tl.load(steps + 3 * BLOCK_T - 1)
    since = (a[:, None] - a[None, :]) + (rest[:, None] - rest[None, :])
    between = tl.exp(tl.where(offs[:, None] >= offs[None, :], since, float("-inf")))
    return dt, between, tl.exp(a), tl.exp((end - a) + (end_rest - rest)), tl.exp(end)


@triton.jit
def _place(heads, P, BLOCK_P: tl.constexpr):
    """Batch, head, slice of P and its channels: heads of a batch are neighbours, they share B, C."""
    program = tl.program_id(0)
    slices = tl.cdiv(P, BLOCK_P)
    part = program % slices
    rest = program // slices
    offs_p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    return (rest // heads).to(tl.int64), (rest % heads).to(tl.int64), part.to(tl.int64), offs_p


@triton.jit(do_not_specialize=["T"])
def ssd_scan_fwd_kernel(
    x_ptr, steps_ptr, b_ptr, c_ptr, d_ptr, first_ptr, y_ptr, last_ptr, border_ptr,
    T, heads, per_group, x_sb, x_st, x_sh, b_sb, b_st, b_sg, c_sb, c_st, c_sg,
    P: tl.constexpr, S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr, HAS_D: tl.constexpr, HAS_FIRST: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    kind = x_ptr.dtype.element_ty
    batch, head, _, offs_p = _place(heads, P, BLOCK_P)
    group = head // per_group
    offs, offs_s = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    mask_p, mask_s = (offs_p < P)[None, :], (offs_s < S)[None, :]
    mask_h = (offs_s < S)[:, None] & mask_p
    x_ptr += batch * x_sb + head * x_sh
    b_ptr += batch * b_sb + group * b_sg
    c_ptr += batch * c_sb + group * c_sg
    y_ptr += (batch * T * heads + head) * P
    chunks = tl.cdiv(T, BLOCK_T)
    row = batch * heads + head
    steps_ptr += row * chunks * (3 * BLOCK_T)
    border_ptr += row * chunks * (P * S)
    of_state = row * (P * S) + offs_p[None, :] * S + offs_s[:, None]
    skip = _of_head(d_ptr, head, HAS_D)
    h = tl.zeros((BLOCK_S, BLOCK_P), dtype=tl.float32)
    if HAS_FIRST:
        h = tl.load(first_ptr + of_state, mask=mask_h, other=0.0).to(tl.float32)
    start = batch * 0  # 64 bits
    for _ in range(chunks):
        mask_t = (offs < T - start)[:, None]
        x = _rows(x_ptr + start * x_st, offs, offs_p, x_st, mask_t & mask_p, kind)
        B = _rows(b_ptr + start * b_st, offs, offs_s, b_st, mask_t & mask_s, kind)
        C = _rows(c_ptr + start * c_st, offs, offs_s, c_st, mask_t & mask_s, kind)
        dt, between, since_start, until_end, whole = _decays(steps_ptr, offs, BLOCK_T)
        if SAVE:
            tl.store(border_ptr + (offs_s[:, None] * P + offs_p[None, :]), h, mask=mask_h)
            border_ptr += P * S
        # dt goes into M and B, not x: one rounding a product in 16 bits
        scores = (_dot(C, tl.trans(B)) * between * dt[None, :]).to(kind)
        y = _dot(C, h.to(kind)) * since_start[:, None] + _dot(scores, x)
        y += skip * x.to(tl.float32)
        out = y_ptr + start * heads * P + (offs[:, None] * (heads * P) + offs_p[None, :])
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask_t & mask_p)
        weighted = (B.to(tl.float32) * (until_end * dt)[:, None]).to(kind)
        h = h * whole + _dot(tl.trans(weighted), x)
        steps_ptr += 3 * BLOCK_T
        start += BLOCK_T
    tl.store(last_ptr + of_state, h, mask=mask_h)


@triton.jit(do_not_specialize=["T", "batches"])
def ssd_scan_bwd_kernel(
    grad_ptr, grad_last_ptr, x_ptr, steps_ptr, b_ptr, c_ptr, d_ptr, border_ptr,
    dx_ptr, parts_ptr, whole_ptr, db_ptr, dc_ptr, dd_ptr, dfirst_ptr,
    T, batches, heads, per_group, grad_sb, grad_st, grad_sh, x_sb, x_st, x_sh, b_sb, b_st, b_sg,
    c_sb, c_st, c_sg,
    P: tl.constexpr, S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr, HAS_D: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """parts [slices, B, nh, chunks, 4, BLOCK_T] and whole [slices, B, nh, chunks]: what
    ssd_steps_bwd_kernel takes. db and dc [slices, B, T, nh, S]."""
    kind = x_ptr.dtype.element_ty
    batch, head, part, offs_p = _place(heads, P, BLOCK_P)
    group = head // per_group
    offs, offs_s = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    mask_p, mask_s = (offs_p < P)[None, :], (offs_s < S)[None, :]
    mask_h = (offs_s < S)[:, None] & mask_p
    grad_ptr += batch * grad_sb + head * grad_sh
    x_ptr += batch * x_sb + head * x_sh
    b_ptr += batch * b_sb + group * b_sg
    c_ptr += batch * c_sb + group * c_sg
    dx_ptr += (batch * T * heads + head) * P
    chunks = tl.cdiv(T, BLOCK_T)
    row = batch * heads + head
    steps_ptr += (row * chunks + chunks - 1) * (3 * BLOCK_T)  # the last chunk comes first
    border_ptr += (row * chunks + chunks - 1) * (P * S)
    of_state = row * (P * S) + offs_p[None, :] * S + offs_s[:, None]
    row += part * batches * heads
    parts_ptr += (row * chunks + chunks - 1) * (4 * BLOCK_T)
    whole_ptr += row * chunks + chunks - 1
    of_slice = ((part * batches + batch) * T * heads + head) * S
    db_ptr += of_slice
    dc_ptr += of_slice
    skip = _of_head(d_ptr, head, HAS_D)
    of_skip = tl.zeros((BLOCK_T,), tl.float32)
    g = tl.zeros((BLOCK_S, BLOCK_P), dtype=tl.float32)  # gradient of the state after the chunk
    if HAS_LAST:
        g = tl.load(grad_last_ptr + of_state, mask=mask_h, other=0.0).to(tl.float32)
    start = batch * 0 + (chunks - 1) * BLOCK_T  # 64 bits
    for _ in range(chunks):
        mask_t = (offs < T - start)[:, None]
        x = _rows(x_ptr + start * x_st, offs, offs_p, x_st, mask_t & mask_p, kind)
        dy = _rows(grad_ptr + start * grad_st, offs, offs_p, grad_st, mask_t & mask_p, kind)
        B = _rows(b_ptr + start * b_st, offs, offs_s, b_st, mask_t & mask_s, kind)
        C = _rows(c_ptr + start * c_st, offs, offs_s, c_st, mask_t & mask_s, kind)
        dt, between, since_start, until_end, whole = _decays(steps_ptr, offs, BLOCK_T)
        # x: M^T dy, what it entered the state with, D
        scores = _dot(C, tl.trans(B)) * between
        entry = _dot(B, g.to(kind))  # [BLOCK_T, BLOCK_P]
        of_entry = tl.sum(entry * x.to(tl.float32), axis=1) * until_end
        dx = entry * (until_end * dt)[:, None] + skip * dy.to(tl.float32)
        dx += _dot(tl.trans((scores * dt[None, :]).to(kind)), dy)
        out = dx_ptr + start * heads * P + (offs[:, None] * (heads * P) + offs_p[None, :])
        tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=mask_t & mask_p)
        if HAS_D:
            of_skip += tl.sum(dy.to(tl.float32) * x.to(tl.float32), axis=1)
        # B and C: through M, and through the state
        of_scores = _dot(dy, tl.trans(x))
        scores *= of_scores
        of_products = (of_scores * between * dt[None, :]).to(kind)
        rows = start * heads * S + (offs[:, None] * (heads * S) + offs_s[None, :])
        dB = _dot(x, tl.trans(g.to(kind))) * (until_end * dt)[:, None]
        dB += _dot(tl.trans(of_products), C)
        tl.store(db_ptr + rows, dB, mask=mask_t & mask_s)
        place = border_ptr + (offs_s[:, None] * P + offs_p[None, :])
        h = tl.load(place, mask=mask_h, other=0.0)
        tl.store(whole_ptr, tl.sum(tl.sum(g * h, axis=1), axis=0) * whole)
        dC = _dot(dy, tl.trans(h.to(kind))) * since_start[:, None]
        later = tl.sum(dC * C.to(tl.float32), axis=1)
        dC += _dot(of_products, B)
        tl.store(dc_ptr + rows, dC, mask=mask_t & mask_s)
        # dt and A: through dt_s in M; through the state; through decays that end at t, and that
        # begin at s. Each vector has its own layout, so they meet in memory.
        place = parts_ptr + offs
        tl.store(place, tl.sum(scores, axis=0))
        tl.store(place + BLOCK_T, of_entry)
        scores = tl.where(offs[:, None] > offs[None, :], scores * dt[None, :], 0.0)
        tl.store(place + 2 * BLOCK_T, later + tl.sum(scores, axis=1))
        tl.store(place + 3 * BLOCK_T, tl.sum(scores, axis=0))
        weighted = (C.to(tl.float32) * since_start[:, None]).to(kind)
        g = g * whole + _dot(tl.trans(weighted), dy)
        steps_ptr -= 3 * BLOCK_T
        border_ptr -= P * S
        parts_ptr -= 4 * BLOCK_T
        whole_ptr -= 1
        start -= BLOCK_T
    tl.store(dfirst_ptr + of_state, g, mask=mask_h)
    if HAS_D:
        tl.store(dd_ptr + row, tl.sum(of_skip, axis=0))


@triton.jit(do_not_specialize=["T", "chunks", "dt_sb", "low", "high", "rows"])
def ssd_steps_bwd_kernel(
    dt_ptr, a_ptr, bias_ptr, steps_ptr, parts_ptr, whole_ptr, ddt_ptr, da_ptr,
    rows, T, heads, chunks, dt_sb, dt_st, dt_sh, low, high,
    BLOCK_T: tl.constexpr, SLICES: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Gradients of dt before bias and softplus [B, nh, T], and of A by chunk [B, nh, chunks].

    a_r is in the decay from s to t where s < r <= t, from the chunk's start where r <= t, to its end
    where s < r, and in that of the whole chunk. rows: B nh chunks.
    """
    program = tl.program_id(0)
    raw, mask, head, place = _raw_steps(
        dt_ptr, bias_ptr, program, T, heads, chunks, dt_sb, dt_st, dt_sh, BLOCK_T, HAS_BIAS
    )  # fmt: skip
    offs = tl.arange(0, BLOCK_T)
    program = program.to(tl.int64)
    dt = tl.load(steps_ptr + program * (3 * BLOCK_T) + offs)
    direct, entry = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    later = tl.zeros((BLOCK_T,), tl.float64)
    of_whole = 0.0
    for part in tl.static_range(SLICES):
        row = part * rows + program
        parts = parts_ptr + row * (4 * BLOCK_T) + offs
        direct += tl.load(parts)
        entry += tl.load(parts + BLOCK_T)
        later += tl.load(parts + 2 * BLOCK_T).to(tl.float64)
        later -= tl.load(parts + 3 * BLOCK_T).to(tl.float64)
        of_whole += tl.load(whole_ptr + row)
    entered = (entry * dt).to(tl.float64)
    log = tl.cumsum(later, axis=0, reverse=True) + tl.cumsum(entered, axis=0) - entered
    log = log.to(tl.float32) + of_whole
    tl.store(da_ptr + program, tl.sum(log * dt, axis=0))
    ddt = direct + entry + tl.load(a_ptr + head).to(tl.float32) * log
    free, _ = _step_sizes(raw, low, high, SOFTPLUS)
    ddt = tl.where((free < low) | (free > high), 0.0, ddt)
    if SOFTPLUS:
        ddt *= _sigmoid(raw)
    tl.store(ddt_ptr + place + offs, ddt, mask=mask)


@triton.jit(do_not_specialize=["low", "high"])
def ssd_state_update_kernel(
    state_ptr, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, y_ptr,
    heads, per_group, h_sb, h_sh, h_sp, h_ss, x_sb, x_sh, dt_sb, dt_sh, b_sb, b_sg,
    c_sb, c_sg, low, high,
    P: tl.constexpr, S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
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
