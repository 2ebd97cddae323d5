"""Run transformers' Mamba mixers on our selective scan and causal convolution, while lillama runs
them.

transformers' own scan without extra packages is a Python loop over time whose autograd graph grows
with the square of the length: under 100 tokens/s for a tiny Mamba on a CPU. The mixers look both
functions up as globals of their module at call time, so replacing the globals is enough; they are
put back on leaving.
"""

import contextlib
import importlib.util
from collections.abc import Iterator

from lillama_kernels import causal_conv1d, selective_scan
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


def _conv(x, weight, bias=None, activation=None, **kwargs) -> Tensor:
    if kwargs.get("seq_idx") is not None:
        raise NotImplementedError("packed sequences (seq_idx) are not supported by causal_conv1d")
    return causal_conv1d(x, weight, bias, activation)


@contextlib.contextmanager
def fast_mamba() -> Iterator[None]:
    """Inside the block Mamba prefill and training use lillama_kernels, unless a faster package is
    installed.

    A function whose package (mamba_ssm, causal_conv1d) is installed is left alone.
    """
    from transformers.models.mamba import modeling_mamba

    replaced = {
        "mamba_selective_scan": ("mamba_ssm", _scan),
        "causal_conv1d_fn": ("causal_conv1d", _conv),
    }
    saved = {}
    try:
        for name, (package, ours) in replaced.items():
            if importlib.util.find_spec(package) is None:
                saved[name] = getattr(modeling_mamba, name)
                setattr(modeling_mamba, name, ours)
        yield
    finally:
        for name, theirs in saved.items():
            setattr(modeling_mamba, name, theirs)
