"""Run transformers' Mamba mixers on our scan, convolution and steps, while lillama runs them.

transformers' own scan without extra packages is a Python loop over time whose autograd graph grows
with the square of the length: under 100 tokens/s for a tiny Mamba on a CPU. The mixers look these
functions up as globals of their module at call time, so replacing the globals is enough; they are
put back on leaving. A decode step of a Mamba mixer whose projections are low-rank is one operation
of ours where its Triton kernels run.
"""

import contextlib
import importlib
import importlib.util
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from lillama_kernels import (
    MixerWeights,
    causal_conv1d,
    causal_conv1d_update,
    mamba_mixer_step,
    mamba_mixer_step_runs_triton,
    selective_scan,
    selective_state_update,
    ssd_scan,
    ssd_state_update,
)
from torch import Tensor, nn

from lillama.modules.low_rank_linear import LowRankLinear

__all__ = ["fast_mamba"]


def _scan(
    hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, **kwargs
) -> Tensor | tuple[Tensor, Tensor]:
    y, last = selective_scan(
        hidden_states, dt, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=delta_softplus
    )
    return (y, last) if kwargs.get("return_last_state") else y


def _scan_step(
    state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs
) -> Tensor:
    return selective_state_update(
        state, hidden_states, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus
    )


def _refuse_packed(op: str, arguments: Mapping[str, Any]) -> None:
    for name in ("seq_idx", "cu_seqlens"):
        if arguments.get(name) is not None:
            raise NotImplementedError(f"packed sequences ({name}) are not supported by {op}")


def _ssd(
    hidden_states,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    **kwargs,
) -> Tensor | tuple[Tensor, Tensor]:
    """chunk_size, how transformers' own cuts time, does not change the result."""
    _refuse_packed("ssd_scan", kwargs)
    limit, initial = kwargs.get("dt_limit", (0.0, math.inf)), kwargs.get("initial_states")
    options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": limit}
    y, last = ssd_scan(hidden_states, dt, A, B, C, D, initial_state=initial, **options)
    y = y if z is None else y * F.silu(z)
    return (y, last) if kwargs.get("return_final_states") else y


def _ssd_step(
    state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs
) -> Tensor:
    """dt [B, nh, P], A [nh, P, S], D and dt_bias [nh, P] are numbers of heads, expanded."""
    _refuse_packed("ssd_state_update", kwargs)
    D, dt_bias = (None if vector is None else vector[:, 0] for vector in (D, dt_bias))
    options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus}
    y = ssd_state_update(state, hidden_states, dt[:, :, 0], A[:, 0, 0], B, C, D, **options)
    return y if z is None else y * F.silu(z)


def _conv(x, weight, bias=None, activation=None, **kwargs) -> Tensor:
    _refuse_packed("causal_conv1d", kwargs)
    return causal_conv1d(x, weight, bias, activation)


def _conv_step(x, conv_state, weight, bias=None, activation=None, **kwargs) -> Tensor:
    return causal_conv1d_update(x, conv_state, weight, bias, activation)


_CONVOLUTION = {
    "causal_conv1d_fn": ("causal_conv1d", _conv),
    "causal_conv1d_update": ("causal_conv1d", _conv_step),
}
_MAMBA_1 = _CONVOLUTION | {
    "mamba_selective_scan": ("mamba_ssm", _scan),
    "mamba_selective_state_update": ("mamba_ssm", _scan_step),
}
_MAMBA_2 = _CONVOLUTION | {
    "mamba2_chunk_scan": ("mamba_ssm", _ssd),
    "mamba2_selective_state_update": ("mamba_ssm", _ssd_step),
}
# By transformers' module: the functions replaced, and the package that would provide a faster one
REPLACED: dict[str, dict[str, tuple[str, Any]]] = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), _MAMBA_1),
    "mamba2": _MAMBA_2,
}


def _mixer_weights(mixer: Any) -> MixerWeights | None:
    """Return what a decode step computes with; None where a projection is not as it expects."""
    into, out, inner = mixer.in_proj, mixer.out_proj, mixer.x_proj
    if not isinstance(into, LowRankLinear) or not isinstance(out, LowRankLinear):
        return None
    if type(inner) is not nn.Linear or inner.bias is not None or mixer.dt_proj.bias is None:
        return None
    if mixer.activation not in ("silu", "swish"):
        return None
    conv, dt = mixer.conv1d, mixer.dt_proj
    return MixerWeights(
        in_A=into.A, in_B=into.B, in_bias=into.bias, conv=conv.weight.squeeze(1),
        conv_bias=conv.bias, x_proj=inner.weight, dt=dt.weight, dt_bias=dt.bias,
        A_log=mixer.A_log, D=mixer.D, out_A=out.A, out_B=out.B, out_bias=out.bias,
    )  # fmt: skip


def _mixer_forward(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The mixer's forward, with a decode step on Triton as one operation."""

    def forward(
        mixer: Any,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        def rest() -> Tensor:
            return theirs(mixer, hidden_states, cache_params, attention_mask, **kwargs)

        if cache_params is None or attention_mask is not None or hidden_states.shape[1] != 1:
            return rest()
        if torch.is_grad_enabled() or not cache_params.has_previous_state(mixer.layer_idx):
            return rest()
        layer, weights = cache_params.layers[mixer.layer_idx], _mixer_weights(mixer)
        x = hidden_states[:, 0]
        if weights is None or getattr(layer, "record_past", False):
            return rest()
        if not mamba_mixer_step_runs_triton(x, weights):
            return rest()
        states = layer.conv_states[0], layer.recurrent_states[0]
        return mamba_mixer_step(x, *states, weights)[:, None]

    return forward


def _module(family: str) -> ModuleType | None:
    """transformers' modelling module, None where the installed version does not know the family."""
    name = f"transformers.models.{family}"
    if importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(f"{name}.modeling_{family}")


_lock = threading.Lock()
_users = 0
# (owner, name, transformers' own) of everything replaced while there are users
_saved: list[tuple[Any, str, Any]] = []


@contextlib.contextmanager
def fast_mamba() -> Iterator[None]:
    """Inside the block the mixers of Mamba, Mamba-2, FalconMamba and Jamba use lillama_kernels,
    unless a faster package is installed.

    A function whose package (mamba_ssm, causal_conv1d) is installed is left alone, and so is what
    the installed transformers does not have. The first to enter replaces, the last to leave puts
    all back, in whichever threads and order they come.
    """
    global _users
    with _lock:
        if not _users:
            _replace()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _put_back()


def _replace() -> None:
    from transformers.models.mamba.modeling_mamba import MambaMixer

    try:
        for family, functions in REPLACED.items():
            module = _module(family)
            for function, (package, ours) in functions.items():
                if importlib.util.find_spec(package) is None and hasattr(module, function):
                    _saved.append((module, function, getattr(module, function)))
                    setattr(module, function, ours)
        _saved.append((MambaMixer, "forward", MambaMixer.forward))
        MambaMixer.forward = _mixer_forward(MambaMixer.forward)
    except BaseException:
        _put_back()
        raise


def _put_back() -> None:
    while _saved:
        owner, name, theirs = _saved.pop()
        setattr(owner, name, theirs)
