# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false
"""Triton kernels of ssd_scan: forward, backward and one step.

Time is cut into chunks of BLOCK_T. Within one all is matrix products: y = M x + e^a C h with M_ts
= C_t.B_s e^(a_t - a_s) dt_s for s <= t, where a are the sums of dt A from the chunk's start and h
is the state before it. Steps past T have dt = 0 and change nothing.

Forward: the steps kernel writes dt and a, the states kernel walks through the chunks and leaves the
state [BLOCK_S, BLOCK_P] at each border, the output kernel computes all chunks side by side.
Backward: the states kernel walks back with the state's gradient, two kernels compute all chunks side
by side, and the last one turns gradients of the products' factors into those of dt and A.

The steps have a kernel of their own: the layouts of the products would compute them 16 times
over. a is summed in fp64 and kept as two fp32 numbers, so that differences of large sums stay
exact; exponents are never positive.

The last dimension of x, B, C and of the gradient of y is dense; all else but dt is contiguous.
Offsets within a chunk are 32-bit, its start's 64-bit.
"""

import triton
import triton.language as tl

__all__ = [
    "ssd_grad_factors_kernel",
    "ssd_grad_kernel",
    "ssd_output_kernel",
    "ssd_state_update_kernel",
    "ssd_states_kernel",
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
def _state(ptr, offs_s, offs_p, P, S):
    """[BLOCK_S, BLOCK_P] of a state at a border."""
    mask = (offs_s < S)[:, None] & (offs_p < P)[None, :]
    return tl.load(ptr + (offs_s[:, None] * P + offs_p[None, :]), mask=mask, other=0.0)


@triton.jit
def _decays(steps, offs, BLOCK_T: tl.constexpr):
    """e^(a_t - a_s) [BLOCK_T, BLOCK_T] for s <= t, else 0."""
    a, rest = tl.load(steps + BLOCK_T + offs), tl.load(steps + 2 * BLOCK_T + offs)
    since = (a[:, None] - a[None, :]) + (rest[:, None] - rest[None, :])
    return tl.exp(tl.where(offs[:, None] >= offs[None, :], since, float("-inf")))


@triton.jit
def _until_end(steps, offs, BLOCK_T: tl.constexpr):
    """e^(a_end - a_s)."""
    a, rest = tl.load(steps + BLOCK_T + offs), tl.load(steps + 2 * BLOCK_T + offs)
    end, end_rest = tl.load(steps + 2 * BLOCK_T - 1), tl.load(steps + 3 * BLOCK_T - 1)
    return tl.exp((end - a) + (end_rest - rest))


@triton.jit
def _weights(steps, offs, BLOCK_T: tl.constexpr, FROM_START: tl.constexpr):
    """e^a_t, or what x_s (x) B_s counts for at the chunk's end; and e^a_end."""
    whole = tl.exp(tl.load(steps + 2 * BLOCK_T - 1))
    if FROM_START:
        return tl.exp(tl.load(steps + BLOCK_T + offs)), whole
    else:
        return _until_end(steps, offs, BLOCK_T) * tl.load(steps + offs), whole


@triton.jit
def _place(program, heads, P, BLOCK_P: tl.constexpr):
    """Batch (or batch and chunk), head, slice of P and its channels: heads are neighbours, they
    share B and C."""
    slices = tl.cdiv(P, BLOCK_P)
    part = program % slices
    rest = program // slices
    offs_p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    return (rest // heads).to(tl.int64), (rest % heads).to(tl.int64), part.to(tl.int64), offs_p


@triton.jit(do_not_specialize=["T"])
def ssd_states_kernel(
    x_ptr, steps_ptr, b_ptr, first_ptr, border_ptr, last_ptr,
    T, heads, per_group, x_sb, x_st, x_sh, b_sb, b_st, b_sg,
    P: tl.constexpr, S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr, HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state before each chunk, and the last. With REVERSE the gradient of the state after each
    chunk, and of the first: x is then the gradient of y, b is C, first is the last's gradient."""
    kind = x_ptr.dtype.element_ty
    program, blocks = tl.program_id(0), tl.cdiv(S, BLOCK_S)
    batch, head, _, offs_p = _place(program // blocks, heads, P, BLOCK_P)
    offs, offs_s = tl.arange(0, BLOCK_T), (program % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_p, mask_s = (offs_p < P)[None, :], (offs_s < S)[None, :]
    mask_h = (offs_s < S)[:, None] & mask_p
    x_ptr += batch * x_sb + head * x_sh
    b_ptr += batch * b_sb + (head // per_group) * b_sg
    row = batch * heads + head
    chunks = tl.cdiv(T, BLOCK_T)
    place = batch * 0  # 64 bits
    step = 1
    if REVERSE:
        place += chunks - 1
        step = -1
    of_state = row * (P * S) + offs_p[None, :] * S + offs_s[:, None]
    h = tl.zeros((BLOCK_S, BLOCK_P), dtype=tl.float32)
    if HAS_FIRST:
        h = tl.load(first_ptr + of_state, mask=mask_h, other=0.0).to(tl.float32)
    for _ in range(chunks):
        start = place * BLOCK_T
        mask_t = (offs < T - start)[:, None]
        x = _rows(x_ptr + start * x_st, offs, offs_p, x_st, mask_t & mask_p, kind)
        B = _rows(b_ptr + start * b_st, offs, offs_s, b_st, mask_t & mask_s, kind)
        steps = steps_ptr + (row * chunks + place) * (3 * BLOCK_T)
        weight, whole = _weights(steps, offs, BLOCK_T, REVERSE)
        out = border_ptr + (row * chunks + place) * (P * S)
        out += offs_s[:, None] * P + offs_p[None, :]
        tl.store(out, h.to(border_ptr.dtype.element_ty), mask=mask_h)
        weighted = (B.to(tl.float32) * weight[:, None]).to(kind)
        h = h * whole + _dot(tl.trans(weighted), x)
        place += step
    tl.store(last_ptr + of_state, h, mask=mask_h)


@triton.jit(do_not_specialize=["T", "chunks"])
def ssd_output_kernel(
    x_ptr, steps_ptr, b_ptr, c_ptr, d_ptr, border_ptr, y_ptr,
    T, chunks, heads, per_group, x_sb, x_st, x_sh, b_sb, b_st, b_sg, c_sb, c_st, c_sg,
    P: tl.constexpr, S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """y of one chunk."""
    kind = x_ptr.dtype.element_ty
    place, head, _, offs_p = _place(tl.program_id(0), heads, P, BLOCK_P)
    batch, chunk = place // chunks, place % chunks
    start, group = chunk * BLOCK_T, head // per_group
    offs = tl.arange(0, BLOCK_T)
    mask_t = (offs < T - start)[:, None]
    mask_x = mask_t & (offs_p < P)[None, :]
    x_ptr += batch * x_sb + start * x_st + head * x_sh
    b_ptr += batch * b_sb + start * b_st + group * b_sg
    c_ptr += batch * c_sb + start * c_st + group * c_sg
    place = (batch * heads + head) * chunks + chunk
    border_ptr += place * (P * S)
    steps = steps_ptr + place * (3 * BLOCK_T)
    y = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    scores = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for column in range(0, S, BLOCK_S):
        offs_s = column + tl.arange(0, BLOCK_S)
        mask_b = mask_t & (offs_s < S)[None, :]
        C = _rows(c_ptr, offs, offs_s, c_st, mask_b, kind)
        B = _rows(b_ptr, offs, offs_s, b_st, mask_b, kind)
        y += _dot(C, _state(border_ptr, offs_s, offs_p, P, S).to(kind))
        scores += _dot(C, tl.trans(B))
    x = _rows(x_ptr, offs, offs_p, x_st, mask_x, kind)
    since_start, _ = _weights(steps, offs, BLOCK_T, True)
    y *= since_start[:, None]
    # dt goes into M, not x: one rounding a product in 16 bits
    scores *= _decays(steps, offs, BLOCK_T)
    y += _dot((scores * tl.load(steps + offs)[None, :]).to(kind), x)
    if HAS_D:
        y += tl.load(d_ptr + head).to(tl.float32) * x.to(tl.float32)
    y_ptr += ((batch * T + start) * heads + head) * P
    out = y_ptr + (offs[:, None] * (heads * P) + offs_p[None, :])
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask_x)


@triton.jit(do_not_specialize=["T", "chunks", "rows"])
def ssd_grad_kernel(
    grad_ptr, x_ptr, steps_ptr, b_ptr, c_ptr, d_ptr, border_ptr, right_ptr, dx_ptr, parts_ptr,
    ones_ptr, rows, T, chunks, heads, per_group, grad_sb, grad_st, grad_sh, x_sb, x_st, x_sh,
    b_sb, b_st, b_sg, c_sb, c_st, c_sg,
    P: tl.constexpr, S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """Gradient of x of one chunk, and what ssd_steps_bwd_kernel needs: parts [slices, B, nh, chunks,
    4, BLOCK_T], ones [slices, B, nh, chunks, 2] with the gradient of D. rows: B nh chunks. border,
    right: the state before the chunk, and the gradient of that after it."""
    kind = x_ptr.dtype.element_ty
    place, head, part, offs_p = _place(tl.program_id(0), heads, P, BLOCK_P)
    batch, chunk = place // chunks, place % chunks
    start, group = chunk * BLOCK_T, head // per_group
    offs = tl.arange(0, BLOCK_T)
    mask_t = (offs < T - start)[:, None]
    mask_x = mask_t & (offs_p < P)[None, :]
    place = (batch * heads + head) * chunks + chunk
    steps = steps_ptr + place * (3 * BLOCK_T)
    parts = parts_ptr + (part * rows + place) * (4 * BLOCK_T) + offs
    ones = ones_ptr + (part * rows + place) * 2
    border_ptr += place * (P * S)
    right_ptr += place * (P * S)
    b_ptr += batch * b_sb + start * b_st + group * b_sg
    c_ptr += batch * c_sb + start * c_st + group * c_sg
    x_ptr += batch * x_sb + start * x_st + head * x_sh
    grad_ptr += batch * grad_sb + start * grad_st + head * grad_sh
    leaving = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    dx = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    scores = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    of_whole = 0.0
    for column in range(0, S, BLOCK_S):
        offs_s = column + tl.arange(0, BLOCK_S)
        mask_b = mask_t & (offs_s < S)[None, :]
        C = _rows(c_ptr, offs, offs_s, c_st, mask_b, kind)
        B = _rows(b_ptr, offs, offs_s, b_st, mask_b, kind)
        scores += _dot(C, tl.trans(B))
        h = _state(border_ptr, offs_s, offs_p, P, S)
        leaving += _dot(C, h.to(kind))
        g = _state(right_ptr, offs_s, offs_p, P, S)
        dx += _dot(B, g.to(kind))
        of_whole += tl.sum(tl.sum(g.to(tl.float32) * h.to(tl.float32), axis=1), axis=0)
    dy = _rows(grad_ptr, offs, offs_p, grad_st, mask_x, kind)
    # through the states before and after
    since_start, whole = _weights(steps, offs, BLOCK_T, True)
    tl.store(ones, of_whole * whole)
    later = tl.sum(leaving * dy.to(tl.float32), axis=1) * since_start
    x = _rows(x_ptr, offs, offs_p, x_st, mask_x, kind)
    dx *= _until_end(steps, offs, BLOCK_T)[:, None]
    tl.store(parts + BLOCK_T, tl.sum(dx * x.to(tl.float32), axis=1))
    dx *= tl.load(steps + offs)[:, None]
    # through M
    scores *= _decays(steps, offs, BLOCK_T)
    dt = tl.load(steps + offs)[None, :]
    dx += _dot(tl.trans((scores * dt).to(kind)), dy)
    if HAS_D:
        dx += tl.load(d_ptr + head).to(tl.float32) * dy.to(tl.float32)
        product = dy.to(tl.float32) * x.to(tl.float32)
        tl.store(ones + 1, tl.sum(tl.sum(product, axis=1), axis=0))
    out = dx_ptr + ((batch * T + start) * heads + head) * P
    out += offs[:, None] * (heads * P) + offs_p[None, :]
    tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=mask_x)
    # dt and A: through dt in M; through decays that end at t, and that begin at s. Each vector has
    # a layout of its own, so they meet in memory.
    scores *= _dot(dy, tl.trans(x))
    tl.store(parts, tl.sum(scores, axis=0))
    scores = tl.where(offs[:, None] > offs[None, :], scores * dt, 0.0)
    tl.store(parts + 2 * BLOCK_T, later + tl.sum(scores, axis=1))
    tl.store(parts + 3 * BLOCK_T, tl.sum(scores, axis=0))


@triton.jit(do_not_specialize=["T", "chunks", "batches"])
def ssd_grad_factors_kernel(
    grad_ptr, x_ptr, steps_ptr, b_ptr, c_ptr, border_ptr, right_ptr, db_ptr, dc_ptr,
    T, chunks, batches, heads, per_group, grad_sb, grad_st, grad_sh, x_sb, x_st, x_sh,
    b_sb, b_st, b_sg, c_sb, c_st, c_sg,
    P: tl.constexpr, S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C of one chunk, of BLOCK_S of their columns: [slices, B, T, nh, S]."""
    kind = x_ptr.dtype.element_ty
    blocks = tl.cdiv(S, BLOCK_S)
    program = tl.program_id(0)
    place, head, part, offs_p = _place(program // blocks, heads, P, BLOCK_P)
    batch, chunk = place // chunks, place % chunks
    start, group = chunk * BLOCK_T, head // per_group
    offs, offs_s = tl.arange(0, BLOCK_T), (program % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_t = (offs < T - start)[:, None]
    mask_x, mask_b = mask_t & (offs_p < P)[None, :], mask_t & (offs_s < S)[None, :]
    place = (batch * heads + head) * chunks + chunk
    steps = steps_ptr + place * (3 * BLOCK_T)
    rows = (((part * batches + batch) * T + start) * heads + head) * S
    rows = rows + (offs[:, None] * (heads * S) + offs_s[None, :])
    grad_ptr += batch * grad_sb + start * grad_st + head * grad_sh
    dy = _rows(grad_ptr, offs, offs_p, grad_st, mask_x, kind)
    x_ptr += batch * x_sb + start * x_st + head * x_sh
    x = _rows(x_ptr, offs, offs_p, x_st, mask_x, kind)
    products = _dot(dy, tl.trans(x)) * _decays(steps, offs, BLOCK_T)
    products = (products * tl.load(steps + offs)[None, :]).to(kind)
    h = _state(border_ptr + place * (P * S), offs_s, offs_p, P, S)
    since_start, _ = _weights(steps, offs, BLOCK_T, True)
    dC = _dot(dy, tl.trans(h.to(kind))) * since_start[:, None]
    b_ptr += batch * b_sb + start * b_st + group * b_sg
    dC += _dot(products, _rows(b_ptr, offs, offs_s, b_st, mask_b, kind))
    tl.store(dc_ptr + rows, dC, mask=mask_b)
    g = _state(right_ptr + place * (P * S), offs_s, offs_p, P, S)
    entering, _ = _weights(steps, offs, BLOCK_T, False)
    dB = _dot(x, tl.trans(g.to(kind))) * entering[:, None]
    c_ptr += batch * c_sb + start * c_st + group * c_sg
    dB += _dot(tl.trans(products), _rows(c_ptr, offs, offs_s, c_st, mask_b, kind))
    tl.store(db_ptr + rows, dB, mask=mask_b)


@triton.jit(do_not_specialize=["T", "chunks", "dt_sb", "low", "high", "rows"])
def ssd_steps_bwd_kernel(
    dt_ptr, a_ptr, bias_ptr, steps_ptr, parts_ptr, ones_ptr, ddt_ptr, da_ptr,
    rows, T, heads, chunks, dt_sb, dt_st, dt_sh, low, high,
    BLOCK_T: tl.constexpr, SLICES: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Gradients of dt before bias and softplus [B, nh, T], and of A by chunk [B, nh, chunks].

    dt_r A is in the decay from s to t where s < r <= t, from the chunk's start where r <= t, to its
    end where s < r, and in that of the whole chunk. rows: B nh chunks.
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
        of_whole += tl.load(ones_ptr + row * 2)
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
    batch, head, _, offs_p = _place(tl.program_id(0), heads, P, BLOCK_P)
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
