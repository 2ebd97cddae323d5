"""One token of every sequence through a whole Mamba-1 mixer with low-rank projections."""

from typing import Any

import torch
from torch import Tensor

from lillama_kernels.arguments import check_shapes
from lillama_kernels.dispatch import Impl, runs_triton
from lillama_kernels.mamba import reference
from lillama_kernels.mamba.reference import MixerWeights
from lillama_kernels.tiles import MIXER_MAX_ROWS

__all__ = ["MixerWeights", "mamba_mixer_step", "mamba_mixer_step_runs_triton"]


def mamba_mixer_step_runs_triton(x: Tensor, weights: MixerWeights) -> bool:
    """Whether `mamba_mixer_step` takes x [B, H] and these weights on Triton and "auto" means that:
    for callers that have another way.

    Raises:
        NotImplementedError: as `mamba_mixer_step`.
    """
    fits = _fits(x, weights)
    return fits and runs_triton("mamba_mixer_step", "auto", x, fits)


def _fits(x: Tensor, weights: MixerWeights) -> bool:
    w = weights
    sizes = (*w.in_A.shape, *w.in_B.shape, *w.x_proj.shape, *w.out_A.shape, *w.out_B.shape)
    return 0 < x.shape[0] <= MIXER_MAX_ROWS and all(size % 8 == 0 for size in sizes)


def mamba_mixer_step(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: MixerWeights,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """in_proj, convolution, x_proj, dt_proj, scan and out_proj of one step, without gradients.

    "auto" on a GPU is Triton, in six launches, for up to 16 sequences in fp32, fp16 or bf16 when
    the sizes of the projections are multiples of 8.

    Args:
        x: [B, H], one token of each sequence.
        conv_state: [B, D, L], L >= W - 1, the last inputs of the convolution; replaced in place.
        ssm_state: [B, D, S], any floating dtype; replaced in place.
        weights: see `MixerWeights`; the matrices have the dtype of x.
        impl: see `lillama_kernels.dispatch`.

    Returns:
        [B, H], dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl="triton"` with sizes that it does
            not take.
        TypeError, NotImplementedError: `impl="triton"` cannot take the dtype, or run there.
    """
    _check(x, conv_state, ssm_state, weights)
    fits = _fits(x, weights)
    if not runs_triton("mamba_mixer_step", impl, x, fits):
        with torch.no_grad():
            return reference.mamba_mixer_step(x, conv_state, ssm_state, weights)
    if not fits:
        raise ValueError(
            f"mamba_mixer_step: Triton takes 1 to {MIXER_MAX_ROWS} sequences and projections of "
            f"multiples of 8, got x {list(x.shape)}, in_A {list(weights.in_A.shape)}, x_proj "
            f"{list(weights.x_proj.shape)}, out_A {list(weights.out_A.shape)}; use impl='reference'"
        )
    return torch.ops.lillama.mamba_mixer_step(x, conv_state, ssm_state, *weights)


def _check(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MixerWeights) -> None:
    w = weights
    if x.ndim != 2:
        raise ValueError(f"x must be [B, H], got {list(x.shape)}")
    (batch, hidden), channels, size = x.shape, w.conv.shape[0], w.A_log.shape[-1]
    length = max(conv_state.shape[-1], w.conv.shape[1] - 1)
    shapes = {
        "in_A": (w.in_A, (w.in_A.shape[0], hidden)),
        "in_B": (w.in_B, (2 * channels, w.in_A.shape[0])),
        "in_bias": (w.in_bias, (2 * channels,)),
        "conv_bias": (w.conv_bias, (channels,)),
        "x_proj": (w.x_proj, (w.dt.shape[-1] + 2 * size, channels)),
        "dt": (w.dt, (channels, w.dt.shape[-1])),
        "dt_bias": (w.dt_bias, (channels,)),
        "A_log": (w.A_log, (channels, size)),
        "D": (w.D, (channels,)),
        "out_A": (w.out_A, (w.out_A.shape[0], channels)),
        "out_B": (w.out_B, (hidden, w.out_A.shape[0])),
        "out_bias": (w.out_bias, (hidden,)),
        "ssm_state": (ssm_state, (batch, channels, size)),
        "conv_state": (conv_state, (batch, channels, length)),
    }  # fmt: skip
    check_shapes(x, shapes)
    for name in ("in_A", "in_B", "x_proj", "dt", "out_A", "out_B"):
        dtype = getattr(w, name).dtype
        if dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {dtype}")


# An op that torch.compile and CUDA graphs see as one. triton is imported when it runs.
@torch.library.custom_op(
    "lillama::mamba_mixer_step",
    mutates_args=("conv_state", "ssm_state"),
    schema="(Tensor x, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor in_A, Tensor in_B, "
    "Tensor? in_bias, Tensor conv, Tensor? conv_bias, Tensor x_proj, Tensor dt, Tensor dt_bias, "
    "Tensor A_log, Tensor D, Tensor out_A, Tensor out_B, Tensor? out_bias) -> Tensor",
)
def _step(x: Tensor, conv_state: Tensor, ssm_state: Tensor, *weights: Any) -> Tensor:
    from lillama_kernels.mamba.mixer_kernels import mamba_mixer_step_launch

    given: Any = MixerWeights._make(None if t is None else t.contiguous() for t in weights)
    moved_conv, moved_ssm = conv_state.contiguous(), ssm_state.contiguous()
    y = mamba_mixer_step_launch(x.contiguous(), moved_conv, moved_ssm, given)
    for state, moved in ((conv_state, moved_conv), (ssm_state, moved_ssm)):
        if moved.data_ptr() != state.data_ptr():
            state.copy_(moved)
    return y


@_step.register_fake
def _(x, conv_state, ssm_state, *weights):
    return x.new_empty(x.shape)
