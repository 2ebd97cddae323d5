"""Run transformers' Mamba mixers on our scan, convolution and steps, while lillama runs them.

transformers' own scan without extra packages is a Python loop over time whose autograd graph grows
with the square of the length: under 100 tokens/s for a tiny Mamba on a CPU. The mixers look these
functions up as globals of their module at call time, so replacing the globals is enough; they are
put back on leaving.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from lillama_kernels import (
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_state_update,
)
from torch import Tensor

__all__ = ["fast_mamba"]


def _scan(
    hidden_states,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    **kwargs,
) -> Tensor | tuple[Tensor, Tensor]:
    y, last = selective_scan(
        hidden_states, dt, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=delta_softplus
    )
    return (y, last) if return_last_state else y


def _scan_step(
    state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs
) -> Tensor:
    return selective_state_update(
        state, hidden_states, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus
    )


def _conv(x, weight, bias=None, activation=None, **kwargs) -> Tensor:
    if kwargs.get("seq_idx") is not None:
        raise NotImplementedError("packed sequences (seq_idx) are not supported by causal_conv1d")
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
# By transformers' module: the functions replaced, and the package that would provide a faster one
REPLACED: dict[str, dict[str, tuple[str, Any]]] = {
    "mamba": _MAMBA_1,
    "falcon_mamba": _MAMBA_1,
    "jamba": _MAMBA_1,
    "mamba2": _CONVOLUTION,
}


@contextlib.contextmanager
def fast_mamba() -> Iterator[None]:
    """Inside the block the mixers of Mamba, FalconMamba and Jamba use lillama_kernels, and Mamba-2
    its convolution, unless a faster package is installed.

    A function whose package (mamba_ssm, causal_conv1d) is installed is left alone.
    """
    saved = []
    try:
        for name, functions in REPLACED.items():
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            for function, (package, ours) in functions.items():
                if importlib.util.find_spec(package) is None:
                    saved.append((module, function, getattr(module, function)))
                    setattr(module, function, ours)
        yield
    finally:
        for module, function, theirs in saved:
            setattr(module, function, theirs)
