# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false
"""Triton kernels of ssd_scan, forward and backward.

Time is cut into chunks of BLOCK_T. Within one all is matrix products: y = M x + e^a C h with
M_ts = C_t.B_s e^(a_t - a_s) dt_s for s <= t, where a are the sums of dt A from the chunk's start
and h is the state before it. Steps past T have dt = 0 and change nothing.

Forward: the steps kernel (ssd_steps_triton.py) writes dt and a, the states kernel walks through the
chunks and leaves the state [S, P] at each border, the output kernel computes all chunks side by
side. Backward: the states kernel walks back with the state's gradient, two kernels compute all
chunks side by side, and the steps' own turns gradients of the products' factors into those of dt
and A. The steps have kernels of their own because the layouts of the products would compute them 16
times over. a is summed in fp64 and kept as two fp32 numbers, so that differences of large sums stay
exact; exponents are never positive.

The last dimension of x, B, C and of the gradient of y is dense; all else but dt is contiguous.
Offsets within a chunk are 32-bit, its start's 64-bit.
"""

import triton
import triton.language as tl

from lillama_kernels.ssd_steps_triton import ssd_place

__all__ = [
    "ssd_grad_factors_kernel",
    "ssd_grad_kernel",
    "ssd_output_kernel",
    "ssd_states_kernel",
]


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _rows(ptr, offs_t, offs_c, stride, mask, kind):
    """[BLOCK_T, BLOCK_P or BLOCK_S] at offs_t, in the dtype of the products."""
    return tl.load(ptr + (offs_t[:, None] * stride + offs_c[None, :]), mask=mask, other=0.0).to(
        kind
    )


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
    batch, head, _, offs_p = ssd_place(program // blocks, heads, P, BLOCK_P)
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
    place, head, _, offs_p = ssd_place(tl.program_id(0), heads, P, BLOCK_P)
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


@triton.jit
def _store_step_parts(parts, scores, dt, later, offs, BLOCK_T: tl.constexpr):
    """Of dt and A: through dt in M; through decays that end at t, and that begin at s, whose sums
    cancel. Each vector has a layout of its own, so they meet in memory."""
    tl.store(parts, tl.sum(scores, axis=0))
    scores = tl.where(offs[:, None] > offs[None, :], scores * dt, 0.0)
    scores = scores.to(parts.dtype.element_ty)
    tl.store(parts + 2 * BLOCK_T, later + tl.sum(scores, axis=1))
    tl.store(parts + 3 * BLOCK_T, tl.sum(scores, axis=0))


@triton.jit(do_not_specialize=["T", "chunks", "rows"])
def ssd_grad_kernel(
    grad_ptr, x_ptr, steps_ptr, b_ptr, c_ptr, d_ptr, border_ptr, right_ptr, dx_ptr, parts_ptr,
    ones_ptr, rows, T, chunks, heads, per_group, grad_sb, grad_st, grad_sh, x_sb, x_st, x_sh,
    b_sb, b_st, b_sg, c_sb, c_st, c_sg,
    P: tl.constexpr, S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """Gradient of x of one chunk, and what ssd_steps_bwd_kernel needs: parts [slices, B, nh,
    chunks, 4, BLOCK_T], fp64 for fp32 inputs, ones [slices, B, nh, chunks, 2] with the gradient of
    D. rows: B nh chunks. border, right: the state before the chunk, the gradient of that after."""
    kind = x_ptr.dtype.element_ty
    place, head, part, offs_p = ssd_place(tl.program_id(0), heads, P, BLOCK_P)
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
    leaving, dx = tl.zeros((BLOCK_T, BLOCK_P), tl.float32), tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
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
    _store_step_parts(parts, scores * _dot(dy, tl.trans(x)), dt, later, offs, BLOCK_T)


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
    place, head, part, offs_p = ssd_place(program // blocks, heads, P, BLOCK_P)
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
