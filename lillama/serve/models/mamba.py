"""Mamba-1 on slots: a state of fixed size a request, and a decode step of our own.

transformers' forward costs more in Python than the arithmetic of a small model, and its cache holds
one batch from beginning to end. Here the convolution's and the scan's states are [L, slots, ...]
tensors, and a step is a plain sequence of operations on views of the first rows. Letters: L layers,
b rows of a step, T tokens, H hidden_size, D channels, S state size, W width of the filter.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from lillama.errors import InputError
from lillama.modules.low_rank_linear import LowRankLinear
from lillama.serve.models.runner import PREFILL_CHUNK, Prefilled, lay_out, lookup, projection

__all__ = ["MambaRunner"]

# The state does not grow with the text; this only keeps a request from running for ever.
NO_LIMIT = 2**20
LOG2_E = math.log2(math.e)


class _Layer(NamedTuple):
    """A block's weights as a step reads them; rate [D, S] fp32 is -exp(A_log)."""

    norm: Tensor
    eps: float
    into: Callable[[Tensor], Tensor]
    conv: Tensor  # [D, W]
    conv_bias: Tensor | None
    x_proj: Callable[[Tensor], Tensor]
    sizes: list[int]  # of dt, B and C in x_proj's output
    dt: Tensor  # [D, P]
    dt_bias: Tensor
    rate: Tensor
    skip: Tensor
    out: Callable[[Tensor], Tensor]
    # for the CPU's step: [W, D] and [S, D], channels side by side
    taps: Tensor
    log2_rate: Tensor
    # for the fused step on a GPU; None where in_proj or out_proj is not low-rank
    fused: MixerWeights | None


class _Rows(NamedTuple):
    """Views of the first b slots of one layer: conv [b, D, W-1] and ssm [b, D, S]; and the same
    with channels last."""

    conv: Tensor
    ssm: Tensor
    conv_last: Tensor
    ssm_last: Tensor


class MambaRunner:
    """A `Runner` for Mamba-1.

    Args:
        model: MambaForCausalLM, dense or with factorised projections, in eval mode.
        slots: requests at once.
        max_length: tokens of prompt and output; None is 2^20, for the state does not grow.

    Raises:
        InputError: a Mamba of another make.
    """

    def __init__(self, model: PreTrainedModel, slots: int, max_length: int | None) -> None:
        config: Any = model.config
        self.max_length = self.check(config, max_length)
        backbone: Any = model.get_submodule("backbone")
        head: Any = model.get_submodule("lm_head")
        self.device = model.device
        self.vocab_size = head.weight.shape[0]
        self._dtype = backbone.embeddings.weight.dtype
        self._head_dtype = head.weight.dtype
        self._stream = torch.float32 if config.residual_in_fp32 else self._dtype
        self._embed = lookup(backbone.embeddings)
        self._head = projection(head, self.device)
        self._norm_f = backbone.norm_f.weight.to(self._stream)
        self._eps = backbone.norm_f.variance_epsilon
        self._layers = [_layer(block, self.device) for block in backbone.layers]
        mixer = backbone.layers[0].mixer
        channels, width = mixer.intermediate_size, mixer.conv_kernel_size
        self._conv = self._state(slots, channels, width - 1, self._dtype)
        self._ssm = self._state(slots, channels, mixer.ssm_state_size, torch.float32)
        self._rows: dict[int, list[_Rows]] = {}

    @staticmethod
    def check(config: Any, max_length: int | None) -> int:
        """max_length, resolved.

        Raises:
            InputError: an activation other than silu.
        """
        if config.hidden_act not in ("silu", "swish"):
            raise InputError(
                f"the model's hidden_act is {config.hidden_act!r}; the engine serves Mamba with "
                "silu only"
            )
        return NO_LIMIT if max_length is None else max_length

    def _state(self, slots: int, channels: int, size: int, dtype: torch.dtype) -> Tensor:
        """Zeros [L, slots, D, size]. On a CPU channels lie side by side: sums over S or W then run
        over whole vectors, 2x to 6x faster; the GPU's kernels want size side by side."""
        count = len(self._layers)
        if self.device.type == "cpu":
            return torch.zeros(count, slots, size, channels, dtype=dtype).transpose(2, 3)
        return torch.zeros(count, slots, channels, size, dtype=dtype, device=self.device)

    # Prompts
    def prefill(self, prompt: Tensor) -> Iterator[Prefilled | None]:
        states: list[tuple[Tensor, Tensor] | None] = [None] * len(self._layers)
        x = self._norm_f[None]
        for start in range(0, len(prompt), PREFILL_CHUNK):
            if start:
                yield None
            x = self._embed(prompt[None, start : start + PREFILL_CHUNK]).to(self._stream)
            for index, layer in enumerate(self._layers):
                y, states[index] = _mixer_chunk(layer, x.to(self._dtype), states[index])
                x = x + y
        yield Prefilled(self._logits(x[:, -1]), states)

    def place(self, slot: int, state: Any) -> None:
        for index, (conv, ssm) in enumerate(state):
            self._conv[index, slot].copy_(conv[0])
            self._ssm[index, slot].copy_(ssm[0])

    def move(self, source: int, target: int) -> None:
        self._conv[:, target] = self._conv[:, source]
        self._ssm[:, target] = self._ssm[:, source]

    def clear(self, slot: int) -> None:
        pass  # place() replaces all of it

    # Steps
    def shape_of(self, live: int) -> int:
        return 0

    def advance(self, live: int) -> None:
        pass

    def step(self, ids: Tensor, shape: int) -> Tensor:
        batch = len(ids)
        if batch not in self._rows:
            self._rows[batch] = self._views(batch)
        mixer = _mixer_step_cpu if self.device.type == "cpu" else _mixer_step
        x = self._embed(ids).to(self._stream)
        for layer, rows in zip(self._layers, self._rows[batch], strict=True):
            x = x + mixer(layer, x.to(self._dtype), rows)
        return self._logits(x)

    def _views(self, batch: int) -> list[_Rows]:
        views = []
        for conv, ssm in zip(self._conv[:, :batch], self._ssm[:, :batch], strict=True):
            views.append(_Rows(conv, ssm, conv.transpose(1, 2), ssm.transpose(1, 2)))
        return views

    def _logits(self, x: Tensor) -> Tensor:
        """x [b, H] -> [b, V]."""
        x = F.rms_norm(x, x.shape[-1:], self._norm_f, self._eps)
        return self._head(x.to(self._head_dtype))


def _layer(block: Any, device: torch.device) -> _Layer:
    mixer = block.mixer
    conv, dt = mixer.conv1d, mixer.dt_proj
    taps = conv.weight.squeeze(1)
    rate = -torch.exp(mixer.A_log.float())
    size = mixer.ssm_state_size
    fused = None
    into, out = mixer.in_proj, mixer.out_proj
    low_rank = isinstance(into, LowRankLinear) and isinstance(out, LowRankLinear)
    if low_rank and isinstance(mixer.x_proj, (nn.Linear, LowRankLinear)):
        # a low-rank x_proj is multiplied out: it is small, and the step stays one operation
        fused = MixerWeights(
            in_A=into.lr_A, in_B=into.lr_B, in_bias=into.bias, conv=taps, conv_bias=conv.bias,
            x_proj=mixer.x_proj.weight.detach(), dt=dt.weight, dt_bias=dt.bias, A_log=mixer.A_log,
            D=mixer.D, out_A=out.lr_A, out_B=out.lr_B, out_bias=out.bias,
        )  # fmt: skip
    return _Layer(
        norm=block.norm.weight,
        eps=block.norm.variance_epsilon,
        into=projection(into, device),
        conv=taps,
        conv_bias=conv.bias,
        x_proj=projection(mixer.x_proj, device),
        sizes=[mixer.time_step_rank, size, size],
        dt=lay_out(dt.weight),
        dt_bias=dt.bias,
        rate=rate,
        skip=mixer.D,
        out=projection(out, device),
        taps=taps.t().contiguous(),
        log2_rate=(rate * LOG2_E).t().contiguous(),
        fused=fused,
    )


def _normed(layer: _Layer, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], layer.norm, layer.eps)


def _mixer_chunk(
    layer: _Layer, x: Tensor, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """x [1, T, H] after the tokens in state (conv [1, D, W-1], ssm [1, D, S]; None: the first) ->
    y [1, T, H] and the state after them."""
    u, z = layer.into(_normed(layer, x)).transpose(1, 2).chunk(2, dim=1)
    past = layer.conv.shape[1] - 1
    before, last = (u.new_zeros(1, u.shape[1], past), None) if state is None else state
    conv = torch.cat([before, u[..., -past:]], dim=2)[..., -past:] if past else before
    u = causal_conv1d(u, layer.conv, layer.conv_bias, "silu", initial_state=before)
    dt, B, C = layer.x_proj(u.transpose(1, 2)).split(layer.sizes, dim=-1)
    y, last = selective_scan(
        u,
        layer.dt @ dt.transpose(1, 2),
        layer.rate,
        B.transpose(1, 2),
        C.transpose(1, 2),
        layer.skip.float(),
        z,
        delta_bias=layer.dt_bias.float(),
        delta_softplus=True,
        initial_state=last,
    )
    return layer.out(y.transpose(1, 2)), (conv, last)


def _mixer_step(layer: _Layer, x: Tensor, rows: _Rows) -> Tensor:
    """One token x [b, H] -> [b, H] by our kernels: one fused operation where it runs, else one
    each for the convolution and the scan."""
    x = _normed(layer, x)
    if layer.fused is not None and mamba_mixer_step_runs_triton(x, layer.fused):
        return mamba_mixer_step(x, rows.conv, rows.ssm, layer.fused)
    u, z = layer.into(x).chunk(2, dim=-1)
    u = causal_conv1d_update(u[..., None], rows.conv, layer.conv, layer.conv_bias, "silu")[..., 0]
    dt, B, C = layer.x_proj(u).split(layer.sizes, dim=-1)
    y = selective_state_update(
        rows.ssm,
        u,
        F.linear(dt, layer.dt),
        layer.rate,
        B,
        C,
        layer.skip,
        z,
        dt_bias=layer.dt_bias,
        dt_softplus=True,
    )
    return layer.out(y)


def _mixer_step_cpu(layer: _Layer, x: Tensor, rows: _Rows) -> Tensor:
    """`_mixer_step` in as few of PyTorch's calls as it takes, in the dtype of x."""
    u, z = layer.into(_normed(layer, x)).chunk(2, dim=-1)
    window = torch.cat([rows.conv_last, u[:, None]], dim=1)  # [b, W, D]
    rows.conv_last.copy_(window[:, 1:])
    u = (window * layer.taps).sum(1)
    if layer.conv_bias is not None:
        u += layer.conv_bias
    u = F.silu(u)
    dt, B, C = layer.x_proj(u).split_with_sizes(layer.sizes, dim=-1)
    step = F.softplus(F.linear(dt, layer.dt, layer.dt_bias).float())  # [b, D]
    state = rows.ssm_last  # [b, S, D]
    state.mul_((step[:, None] * layer.log2_rate).exp2_())
    state.addcmul_((step * u)[:, None], B[..., None])
    y = torch.bmm(C[:, None].float(), state)[:, 0].addcmul_(u, layer.skip)
    return layer.out((y * F.silu(z)).to(x.dtype))
