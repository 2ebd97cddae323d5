# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false
"""Triton kernels around those of ssd_scan_triton.py: the steps and sums that they start from, the
gradients of dt and A that they end in, and ssd_state_update.
"""

import triton
import triton.language as tl

__all__ = ["ssd_place", "ssd_state_update_kernel", "ssd_steps_bwd_kernel", "ssd_steps_kernel"]


@triton.jit
def ssd_place(program, heads, P, BLOCK_P: tl.constexpr):
    """Batch (or batch and chunk), head, slice of P and its channels: heads are neighbours, they
    share B and C."""
    slices = tl.cdiv(P, BLOCK_P)
    part = program % slices
    rest = program // slices
    offs_p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    return (rest // heads).to(tl.int64), (rest % heads).to(tl.int64), part.to(tl.int64), offs_p


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
    """Of a program for one chunk of one head: dt with its bias, which of its steps are before T,
    its head, and where its first step lies in [B, nh, T]."""
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
    """dt, and the sums of dt A from the chunk's start in two parts: [B, nh, chunks, 3, BLOCK_T]."""
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
        direct += tl.load(parts).to(tl.float32)
        entry += tl.load(parts + BLOCK_T).to(tl.float32)
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
    batch, head, _, offs_p = ssd_place(tl.program_id(0), heads, P, BLOCK_P)
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
