# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false
"""Triton kernels of selective_scan, and of its single step for decoding.

A program owns BLOCK_D channels of one sequence and walks over time in chunks of BLOCK_T steps. In a
chunk the steps are parallel: for each of the S states one associative scan over the pairs (decay,
input) of all steps, then the state at the chunk's border is carried in by its decay. Chunks follow
each other, forward in time for the states and backward for their gradients. Borders lie in memory
[B, chunks + 1, D, S] fp32, where backward finds them: it computes the states of a chunk again, so
that nothing of size [B, D, T, S] ever exists.

    h_t = a_t h_(t-1) + b_t          a = exp(dt A), b = dt x B
    y_t = (C_t . h_t + D x_t) silu(z_t)
    dh_t = C_t dy_t + a_(t+1) dh_(t+1)
    d(dt A) = dh_t a_t h_(t-1)

The last needs what is kept of the state before, k_t = a_t h_(t-1) = a_t (k_(t-1) + b_(t-1)), itself
and not as h_t - b_t, in which a small one is lost; so backward scans k and adds b.

B and C's gradients are sums over channels: a program writes the sum over its own, and the parts
[D / BLOCK_D, B, S, T] are added up in order. x, delta and z may have any strides; transformers
hands over x and z with neighbouring channels side by side, delta with neighbouring steps.
"""

import triton
import triton.language as tl

__all__: list[str] = []  # kernels are private: launchers call them

LOG2_E = tl.constexpr(1.4426950408889634)


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
def _after(decay, value, next_decay, next_value):
    """One step, then another, as one: v -> next_decay (decay v + value) + next_value."""
    return decay * next_decay, next_decay * value + next_value


@triton.jit
def _tile(ptr, b, offs_d, offs_t, stride_b, stride_d, stride_t, mask):
    at = b * stride_b + offs_d.to(tl.int64)[:, None] * stride_d
    at += offs_t.to(tl.int64)[None, :] * stride_t
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(ptr, value, b, offs_d, offs_t, stride_b, stride_d, stride_t, mask):
    at = b * stride_b + offs_d.to(tl.int64)[:, None] * stride_d
    at += offs_t.to(tl.int64)[None, :] * stride_t
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _per_channel(ptr, offs_d, mask_d, GIVEN: tl.constexpr):
    """One number a channel, 0 where the argument is absent."""
    if GIVEN:
        return tl.load(ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    else:
        return tl.zeros(offs_d.shape, dtype=tl.float32)


@triton.jit
def _row(ptr, s, offs_t, T, mask_t):
    """One state's row over time of B or C."""
    return tl.load(ptr + s * T + offs_t, mask=mask_t, other=0.0).to(tl.float32)


@triton.jit
def _one_state_backward(
    y, dx, ddt, dt, dt_next, before, x, dy, mask, offs_d, offs_t, mask_d, s, is_first, T,
    a_ptr, b_ptr, c_ptr, border, da_ptr, dh_ptr, db_ptr, dc_ptr, S: tl.constexpr,
):  # fmt: skip
    """What state s of a chunk adds to y, to dx / dt and to ddt; its dA, dB and dC go to memory, and
    in dh its gradient at the chunk's first step takes the place of that at the next chunk's."""
    mask_t = offs_t < T
    rate = tl.load(a_ptr + offs_d * S + s, mask=mask_d, other=0.0).to(tl.float32)[:, None]
    B = _row(b_ptr, s, offs_t, T, mask_t)[None, :]
    C = _row(c_ptr, s, offs_t, T, mask_t)[None, :]
    B_before = _row(b_ptr - 1, s, offs_t, T, mask_t & (offs_t > 0))[None, :]
    decay = tl.exp2(dt * (rate * LOG2_E))
    decay, kept = tl.associative_scan((decay, decay * before * B_before), 1, _after)
    kept += decay * tl.load(border + s, mask=mask_d, other=0.0)[:, None]
    h = kept + dt * x * B
    decay, dh = tl.associative_scan(
        (tl.exp2(dt_next * (rate * LOG2_E)), dy * C), 1, _after, reverse=True
    )
    dh += decay * tl.load(dh_ptr + s, mask=mask_d, other=0.0)[:, None]
    at = s * T + offs_t
    tl.store(dc_ptr + at, tl.sum(dy * h, axis=0), mask=mask_t)
    tl.store(db_ptr + at, tl.sum(dh * dt * x, axis=0), mask=mask_t)
    of_log = tl.where(mask, dh * kept, 0.0)
    da = tl.load(da_ptr + s, mask=mask_d, other=0.0) + tl.sum(of_log * dt, axis=1)
    tl.store(da_ptr + s, da, mask=mask_d)
    is_edge = (tl.arange(0, dt.shape[1]) == 0)[None, :]
    edge = tl.sum(tl.where(is_edge, dh, 0.0), axis=1)
    if is_first:  # through the first step, to the state before it
        first_dt = tl.sum(tl.where(is_edge, dt, 0.0), axis=1, keep_dims=True)
        edge *= tl.sum(tl.exp2(first_dt * (rate * LOG2_E)), axis=1)
    tl.store(dh_ptr + s, edge, mask=mask_d)
    return y + h * C, dx + dh * B, ddt + of_log * rate


@triton.jit
def _step_sizes(
    dt_ptr, batch, offs_d, offs_t, dt_b, dt_d, dt_t, bias, mask, SOFTPLUS: tl.constexpr
):
    """delta with its bias, and dt, which is 0 where masked: nothing decays, nothing enters."""
    raw = _tile(dt_ptr, batch, offs_d, offs_t, dt_b, dt_d, dt_t, mask) + bias[:, None]
    return raw, tl.where(mask, _softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def _neighbours(
    x_ptr, dt_ptr, batch, offs_d, offs_t, x_b, x_d, x_t, dt_b, dt_d, dt_t, bias, mask_d, T,
    SOFTPLUS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """delta with its bias and dt; dt x of the step before, within the chunk, which the state then
    took in; dt of the step after."""
    mask = mask_d[:, None] & (offs_t < T)[None, :]
    raw, dt = _step_sizes(dt_ptr, batch, offs_d, offs_t, dt_b, dt_d, dt_t, bias, mask, SOFTPLUS)
    inside = mask & (tl.arange(0, BLOCK_T) > 0)[None, :]
    _, before = _step_sizes(
        dt_ptr, batch, offs_d, offs_t - 1, dt_b, dt_d, dt_t, bias, inside, SOFTPLUS
    )
    before *= _tile(x_ptr, batch, offs_d, offs_t - 1, x_b, x_d, x_t, inside)
    later = mask_d[:, None] & (offs_t + 1 < T)[None, :]
    _, after = _step_sizes(
        dt_ptr, batch, offs_d, offs_t + 1, dt_b, dt_d, dt_t, bias, later, SOFTPLUS
    )
    return raw, dt, before, after


# The length of a sequence and the batch change with every call.
@triton.jit(do_not_specialize=["T", "chunks"])
def _selective_scan_forward_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, y_ptr, border_ptr,
    T, D, chunks,
    x_b, x_d, x_t, dt_b, dt_d, dt_t, z_b, z_d, z_t, y_b, y_d, y_t,
    S: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """y [B, D, T]; border [B, chunks + 1, D, S] holds the first state and gets the others."""
    batch = tl.program_id(1).to(tl.int64)
    row = batch * S * T
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    bias = _per_channel(bias_ptr, offs_d, mask_d, HAS_BIAS)
    for chunk in tl.range(0, chunks):
        offs_t = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        mask = mask_d[:, None] & mask_t[None, :]
        x = _tile(x_ptr, batch, offs_d, offs_t, x_b, x_d, x_t, mask)  # [BLOCK_D, BLOCK_T]
        _, dt = _step_sizes(dt_ptr, batch, offs_d, offs_t, dt_b, dt_d, dt_t, bias, mask, SOFTPLUS)
        y = tl.zeros((BLOCK_D, BLOCK_T), dtype=tl.float32)
        border = border_ptr + (batch * (chunks + 1) + chunk) * D * S + offs_d.to(tl.int64) * S
        for s in tl.range(0, S):
            rate = tl.load(a_ptr + offs_d * S + s, mask=mask_d, other=0.0).to(tl.float32) * LOG2_E
            B = _row(b_ptr + row, s, offs_t, T, mask_t)
            C = _row(c_ptr + row, s, offs_t, T, mask_t)
            decay = tl.exp2(dt * rate[:, None])
            decay, h = tl.associative_scan((decay, dt * x * B[None, :]), 1, _after)
            first = tl.load(border + s, mask=mask_d, other=0.0)
            h += decay * first[:, None]
            y += h * C[None, :]
            last = tl.sum(tl.where((tl.arange(0, BLOCK_T) == BLOCK_T - 1)[None, :], h, 0.0), axis=1)
            tl.store(border + D * S + s, last, mask=mask_d)
        y += x * _per_channel(d_ptr, offs_d, mask_d, HAS_D)[:, None]
        if HAS_Z:
            z = _tile(z_ptr, batch, offs_d, offs_t, z_b, z_d, z_t, mask)
            y *= z * _sigmoid(z)
        _store_tile(y_ptr, y, batch, offs_d, offs_t, y_b, y_d, y_t, mask)
        # the next chunk's first state may be read by another thread than wrote it
        tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "chunks"])
def _selective_scan_backward_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, border_ptr, dy_ptr,
    dx_ptr, ddt_ptr, da_ptr, db_ptr, dc_ptr, dd_ptr, dz_ptr, dbias_ptr, dh_ptr,
    T, D, chunks,
    x_b, x_d, x_t, dt_b, dt_d, dt_t, z_b, z_d, z_t, dx_b, dx_d, dx_t,
    S: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dx, ddt (of delta) and dz, which all have the strides of dx, as dy has; parts dB and dC
    [D blocks, B, S, T]; dA [B, D, S] (zeros on entry), dD and dbias [B, D], each to be summed over
    B; dh [B, D, S]: on entry the gradient of the last state, on exit of the first."""
    batch = tl.program_id(1).to(tl.int64)
    row = batch * S * T
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    state = (batch * D + offs_d) * S
    part = (tl.program_id(0) * tl.num_programs(1) + batch) * S * T
    sum_d = tl.zeros((BLOCK_D,), dtype=tl.float32)
    sum_bias = tl.zeros((BLOCK_D,), dtype=tl.float32)
    bias = _per_channel(bias_ptr, offs_d, mask_d, HAS_BIAS)
    skip = _per_channel(d_ptr, offs_d, mask_d, HAS_D)[:, None]
    for back in tl.range(0, chunks):
        chunk = chunks - 1 - back
        offs_t = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = mask_d[:, None] & (offs_t < T)[None, :]
        x = _tile(x_ptr, batch, offs_d, offs_t, x_b, x_d, x_t, mask)
        raw, dt, before, dt_next = _neighbours(
            x_ptr, dt_ptr, batch, offs_d, offs_t, x_b, x_d, x_t, dt_b, dt_d, dt_t, bias, mask_d, T,
            SOFTPLUS, BLOCK_T,
        )  # fmt: skip
        dout = _tile(dy_ptr, batch, offs_d, offs_t, dx_b, dx_d, dx_t, mask)
        dy = dout
        z = dout
        if HAS_Z:
            z = _tile(z_ptr, batch, offs_d, offs_t, z_b, z_d, z_t, mask)
            dy = dout * z * _sigmoid(z)
        y = tl.zeros((BLOCK_D, BLOCK_T), dtype=tl.float32)
        dx = tl.zeros((BLOCK_D, BLOCK_T), dtype=tl.float32)
        ddt = tl.zeros((BLOCK_D, BLOCK_T), dtype=tl.float32)
        border = border_ptr + (batch * (chunks + 1) + chunk) * D * S + offs_d.to(tl.int64) * S
        for s in tl.range(0, S):
            y, dx, ddt = _one_state_backward(
                y, dx, ddt, dt, dt_next, before, x, dy, mask, offs_d, offs_t, mask_d, s, chunk == 0,
                T, a_ptr, b_ptr + row, c_ptr + row, border, da_ptr + state, dh_ptr + state,
                db_ptr + part, dc_ptr + part, S,
            )  # fmt: skip
        ddt += dx * x
        dx *= dt
        ddt = tl.where(mask, ddt * _sigmoid(raw) if SOFTPLUS else ddt, 0.0)
        sum_bias += tl.sum(ddt, axis=1)
        dx += dy * skip
        sum_d += tl.sum(dy * x, axis=1)
        if HAS_Z:
            gate = _sigmoid(z)
            dz = dout * (y + x * skip) * gate * (1.0 + z * (1.0 - gate))
            _store_tile(dz_ptr, dz, batch, offs_d, offs_t, dx_b, dx_d, dx_t, mask)
        _store_tile(dx_ptr, dx, batch, offs_d, offs_t, dx_b, dx_d, dx_t, mask)
        _store_tile(ddt_ptr, ddt, batch, offs_d, offs_t, dx_b, dx_d, dx_t, mask)
        tl.debug_barrier()
    tl.store(dbias_ptr + batch * D + offs_d, sum_bias, mask=mask_d)
    tl.store(dd_ptr + batch * D + offs_d, sum_d, mask=mask_d)


@triton.jit
def _selective_scan_update_kernel(
    state_ptr, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, y_ptr, D,
    x_b, x_d, dt_b, dt_d, b_b, b_s, c_b, c_s, z_b, z_d,
    S: tl.constexpr, BLOCK_S: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One step: state [B, D, S] is replaced, y [B, D]."""
    batch = tl.program_id(1).to(tl.int64)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    mask_d = offs_d < D
    mask_s = offs_s < S
    mask = mask_d[:, None] & mask_s[None, :]
    x = tl.load(x_ptr + batch * x_b + offs_d * x_d, mask=mask_d, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + batch * dt_b + offs_d * dt_d, mask=mask_d, other=0.0).to(tl.float32)
    dt += _per_channel(bias_ptr, offs_d, mask_d, HAS_BIAS)
    dt = _softplus(dt) if SOFTPLUS else dt
    B = tl.load(b_ptr + batch * b_b + offs_s * b_s, mask=mask_s, other=0.0).to(tl.float32)
    C = tl.load(c_ptr + batch * c_b + offs_s * c_s, mask=mask_s, other=0.0).to(tl.float32)
    rate = tl.load(a_ptr + offs_d[:, None] * S + offs_s[None, :], mask=mask, other=0.0)
    state = state_ptr + (batch * D + offs_d)[:, None] * S + offs_s[None, :]
    h = tl.load(state, mask=mask, other=0.0).to(tl.float32)
    h = tl.exp2(dt[:, None] * (rate.to(tl.float32) * LOG2_E)) * h + (dt * x)[:, None] * B[None, :]
    tl.store(state, h.to(state_ptr.dtype.element_ty), mask=mask)
    y = tl.sum(h * C[None, :], axis=1)
    y += x * _per_channel(d_ptr, offs_d, mask_d, HAS_D)
    if HAS_Z:
        z = tl.load(z_ptr + batch * z_b + offs_d * z_d, mask=mask_d, other=0.0).to(tl.float32)
        y *= z * _sigmoid(z)
    tl.store(y_ptr + batch * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)
